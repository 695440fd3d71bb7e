"""Reads the weights of `jaxsd.models.perceptual` from the files that people have.

Torchvision's VGG16 (`features.N`) with lpips' heads for it (`lin0` ... `lin4`), or one file with
both: the state dict of an `LPIPS` of lpips or taming-transformers, alone or inside a checkpoint of
a CompVis autoencoder that was trained with it (`loss.perceptual_loss.*`).
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.nn import Net, Params
from jaxsd.weights.entries import Entry
from jaxsd.weights.files import AnyPath, as_path
from jaxsd.weights.headers import read_entries
from jaxsd.weights.tensors import read

# What a name may be called, and what it stands for. lpips cuts VGG16 into slices, whose layers keep
# their numbers, and lists its heads twice.
_PREFIX = r"(?:(?:module|loss)\.)?(?:perceptual_loss\.)?"
_FEATURE = re.compile(_PREFIX + r"(?:net\.slice[1-5]|features)\.(\d+)\.(weight|bias)")
_HEAD = re.compile(_PREFIX + r"lin([0-4])\.model\.[01]\.weight")


def load_lpips(paths: Sequence[str | AnyPath], net: Net) -> Params:
    """The float32 weights of an `LPIPS` network, from files that may hold other things as well.

    JaxsdError if something is missing, misshapen, or there twice.
    """
    if not paths:
        raise JaxsdError("the perceptual loss needs a file of weights")
    entries: dict[str, Entry] = {}
    for path in paths:
        found = _wanted(read_entries(as_path(path)))
        if not found:
            raise JaxsdError(
                f"{path} holds neither VGG16 (features.0.weight ...) nor the heads of LPIPS for it "
                "(lin0.model.1.weight ...)"
            )
        if twice := found.keys() & entries.keys():
            raise JaxsdError(f"{path} holds {sorted(twice)[0]} again: give each of the files once")
        entries |= found
    for start, what in (("features", "VGG16"), ("lin", "the heads of LPIPS")):
        if not any(name.startswith(start) for name in entries):
            raise JaxsdError(
                f"{', '.join(map(str, paths))} lacks {what}: name the file that has them as well, "
                "with a comma between the two"
            )
    return read(entries, net, np.float32, None, as_path(paths[-1]))


def _wanted(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    found = {}
    for name, entry in entries.items():
        if match := _FEATURE.fullmatch(name):
            found[f"features.{match[1]}.{match[2]}"] = entry
        elif match := _HEAD.fullmatch(name):
            found[f"lin{match[1]}.model.1.weight"] = entry
    return found
