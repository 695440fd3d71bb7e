"""Where a training ran, each time it was started: `environment.json` in its folder."""

import contextlib
import datetime
import functools
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxsd import __version__
from jaxsd.run_report.reading import STARTS, read_starts
from jaxsd.weights.files import write_json

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
KEPT = 200  # starts, the first one and the newest


def environment() -> dict[str, Any]:
    """Versions, machine, devices, commit of the code: what numbers and times may depend on."""
    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    found = {"jaxsd": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # built from a checkout, say
            found[name] = metadata.version(name)
    found["platform"] = platform.platform()
    found["devices"] = f"{len(devices)} x {', '.join(kinds)} ({jax.default_backend()})"
    found["processes"] = str(jax.process_count())
    if (commit := _commit()) is not None:
        found["commit"] = commit
    return found


def record(workdir: Path, step: int) -> None:
    """Adds this start, after which `step` updates have been made; JaxsdError if it cannot."""
    starts = read_starts(workdir)  # what a crash left in pieces is not worth a training
    start = {
        "time": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "step": step,
        "command": [_text(word) for word in sys.orig_argv],
        "directory": _text(str(Path.cwd())),
        **environment(),
    }
    write_json(workdir / STARTS, {"starts": [*starts[:1], *starts[1:][-KEPT + 2 :], start]})


def _text(word: str) -> str:
    """Names of files may hold bytes that are no text."""
    return word.encode("utf-8", "backslashreplace").decode("utf-8")


@functools.cache
def _commit() -> str | None:
    """Of the repository that the code is in, with "-dirty" if it was changed since."""
    folder = Path(__file__).parents[1]

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", "__init__.py")  # else it is another project's
        return ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
