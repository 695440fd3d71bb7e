"""Stable Diffusion in pure JAX: sample, train, distil and edit, with numbers equal to PyTorch's."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxsd.errors import JaxsdError

if TYPE_CHECKING:
    from jaxsd import weights
    from jaxsd.compilation_cache import use_compilation_cache
    from jaxsd.conditioning import Sizes
    from jaxsd.pipeline import Pipeline, load
    from jaxsd.shortcuts import Shortcuts
    from jaxsd.watching import watch

__version__ = "0.1.0"
__all__ = [
    "JaxsdError",
    "Pipeline",
    "Shortcuts",
    "Sizes",
    "load",
    "use_compilation_cache",
    "watch",
    "weights",
]

_HOMES = {
    "Pipeline": "jaxsd.pipeline",
    "Shortcuts": "jaxsd.shortcuts",
    "Sizes": "jaxsd.conditioning",
    "load": "jaxsd.pipeline",
    "use_compilation_cache": "jaxsd.compilation_cache",
    "watch": "jaxsd.watching",
}


def __getattr__(name: str) -> Any:
    """Loads jax and the rest when they are first asked for: `jaxsd info` needs neither."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "weights":
        return importlib.import_module("jaxsd.weights")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
