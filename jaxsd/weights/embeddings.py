"""Textual inversion (Gal et al. 2022): files of vectors that a new word of the prompt stands for.

cat = embeddings.read("cat.safetensors")                     # diffusers', A1111's or XL's
tokenizer, params = embeddings.add(cat, tokenizer, params)   # for each text tower
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.nn import Params
from jaxsd.weights import embedding_names as names
from jaxsd.weights import tensors
from jaxsd.weights.entries import DTYPES, open_tensors
from jaxsd.weights.files import AnyPath, as_path, listing, reading
from jaxsd.weights.headers import read_entries

# What a folder may hold, best first.
FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
TABLE = "embeddings.token_embedding.weight"  # the end of its name


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A new word, and what it means to each text tower."""

    token: str
    vectors: dict[str, np.ndarray]  # "text_encoder", "text_encoder_2" -> [n, d]

    def tokens(self, component: str) -> list[str]:
        """The token of each vector: `token_names`."""
        return token_names(self.token, len(self.vectors[component]))


def token_names(token: str, count: int) -> list[str]:
    """The tokens of a word of `count` vectors, as diffusers has them: <cat>, <cat>_1, <cat>_2."""
    return [token, *(f"{token}_{i}" for i in range(1, count))]


@runtime_checkable
class Words(Protocol):
    """The part of a tokenizer that is needed here."""

    def __len__(self) -> int: ...

    def with_tokens(self, tokens: Sequence[str]) -> Any: ...


AnyWords = TypeVar("AnyWords", bound=Words)


def add(
    embedding: Embedding, tokenizer: AnyWords, params: Params, component: str = "text_encoder"
) -> tuple[AnyWords, Params]:
    """A tokenizer that knows the word, and a text tower's weights with its vectors as last rows.

    component: which tower's vectors. The new tower has as many rows as the tokenizer has tokens,
    as in diffusers. JaxsdError if the vectors do not fit the tower, or the token is there already.
    """
    if component not in embedding.vectors:
        raise JaxsdError(
            f"the embedding {embedding.token!r} has no vectors for {component}, only for "
            f"{' and '.join(embedding.vectors)}"
        )
    vectors = embedding.vectors[component]
    table = params[table_name(params)]
    if vectors.shape[1] != table.shape[1]:
        has, wants = (
            f"{width} channels ({names.WIDTHS.get(width, 'of no Stable Diffusion')})"
            for width in (vectors.shape[1], table.shape[1])
        )
        raise JaxsdError(f"the embedding {embedding.token!r} has {has}, this text tower {wants}")
    if len(table) < len(tokenizer):
        raise JaxsdError(
            f"the tokenizer has {len(tokenizer)} tokens, the text tower {len(table)}: they do not "
            "belong together"
        )
    known = tokenizer.with_tokens(embedding.tokens(component))
    return known, with_rows(params, len(tokenizer), jnp.asarray(vectors))


def table_name(params: Mapping[str, Any]) -> str:
    """What a text tower's table of token embeddings is called."""
    return next(name for name in params if name.endswith(TABLE))


def with_rows(params: Params, count: int, rows: jax.Array) -> Params:
    """A text tower's weights with `rows` [n, d] behind the first `count` of its table."""
    name = table_name(params)
    table = params[name][:count]
    return params | {name: jnp.concatenate([table, rows.astype(table.dtype)])}


# --- Files -----------------------------------------------------------------------------------


def read(path: str | os.PathLike, token: str | None = None) -> Embedding:
    """The embedding in a file, or in a folder as diffusers' training script leaves it.

    token: the word, if not the file's own. JaxsdError if the file is damaged or is no embedding.
    """
    file = _file(as_path(path))
    entries = read_entries(file)
    places = names.places(entries)
    if places is None:
        raise JaxsdError(
            f"{file} is not a textual-inversion embedding: it holds {listing(list(entries))}, not "
            "one tensor, or clip_l and clip_g"
        )
    told = names.token(entries)
    word = file.stem if token is None and told is None else token or told or ""
    if not word.strip():
        raise JaxsdError(f"{file}: give a token that is not empty")
    vectors = {}
    with reading(file), open_tensors(file) as mapped:
        for component, name in places.items():
            dtype, shape = entries[name].dtype, entries[name].shape
            if dtype not in DTYPES or len(shape) not in (1, 2) or 0 in shape:
                raise JaxsdError(
                    f"{file}: {name} is {dtype} {list(shape)}, not vectors [n, channels] of "
                    "float32, float16 or bfloat16"
                )
            array = np.array(mapped.get(entries[name]))
            vectors[component] = array.reshape(-1, shape[-1])
    return Embedding(word, vectors)


def _file(path: AnyPath) -> AnyPath:
    with reading(path):
        if not path.is_dir():
            return path
        held = [name for name in FILES if (path / name).is_file()]
        held = held or sorted(p.name for p in path.iterdir() if p.suffix == ".safetensors")
    if not held or (held[0] not in FILES and len(held) > 1):
        raise JaxsdError(f"{path} holds neither {' nor '.join(FILES)}: name the file")
    return path / held[0]


def save(
    embedding: Embedding, path: str | os.PathLike, form: str = "diffusers", dtype: Any = None
) -> AnyPath:
    """Writes an embedding as .safetensors, whole or not at all, and returns the file's path.

    path: a folder, or the path of a .safetensors file. form: "diffusers", {token: vectors} of one
    tower; "a1111", vectors of one tower in a file whose name is the token; or "sdxl", the same with
    both towers' vectors. A1111's pickles are not written. dtype: as in `weights.save`.
    """
    single = embedding.vectors.get("text_encoder")
    match form:
        case "diffusers":
            kept, default = {embedding.token: single}, FILES[0]
        case "a1111":
            kept, default = {"emb_params": single}, f"{embedding.token}.safetensors"
        case "sdxl":
            kept = {key: embedding.vectors.get(names.TOWERS[key]) for key in ("clip_l", "clip_g")}
            default = f"{embedding.token}.safetensors"
        case _:
            raise JaxsdError(f"unknown form {form!r}; there are diffusers, a1111 and sdxl")
    path = as_path(path)
    if form != "diffusers":
        if "/" in embedding.token or path.name != default and path.suffix == ".safetensors":
            raise JaxsdError(f"in this form the file's name is the token: {default!r} it must be")
    if any(value is None for value in kept.values()) or len(kept) != len(embedding.vectors):
        raise JaxsdError(
            f"an embedding for {' and '.join(embedding.vectors)} has no form {form!r}: sdxl is for "
            "both text towers, diffusers and a1111 are for text_encoder alone"
        )
    arrays = {name: jnp.asarray(value) for name, value in kept.items()}
    return tensors.save(arrays, path, default, dtype)
