"""Files of weights: a diffusers component folder to and from a flat dict of arrays.

params = jaxsd.weights.load("unet/", like=net)     # strict: every mismatch in one error
jaxsd.weights.save(params, "unet/")                # atomic; diffusers opens it
"""

from jaxsd.weights.files import read_json, write_json
from jaxsd.weights.tensors import DIFFUSERS_FILE, TRANSFORMERS_FILE, choose_files, load, save

__all__ = [
    "DIFFUSERS_FILE",
    "TRANSFORMERS_FILE",
    "choose_files",
    "load",
    "read_json",
    "save",
    "write_json",
]
