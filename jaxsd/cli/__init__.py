"""The command line: options in dataclasses (tyro), one file for each command, no logic."""

import importlib
import os
import sys
import warnings

COMMANDS = {
    "sample": "make pictures from prompts",
    "serve": "a page, and an endpoint for pictures over HTTP",
    "compile": "the programs of sampling, ahead of time",
    "train": "train a model",
    "compare": "hold a model's numbers against PyTorch's, block by block",
    "evaluate": "measure a model of digits against the held-out scans",
    "info": "what a model or a file of weights is, from headers alone",
    "report": "a training's folder as one page, report.html",
    "convert": "between diffusers folders, single files and Orbax",
}
LIGHT = ("info", "report")  # which compute nothing, and answer before jax would be loaded


def main() -> None:
    """Entry point of `jaxsd COMMAND` and `python -m jaxsd COMMAND`."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        run_command(sys.argv[1], sys.argv[2:])
        return
    lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    usage = "\n".join(["usage: jaxsd COMMAND [OPTIONS]", "", *lines, ""])
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(usage)
        return
    print(usage, file=sys.stderr)
    sys.exit(2)


def run_command(name: str, argv: list[str] | None = None) -> None:
    """Runs one command; an error that the user can mend becomes one line and exit status 2."""
    from jaxsd.compilation_cache import use_compilation_cache
    from jaxsd.errors import GuidanceClipped, JaxsdError
    from jaxsd.memory import give_back_after_compiling
    from jaxsd.tokenizer import PromptTruncated

    try:
        if name not in LIGHT:
            use_compilation_cache()
            give_back_after_compiling()
        with warnings.catch_warnings():
            for category in (PromptTruncated, GuidanceClipped):
                warnings.simplefilter("always", category)
            warnings.showwarning = _one_line_warning
            try:
                importlib.import_module(f"jaxsd.cli.{name}").main(argv)
            finally:
                sys.stdout.flush()  # at Python's own end a broken pipe could not be caught
    except JaxsdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


def _one_line_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)
