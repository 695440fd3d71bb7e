"""Stable Diffusion in pure JAX: sample, train, distil and edit, with numbers equal to PyTorch's."""

from jaxsd import weights
from jaxsd.errors import JaxsdError
from jaxsd.pipeline import Pipeline, load

__version__ = "0.1.0"
__all__ = ["JaxsdError", "Pipeline", "load", "weights"]
