"""Edits (Imagic, Kawar et al. 2022): a folder with what a prompt became, and what draws it.

edit.json               the prompt, the picture's size, and the model that the edit is of
edit.safetensors        float32, the embedding of the prompt ("target.*") and what it became for the
                        picture ("optimised.*"), each under the UNet's names
pytorch_lora_weights.safetensors   where factors were tuned
model_index.json, unet/ ...        where the whole network was: then the folder is the model

An edit may come from anyone: nothing of it is executed, and it is read only if it is whole.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.weights import tensors
from jaxsd.weights.entries import open_tensors
from jaxsd.weights.files import AnyPath, as_path, listing, read_json, reading, write_json
from jaxsd.weights.headers import read_entries

FILE, ARRAYS = "edit.json", "edit.safetensors"
MODEL = "model"  # the folder of a training's workdir in which the edit is
NAMES = ("encoder_hidden_states", "text_embeds")
# What names a model: options of `jaxsd.load`
BASE = {
    "model": str,
    "variant": str,
    "family": str,
    "config": str,
    "tokenizer": str,
    "use_ema": bool,
}
MAX_SIDE = 1 << 14  # of a picture, in pixels

Told = dict[str, np.ndarray]  # encoder_hidden_states [1, t, d]; XL: text_embeds [1, p]


@dataclasses.dataclass(frozen=True)
class Edit:
    """A prompt's embedding, what it became for a picture, and which model they are of."""

    prompt: str
    target: Told
    optimised: Told
    size: tuple[int, int]  # of the picture as the model was shown it: height, width
    clip_skip: int = 0  # last layers of the text tower that the embedding leaves out
    base: Mapping[str, Any] | None = None  # options of `jaxsd.load`; None: the folder is the model

    def __post_init__(self):
        for name in ("target", "optimised"):
            arrays = getattr(self, name)
            if problem := _problem(arrays):
                raise JaxsdError(f"an edit's {name} embedding {problem}")
        shapes = [{n: a.shape for n, a in told.items()} for told in (self.target, self.optimised)]
        if shapes[0] != shapes[1]:
            raise JaxsdError(f"an edit's embeddings differ in shape: {shapes[0]}, {shapes[1]}")


def _problem(arrays: Told) -> str | None:
    """What is wrong with an embedding."""
    ranks = {"encoder_hidden_states": 3, "text_embeds": 2}
    if NAMES[0] not in arrays or arrays.keys() - ranks.keys():
        return f"is of {listing(sorted(arrays))}, not of {NAMES[0]} and, for XL, {NAMES[1]}"
    for name, array in arrays.items():
        if array.dtype != np.float32:
            return f"is {array.dtype}, not float32"
        if array.ndim != ranks[name] or len(array) != 1 or not array.size:
            return f"has {name} {list(array.shape)}, not one row of it"
        if not np.isfinite(array).all():
            return f"holds NaN or infinity in {name}"
    return None


def find(path: str | os.PathLike) -> AnyPath | None:
    """The folder of an edit, if `path` is one or the workdir of the training that made one."""
    try:
        places = [as_path(path), as_path(path) / MODEL]
        return next((place for place in places if (place / FILE).is_file()), None)
    except OSError:  # no name of a file: the name of a model
        return None


def save(edit: Edit, folder: str | os.PathLike) -> None:
    """Writes edit.safetensors, then edit.json: whole or not at all."""
    folder = as_path(folder)
    both = {"target": edit.target, "optimised": edit.optimised}
    arrays = {f"{k}.{n}": jnp.asarray(a) for k, told in both.items() for n, a in told.items()}
    tensors.save(arrays, folder / ARRAYS)
    known = {"prompt": edit.prompt, "size": list(edit.size), "clip_skip": edit.clip_skip}
    base = None if edit.base is None else dict(edit.base)
    write_json(folder / FILE, {**known, "base": base})


def read(folder: str | os.PathLike) -> Edit:
    """The edit in a folder; JaxsdError if it is damaged or is none."""
    folder = as_path(folder)
    file, values = folder / FILE, read_json(folder / FILE)
    known = {field.name for field in dataclasses.fields(Edit)} - {"target", "optimised"}
    if values.keys() != known:
        raise JaxsdError(f"{file} says {listing(sorted(values))}, not {listing(sorted(known))}")
    prompt, size, clip_skip, base = (values[n] for n in ("prompt", "size", "clip_skip", "base"))
    right = {
        "prompt": isinstance(prompt, str),
        "size": isinstance(size, list)
        and len(size) == 2
        and all(type(side) is int and 0 < side <= MAX_SIDE for side in size),
        "clip_skip": type(clip_skip) is int and clip_skip >= 0,
        "base": base is None or _names_a_model(base),
    }
    if wrong := [name for name, fine in right.items() if not fine]:
        raise JaxsdError(f"{file} says of {listing(wrong)} what no edit does")
    told = _read_arrays(folder / ARRAYS)
    try:
        return Edit(prompt, told["target"], told["optimised"], tuple(size), clip_skip, base)
    except JaxsdError as error:
        raise JaxsdError(f"{folder / ARRAYS}: {error}") from None


def _names_a_model(base: Any) -> bool:
    if not isinstance(base, dict) or not base.get("model"):
        return False
    return all(name in BASE and type(value) is BASE[name] for name, value in base.items())


def _read_arrays(file: AnyPath) -> dict[str, Told]:
    entries = read_entries(file)
    told: dict[str, Told] = {"target": {}, "optimised": {}}
    for name in entries:
        part, _, own = name.partition(".")
        if part not in told or own not in NAMES:
            raise JaxsdError(f"{file} holds {name}, which is of no edit")
    if alien := [f"{name} {e.dtype}" for name, e in entries.items() if e.dtype != "F32"]:
        raise JaxsdError(f"{file}: an edit is float32, not {listing(alien)}")
    with reading(file), open_tensors(file) as mapped:
        for name, entry in entries.items():
            part, _, own = name.partition(".")
            told[part][own] = np.array(mapped.get(entry))  # a copy: the file may be replaced
    return told
