"""The folder of one training: whose it is, and what is said when it cannot be written."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsd import processes
from jaxsd.errors import JaxsdError
from jaxsd.training.options import REPORTING, Options
from jaxsd.weights import read_json, write_json


def check_workdir(workdir: Path, config: dict[str, Any], options: Options) -> None:
    """JaxsdError if the config.json there is of a training with other options; writes nothing.

    An option that an older config.json does not know has had its default then. To be called by all
    processes; the first one looks.
    """
    processes.first(lambda: _check(workdir, config, options))


def claim(workdir: Path, config: dict[str, Any], options: Options) -> None:
    """Writes config.json, if the one there may be resumed with these options."""

    def write() -> None:
        _check(workdir, config, options)
        file, new = workdir / "config.json", _as_json(config)
        if not (file.exists() and read_json(file) == new):
            write_json(file, new)

    processes.first(write)


def _check(workdir: Path, config: dict[str, Any], options: Options) -> None:
    file, defaults = workdir / "config.json", _as_json(_defaults(options))
    config = _as_json(config)
    old = {**defaults, **read_json(file)} if file.exists() else config
    names = sorted({*old, *config} - REPORTING)
    now = {**defaults, **config}
    if changed := [name for name in names if old.get(name) != now.get(name)]:
        said = "; ".join(f"{n} {old.get(n)!r}, now {now.get(n)!r}" for n in changed)
        raise JaxsdError(
            f"{workdir} holds a training with other options ({said}): resume it with "
            "the same ones, or take another --workdir"
        )


def _defaults(options: Options) -> dict[str, Any]:
    fields = dataclasses.fields(options)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=str))


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Makes one line of what the disk refuses."""
    try:
        yield
    except OSError as error:
        place, reason = error.filename or workdir, error.strerror or error
        raise JaxsdError(f"cannot write {place}: {reason}") from None
