"""Files of weights: a diffusers component folder to and from a flat dict of arrays.

params = jaxsd.weights.load("unet/", like=net)     # strict: every mismatch in one error
jaxsd.weights.save(params, "unet/")                # atomic; diffusers opens it
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxsd.weights.files import read_json, write_json
from jaxsd.weights.headers import DIFFUSERS_FILE, TRANSFORMERS_FILE, choose_files

if TYPE_CHECKING:
    from jaxsd.weights.tensors import load, save

__all__ = [
    "DIFFUSERS_FILE",
    "TRANSFORMERS_FILE",
    "choose_files",
    "load",
    "read_json",
    "save",
    "write_json",
]


def __getattr__(name: str) -> Any:
    """Loads jax only for those that make arrays: headers are read without it."""
    if name not in ("load", "save"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("jaxsd.weights.tensors"), name)
