"""The parts of a model on disk: where a model is, and its component folders, read and written."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd import weights
from jaxsd.errors import JaxsdError
from jaxsd.models import (
    AutoencoderKL,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)
from jaxsd.nn import Net, Params

# What a component folder holds: its config class and its module.
COMPONENTS: dict[str, tuple[type, type]] = {
    "unet": (UNetConfig, UNet),
    "vae": (VAEConfig, AutoencoderKL),
    "text_encoder": (CLIPTextConfig, CLIPTextModel),
}


@dataclasses.dataclass(frozen=True)
class Component:
    """A network and its weights."""

    net: Net
    params: Params


def load_component(folder: Path, dtype: Any = None, variant: str | None = None) -> Component:
    """Reads `unet/`, `vae/` or `text_encoder/`: the name of the folder says which."""
    config_class, module = COMPONENTS[folder.name]
    file = folder / "config.json"
    config = config_class.from_json(weights.read_json(file), str(file))
    net = Net(module(config))
    return Component(net, weights.load(folder, net, dtype, variant))


def load_clip(folder: Path) -> Component:
    """Reads `clip/`: both towers, as `train.py clip` leaves them and CLIPModel opens them."""
    values = weights.read_json(folder / "config.json")
    configs = []
    for name, kind in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
        if not isinstance(values.get(name), dict):
            raise JaxsdError(f"{folder / 'config.json'} has no {name}: not a CLIP model")
        configs.append(kind.from_json(values[name], f"{folder / 'config.json'}, {name}"))
    net = Net(CLIPModel(*configs))
    return Component(net, weights.load(folder, net, np.float32))


def save_component(folder: Path, net: Net, params: Params, dtype: Any = None) -> None:
    """Writes a component folder that diffusers or transformers opens."""
    weights.write_json(folder / "config.json", net.config.to_json())
    text = folder.name in ("text_encoder", "image_encoder", "clip")
    name = weights.TRANSFORMERS_FILE if text else weights.DIFFUSERS_FILE
    weights.save(params, folder, name, dtype=dtype)


PRETRAINED = Path(__file__).parent / "pretrained"


def find(model: str | Path, variant: str | None = None) -> Path:
    """The folder of a model; downloads it first if it is a Hub id that names no local folder."""
    shipped = sorted(p.parent.name for p in PRETRAINED.glob("*/model_index.json"))
    if str(model) in shipped:
        return PRETRAINED / str(model)
    folder = Path(model)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.is_dir():
        raise JaxsdError(f"{folder} has no model_index.json: not a diffusers folder")
    if folder.is_file():
        raise JaxsdError(f"{folder} is a file: give a diffusers folder")
    if str(model).count("/") == 1 and not str(model).startswith((".", "/", "~")):
        return _download(str(model), variant)
    raise JaxsdError(
        f"unknown model {str(model)!r}: not a folder, and the models that ship are "
        f"{', '.join(shipped)}"
    )


def _download(repo: str, variant: str | None) -> Path:
    """A repository's files of one form: a variant or the plain one, not the pickles beside them."""
    from huggingface_hub import HfApi, snapshot_download

    # The library raises a dozen kinds of errors, none of them ours to mend.
    try:
        files = HfApi().list_repo_files(repo)
    except Exception as error:
        with contextlib.suppress(Exception):  # no network: perhaps it was fetched before
            return Path(snapshot_download(repo, local_files_only=True))
        raise _no_model(repo, error) from None
    try:
        return Path(snapshot_download(repo, allow_patterns=needed_files(files, variant)))
    except Exception as error:
        raise _no_model(repo, error) from None


def _no_model(repo: str, error: Exception) -> JaxsdError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return JaxsdError(
        f"no folder {repo!r} here, and the Hub did not give a model of that name ({first})"
    )


def needed_files(files: Sequence[str], variant: str | None) -> list[str]:
    """The files of a repository that a pipeline needs: of each component's weights one form."""
    needed = [f for f in files if f == "model_index.json" or f.startswith("tokenizer/")]
    needed += [f for f in files if f == "scheduler/scheduler_config.json"]
    for name in COMPONENTS:
        own = [f.removeprefix(f"{name}/") for f in files if f.startswith(f"{name}/")]
        chosen = weights.choose_files(own, variant)
        needed += [f"{name}/{f}" for f in own if f == "config.json" or f in chosen]
    return needed
