"""Where a model's tokenizer comes from: its own folder, or CLIP's vocabulary from elsewhere."""

import contextlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from jaxsd.errors import JaxsdError
from jaxsd.hub import fetch_tokenizer
from jaxsd.tokenizer import Tokenizer
from jaxsd.weights import read_json, write_json
from jaxsd.weights.files import AnyPath, as_path, is_local, reading

TOKENIZERS = ("tokenizer", "tokenizer_2")  # of text_encoder and text_encoder_2
CLIP = "openai/clip-vit-large-patch14"  # every Stable Diffusion has its vocabulary


def open_tokenizer(folder: AnyPath, pad: str | None = None) -> Tokenizer:
    """The tokenizer in a folder, which may lie in a bucket. pad: a padding token, if not its own.

    JaxsdError if the folder holds no tokenizer.
    """
    if is_local(folder) and (pad is None or _pad_of(folder) == pad):
        return Tokenizer(folder)
    copy = Path(tempfile.mkdtemp(prefix="jaxsd-tokenizer-"))
    try:
        _copy(folder, copy)
        if pad is not None:
            for name in ("tokenizer_config.json", "special_tokens_map.json"):
                values = read_json(copy / name) if (copy / name).is_file() else {}
                write_json(copy / name, values | {"pad_token": pad})
        tokenizer = Tokenizer(copy)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    weakref.finalize(tokenizer, shutil.rmtree, copy, ignore_errors=True)
    return tokenizer


def find_vocabulary(
    file: AnyPath, name: str, wanted: str | PurePath | None, config: AnyPath | None
) -> tuple[AnyPath, bool]:
    """The folder of a vocabulary for a single file, and whether its padding is to be kept.

    name: "tokenizer" or "tokenizer_2". Looked for in `wanted` (a folder or a Hub id) if given, else
    in the folder of `config`, beside the file, and on the Hub, its cache first. JaxsdError names
    the ways out.
    """
    if wanted is not None:
        path = as_path(wanted)
        with reading(path):
            exists = path.exists()
        if not exists and "://" not in str(wanted):
            path = fetch_tokenizer(str(wanted))
        if found := _vocabulary(path, [name, "", *TOKENIZERS]):
            return found, found == path / name
        raise JaxsdError(f"{path} holds no vocabulary: vocab.json and merges.txt")
    for folder in (config, file.parent):
        if folder is not None and (found := _vocabulary(folder, [name, *TOKENIZERS])):
            return found, found == folder / name and folder is config
    with contextlib.suppress(JaxsdError):
        if found := _vocabulary(fetch_tokenizer(CLIP), [""]):
            return found, False
    raise JaxsdError(
        f"{file} comes without a vocabulary, as every single file, and the Hub did not give "
        f"CLIP's: pass tokenizer, a folder with its vocab.json and merges.txt (of any Stable "
        f"Diffusion, or {CLIP}), or put it beside the file as tokenizer/"
    )


def _vocabulary(folder: AnyPath, names: Sequence[str]) -> AnyPath | None:
    for place in (folder / name if name else folder for name in names):
        with reading(place):
            if any((place / file).is_file() for file in ("vocab.json", "tokenizer.json")):
                return place
    return None


def _pad_of(folder: AnyPath) -> Any:
    file = folder / "tokenizer_config.json"
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(file.read_text(encoding="utf-8"))
        pad = values.get("pad_token") if isinstance(values, dict) else None
        return pad.get("content") if isinstance(pad, dict) else pad
    return None


def save_tokenizer(tokenizer: Tokenizer, folder: AnyPath) -> None:
    """Writes the tokenizer's files into a folder, which may lie in a bucket."""
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(place)
        _copy(Path(place), folder)


def is_kept_in(tokenizer: Tokenizer, folder: AnyPath) -> bool:
    """Whether the folder holds the tokenizer's files, to the last byte."""
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(place)
        return folder.is_dir() and _contents(Path(place)) == _contents(folder)


def _contents(folder: AnyPath) -> dict[str, bytes]:
    with reading(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def _copy(folder: AnyPath, target: AnyPath) -> None:
    files = _contents(folder)
    with reading(target, "write"):
        target.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (target / name).write_bytes(data)
