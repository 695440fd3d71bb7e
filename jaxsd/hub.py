"""Where a model is: one that ships, a folder or a file, here or in a bucket, or on the Hub."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from jaxsd.errors import JaxsdError
from jaxsd.weights.files import AnyPath, as_path, listing, reading
from jaxsd.weights.headers import choose_files

PRETRAINED = Path(__file__).parent / "pretrained"
# The folders of a pipeline whose networks make pictures; a safety checker, say, is not fetched.
FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2")
WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
# In a model_index.json: the name of a model that ships, whose parts stand in for those that are not
# there. diffusers reads past what begins with an underscore, and then misses the parts.
BASE = "_base"


def find(model: str | PurePath, variant: str | None = None) -> AnyPath:
    """The folder or the file of a model, which is downloaded first if it is a Hub id.

    model: the name of one that ships; a path, local or of a bucket (gs://); or on the Hub
    "owner/name", or "owner/name/file.safetensors". A folder is a pipeline's, with a
    model_index.json, or one network's, with a config.json. variant: "fp16", say: which of several
    forms is downloaded. JaxsdError if there is no such thing.
    """
    if str(model) in shipped():
        return PRETRAINED / str(model)
    path = as_path(model)
    with reading(path):
        if path.is_file():
            return path
        if path.is_dir():
            if any((path / name).is_file() for name in ("model_index.json", "config.json")):
                return path
            raise JaxsdError(f"{path} has no model_index.json: not a diffusers folder")
    parts = str(model).split("/")
    if all(parts) and parts[0][0] not in ".~" and "://" not in str(model):
        if len(parts) == 2:
            return _fetch(str(model), variant)
        if len(parts) > 2 and parts[-1].endswith(WEIGHTS):
            return _fetch_file("/".join(parts[:2]), "/".join(parts[2:]))
    raise JaxsdError(
        f"unknown model {str(model)!r}: no such folder or file, and the models that ship are "
        f"{', '.join(shipped())}"
    )


def shipped() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/model_index.json"))


def base_of(index: Mapping[str, Any], folder: AnyPath) -> str | None:
    """The model that ships whose parts a model in `folder` shares, if its index names one.

    JaxsdError for anything but such a name: nothing else is opened.
    """
    name = index.get(BASE)
    if name is not None and name not in shipped():
        raise JaxsdError(
            f"{folder}/model_index.json: {BASE} names no model that ships; those are "
            f"{', '.join(shipped())}"
        )
    return name


def part_of(folder: AnyPath, name: str, index: Mapping[str, Any]) -> AnyPath:
    """The folder of a part of a model, its own or its base's; perhaps it does not exist."""
    own, base = folder / name, base_of(index, folder)
    return own if base is None or own.is_dir() else PRETRAINED / base / name


def _fetch(repo: str, variant: str | None) -> Path:
    """A repository's files of one form: a variant or the plain one, not the pickles beside them."""
    from huggingface_hub import HfApi, snapshot_download

    # The library raises a dozen kinds of errors, none of them ours to mend.
    try:
        files = HfApi().list_repo_files(repo)
    except Exception as error:
        with contextlib.suppress(Exception):  # no network: perhaps it was fetched before
            return Path(snapshot_download(repo, local_files_only=True))
        raise _no_model(repo, error) from None
    needed = needed_files(files, variant)
    if not needed:
        single = [f"{repo}/{name}" for name in files if name.endswith(WEIGHTS)]
        raise JaxsdError(
            f"{repo} is not a diffusers folder; "
            + (f"name one of its files: {listing(single)}" if single else "nor has it weights")
        )
    try:
        return Path(snapshot_download(repo, allow_patterns=needed))
    except Exception as error:
        raise _no_model(repo, error) from None


def _fetch_file(repo: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name))
    except Exception as error:
        raise _no_model(f"{repo}/{name}", error) from None


def fetch_tokenizer(repo: str) -> Path:
    """The folder with the vocabulary of a repository, of the cache if it is there already."""
    from huggingface_hub import snapshot_download

    wanted = [f"{folder}{name}" for folder in ("", "tokenizer/", "tokenizer_2/") for name in VOCAB]
    for local in (True, False):
        with contextlib.suppress(Exception):
            folder = Path(snapshot_download(repo, allow_patterns=wanted, local_files_only=local))
            if any(folder.rglob("vocab.json")) or any(folder.rglob("tokenizer.json")):
                return folder
    raise JaxsdError(f"no tokenizer {repo!r} here, in the Hub's cache, or on the Hub")


VOCAB = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
)


def _no_model(repo: str, error: Exception) -> JaxsdError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return JaxsdError(
        f"no folder or file {repo!r} here, and the Hub did not give a model of that name ({first})"
    )


def needed_files(files: Sequence[str], variant: str | None) -> list[str]:
    """The files of a repository that are needed: of each network's weights one form.

    Of a pipeline or, where there is none, of the network at the root (a ControlNet, say).
    """
    if "model_index.json" not in files:
        own = [f for f in files if "/" not in f]
        chosen = choose_files(own, variant) if "config.json" in own else []
        return [f for f in own if chosen and (f == "config.json" or f in chosen)]
    needed = ["model_index.json"]
    needed += [f for f in files if f.startswith(("tokenizer/", "tokenizer_2/"))]
    needed += [f for f in files if f == "scheduler/scheduler_config.json"]
    for name in FOLDERS:
        own = [f.removeprefix(f"{name}/") for f in files if f.startswith(f"{name}/")]
        chosen = choose_files(own, variant)
        needed += [f"{name}/{f}" for f in own if f == "config.json" or f in chosen]
    return needed
