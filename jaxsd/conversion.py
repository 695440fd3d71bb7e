"""From one form of a model to another: diffusers folder, single file, Orbax.

convert("v1-5-pruned.ckpt", "sd15/", tokenizer="openai/clip-vit-large-patch14")
convert("sd15/", "sd15.safetensors", dtype="float16")
convert("sd15/", "sd15-orbax/", orbax=True)
convert("runs/student/model", "student/", dtype="int8", base="digits")
convert("sd15/", "castles/", loras=[("castle.safetensors", 0.8)])  # merged for good
extract_lora("castles/", "again.safetensors", "sd15/", rank=8)

Every target appears whole or not at all. Arrays keep their bits unless a dtype is asked for.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from jaxsd.components import Component, Parts, load_parts, save_parts
from jaxsd.errors import JaxsdError
from jaxsd.hub import BASE, FOLDERS, PRETRAINED, shipped
from jaxsd.vocabulary import is_kept_in
from jaxsd.weights import ldm, lora, lora_extract, lora_files, quantised, single
from jaxsd.weights.files import AnyPath, as_path, reading
from jaxsd.weights.lora_extract import Extracted
from jaxsd.weights.tensors import as_dtype, write

PICKLES = (".ckpt", ".bin", ".pt", ".pth")


def convert(
    source: str | PurePath,
    target: str | PurePath,
    *,
    dtype: Any = None,
    target_variant: str | None = None,
    orbax: bool = False,
    base: str | None = None,
    loras: Sequence[tuple[str | PurePath, float]] = (),
    **how: Any,
) -> None:
    """Reads a model from wherever it is and writes it in the form that the target's name tells.

    target: a path that ends in .safetensors becomes a single file under CompVis' names, without
    vocabulary and schedule, for which it has no place; any other a diffusers folder, with `orbax`
    one whose weights are Orbax checkpoints. dtype: float32, float16 or bfloat16, or int8 for a
    folder that jaxsd alone opens. target_variant: a part of the names of the files written into a
    folder, fp16 say. base: a model that ships; a folder leaves out what is the same there (`share`)
    and is for jaxsd alone. loras: files and scales, which are added to the weights for good. how:
    what `load_parts` takes.

    JaxsdError if the target exists, or cannot hold the model, or if a LoRA is for another one.
    """
    path = as_path(target)
    to_file = path.suffix == ".safetensors"
    if path.suffix in PICKLES:
        raise JaxsdError(f"cannot write {path}: pickles are only read; name it .safetensors")
    eight = quantised.is_asked_for(dtype)
    if to_file and (orbax or target_variant or eight or base):
        kinds = {"an Orbax model": orbax, "what has variants": target_variant, "int8": eight}
        kind = next((kind for kind, asked in kinds.items() if asked), "what shares parts")
        raise JaxsdError(f"cannot write {path}: {kind} is a folder, not one file")
    if orbax and eight:
        raise JaxsdError(f"cannot write {path}: Orbax keeps no int8; leave one of the two out")
    _check_free(path, to_file)
    # A sum is rounded once, to what is asked for
    parts = load_parts(source, None if eight or not loras else dtype, **how)
    if loras:
        parts = merge(parts, loras)
    if base is not None:
        parts = share(parts, base)
    if to_file:
        save_single(parts.components, path, dtype)
    else:
        save_parts(parts, path, dtype, target_variant, orbax)


def merge(parts: Parts, loras: Sequence[tuple[str | PurePath, float]]) -> Parts:
    """The model with LoRAs, files and scales, added to its weights; each keeps its dtype."""
    able = {name: part for name, part in parts.components.items() if name != "vae"}
    nets = {name: part.net for name, part in able.items()}
    read = [(lora_files.read(file, nets), scale) for file, scale in loras]
    summed = lora.merge({name: part.params for name, part in able.items()}, read)
    changed = {name: Component(nets[name], params) for name, params in summed.items()}
    return dataclasses.replace(parts, components=parts.components | changed)


def extract_lora(
    source: str | PurePath,
    target: str | PurePath,
    base: str | PurePath,
    rank: int = 8,
    *,
    form: str = "peft",
    dtype: Any = None,
    **how: Any,
) -> Extracted:
    """Writes the LoRA of a rank that makes of `base` nearly the model `source`: how near, it tells.

    target: a folder, or a path that ends in .safetensors. form: "peft" or "kohya", as
    `lora_files.save` tells; dtype: of the factors, by default float32. how: what `load_parts` takes
    of the source. JaxsdError if the target exists, or as of `lora_extract.extract`.
    """
    path = as_path(target)
    if path.suffix in PICKLES or quantised.is_asked_for(dtype):
        raise JaxsdError(f"cannot write {path}: a LoRA is a folder or a file that ends in "
                         ".safetensors, in float32, float16 or bfloat16")  # fmt: skip
    _check_free(path, path.suffix == ".safetensors")
    towers = [name for name in FOLDERS if name != "vae"]
    tuned, start = (
        {name: part.params for name, part in parts.components.items()}
        for parts in (load_parts(source, only=towers, **how), load_parts(base, only=towers))
    )
    found = lora_extract.extract(tuned, start, rank, form)
    lora_files.save(found.lora, path, form, dtype)
    return found


def _check_free(path: AnyPath, to_file: bool) -> None:
    with reading(path):
        if path.exists() and (to_file or not path.is_dir() or any(path.iterdir())):
            raise JaxsdError(f"cannot write {path}: it is there already")


def share(parts: Parts, base: str) -> Parts:
    """The model without what is the same in `base`, a model that ships, which its index names.

    A network is the same if its weights are when they are kept in the dtype that they have there.
    JaxsdError if no model of that name ships.
    """
    if base not in shipped():
        raise JaxsdError(f"base: no model that ships is {base!r}; those are {', '.join(shipped())}")
    there = PRETRAINED / base
    own = load_parts(there, None)
    kept = {
        name: part
        for name, part in parts.components.items()
        if not (there / name).is_dir() or not _same(part, own.components[name])
    }
    words = {
        name: tokenizer
        for name, tokenizer in parts.tokenizers.items()
        if not is_kept_in(tokenizer, there / name)
    }
    return dataclasses.replace(
        parts, components=kept, tokenizers=words, index=parts.index | {BASE: base}
    )


def _same(part: Component, other: Component) -> bool:
    """Whether two networks and their weights are the same, in the dtype of the other's."""
    return part.net.config == other.net.config and all(
        np.array_equal(np.asarray(part.params[name]).astype(value.dtype), np.asarray(value))
        for name, value in other.params.items()
    )


def save_single(
    components: Mapping[str, Component], file: str | PurePath, dtype: Any = None
) -> None:
    """Writes a single-file checkpoint; JaxsdError if a network has no names or place in one."""
    wanted = None if dtype is None else as_dtype(dtype)
    tower = components.get("text_encoder")
    open_clip = tower is not None and tower.net.config.hidden_act == "gelu"
    kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    places: dict[str, tuple[Component, list[str]]] = {}
    for part in single.parts_to_write(components, open_clip):
        component = components[part.component]
        for other, (shape, names) in single.layout(part, component.net.shapes).items():
            held = {np.dtype(component.params[name].dtype) for name in names}
            if wanted is None and len(held) > 1:
                raise JaxsdError(f"{', '.join(names)} become one tensor: pass a dtype for them")
            kinds[other] = (wanted or held.pop(), shape)
            places[other] = component, names

    def array(other: str) -> np.ndarray:
        component, names = places[other]
        kept = {name: np.asarray(component.params[name], wanted) for name in names}
        return ldm.stored(other, kept)

    write(as_path(file), kinds, array)
