"""The parts of a model on disk: where a model is, and its component folders, read and written."""

import dataclasses
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


def load_component(folder: Path, dtype: Any = None) -> Component:
    """Reads `unet/`, `vae/` or `text_encoder/`: the name of the folder says which."""
    config_class, module = COMPONENTS[folder.name]
    file = folder / "config.json"
    config = config_class.from_json(weights.read_json(file), str(file))
    net = Net(module(config))
    return Component(net, weights.load(folder, net, dtype))


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


def find(model: str | Path) -> Path:
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
        return _download(str(model))
    raise JaxsdError(
        f"unknown model {str(model)!r}: not a folder, and the models that ship are "
        f"{', '.join(shipped)}"
    )


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "scheduler/*.json", "tokenizer/*"]
    patterns += [f"{name}/config.json" for name in COMPONENTS]
    patterns += [f"{name}/{file}" for name in COMPONENTS for file in ("model.safetensors",)]
    patterns += [f"{name}/diffusion_pytorch_model.safetensors" for name in COMPONENTS]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # the library has a dozen kinds, none of them ours to mend
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise JaxsdError(
            f"no folder {repo!r} here, and the Hub did not give a model of that name ({first})"
        ) from None
