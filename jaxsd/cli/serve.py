"""`jaxsd serve`: a page, and an endpoint as OpenAI's clients call it."""

import dataclasses
import functools
import re

import tyro

from jaxsd.cli.several import Several
from jaxsd.cli.shared import Shared
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True)
class Options(Shared):
    """Draw for several people at once: a page, and POST /v1/images/generations beside it.

    Needs pip install "jaxsd[serve]". Requests that are alike share one compiled program.
    """

    model: str = "digits"
    """A model that ships, a diffusers folder, a single file or a Hub id."""
    beside: Several[str] = ()
    """A model to compare with, a student, say; may be repeated. By default those that ship."""
    alone: bool = False
    """Without the students that ship."""
    host: str = "127.0.0.1"
    """Where to listen: this machine alone, unless told otherwise (0.0.0.0 is everybody)."""
    port: int = 7860
    host_name: Several[str] = ()
    """What a proxy on this machine is called outside; may be repeated. Under other names than
    these, addresses and localhost nobody is answered, unless --host lets other machines in."""
    size: Several[str] = ()
    """WIDTHxHEIGHT; may be repeated, each is compiled. By default what the model was trained on."""
    batch_size: int | None = None
    """Pictures of every run, wanted or not; by default up to 8 of small ones, 4 of 512 px."""
    preview_with: str = "vae"
    """What decodes pictures on the way: vae, linear (at once, and small), or a TAESD folder."""
    max_steps: int = 100
    max_images: int = 8
    """Of one request."""
    max_waiting: int = 64
    """Pictures of all requests that have not begun: more are told to come back."""
    timeout: float = 120.0
    """Seconds until a request is given up."""


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, prog="jaxsd serve")
    _check(options)
    try:
        from jaxsd.serving import server
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "jaxsd":
            raise
        raise JaxsdError('serve needs Gradio: pip install "jaxsd[serve]"') from None
    from jaxsd.serving import beside, models, schema
    from jaxsd.serving.limits import Limits

    limits = Limits(
        steps=options.max_steps,
        count=options.max_images,
        waiting=options.max_waiting,
        timeout=options.timeout,
    )
    sizes = [schema.parse_size(text) for text in options.size]
    others = options.beside or (() if options.alone else beside.students_of(options.model))
    names = beside.served_names([options.model, *others])
    with server.listen(options.host, options.port) as bound:
        first = models.Served(
            names.pop(options.model),
            options.load(options.model),
            limits,
            sizes=sizes,
            batch_size=options.batch_size,
            shortcuts=options.shortcuts,
            preview_with=options.preview_with,
        )
        second = beside.load_beside(names, first, options.reading()["dtype"])
        say = functools.partial(print, flush=True)
        server.serve([first, *second], limits, bound, say, options.host_name)


def _check(options: Options) -> None:
    """What can be refused before a model is loaded."""
    for name in ("batch_size", "max_steps", "max_images", "max_waiting"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise JaxsdError(f"{name} must be at least 1, not {value}")
    if not 0 <= options.port <= 65535:
        raise JaxsdError(f"port must be from 0 (any that is free) to 65535, not {options.port}")
    for name in options.host_name:
        if not re.fullmatch(r"[\w.-]+", name):
            raise JaxsdError(f"host_name is one such as pictures.example.org, not {name!r}")
    if options.timeout <= 0:
        raise JaxsdError(f"timeout must be above 0, not {options.timeout:g}")
    if options.controlnet:
        raise JaxsdError(
            "a ControlNet needs pictures that requests have no field for: leave it out"
        )
