"""The parts of a model on disk: where a model is, and its component folders, read and written."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from jaxsd import weights
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError
from jaxsd.families import get_family
from jaxsd.hub import BASE, FOLDERS, find, part_of
from jaxsd.models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTextProjectionConfig,
    CLIPVisionConfig,
    ControlNet,
    ControlNetConfig,
    TinyVAEConfig,
    UNet,
    UNet2DConfig,
    UNetConfig,
    VAEConfig,
)
from jaxsd.models.config import Config, short
from jaxsd.nn import Net, Params
from jaxsd.tokenizer import END, Tokenizer
from jaxsd.vocabulary import TOKENIZERS, find_vocabulary, open_tokenizer, save_tokenizer
from jaxsd.weights import quantised, single
from jaxsd.weights.entries import Entry
from jaxsd.weights.files import AnyPath, as_path, listing, moving_into
from jaxsd.weights.headers import read_entries
from jaxsd.weights.orbax import FOLDER as ORBAX
from jaxsd.weights.orbax import is_orbax
from jaxsd.weights.tensors import Placement, read

# What a component folder may hold: for each class that its config.json may name, ours for the
# config and for the network. The first is meant where the file names none.
_TEXT_ENCODER: dict[str, tuple[type[Config], type]] = {
    "CLIPTextModel": (CLIPTextConfig, CLIPTextModel),
    "CLIPTextModelWithProjection": (CLIPTextProjectionConfig, CLIPTextModelWithProjection),
}
COMPONENTS: dict[str, dict[str, tuple[type[Config], type]]] = {
    "unet": {"UNet2DConditionModel": (UNetConfig, UNet), "UNet2DModel": (UNet2DConfig, UNet)},
    "vae": {
        "AutoencoderKL": (VAEConfig, AutoencoderKL),
        "AutoencoderTiny": (TinyVAEConfig, AutoencoderTiny),
    },
    "text_encoder": _TEXT_ENCODER,
    "text_encoder_2": _TEXT_ENCODER,
    "controlnet": {"ControlNetModel": (ControlNetConfig, ControlNet)},
}


@dataclasses.dataclass(frozen=True)
class Component:
    """A network and its weights."""

    net: Net
    params: Params


@functools.lru_cache(64)
def make_net(config: Config) -> Net:
    """The network that a config describes.

    One for all models that have the config, which share what is traced of it: not to be changed.
    """
    classes = (pair for kinds in COMPONENTS.values() for pair in kinds.values())
    return Net(next(module for kind, module in classes if kind is type(config))(config))


def load_component(
    folder: str | PurePath,
    dtype: Any = None,
    variant: str | None = None,
    kind: str | None = None,
    sharding: Placement | None = None,
) -> Component:
    """Reads a component folder. `kind` is a key of COMPONENTS, by default the folder's name.

    JaxsdError if the config.json names a class that is not of this kind.
    """
    folder = as_path(folder)
    file = folder / "config.json"
    config = read_config(weights.read_json(file), kind or folder.name, str(file))
    net = make_net(config)
    if is_orbax(folder / ORBAX):
        from jaxsd.checkpoints import load_arrays  # orbax takes as long to load as all the rest

        return Component(net, load_arrays(folder / ORBAX, net, dtype, sharding))
    return Component(net, weights.load(folder, net, dtype, variant, sharding))


def read_config(values: dict[str, Any], kind: str, where: str = "config.json") -> Config:
    """The config in a config.json, by the class that it names."""
    classes = COMPONENTS[kind]
    named = values.get("_class_name")  # diffusers
    if named is None and isinstance(values.get("architectures"), list):  # transformers
        named = next(iter(values["architectures"]), None)
    if named is None:
        named = next(iter(classes))
    if not isinstance(named, str) or named not in classes:
        known = " or ".join(classes)
        raise JaxsdError(f"{where}: {short(named)} is not a class that a {kind} can have: {known}")
    return classes[named][0].from_json(values, where)


# What transformers means by a text_config that leaves these out: ViT-B/32's text tower
_CLIP_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}


def image_processor(folder: AnyPath) -> tuple[dict[str, Any], AnyPath]:
    """How a CLIPModel takes its pictures, as transformers wrote it, and the file that says so."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        return weights.read_json(file), file
    file = folder / "processor_config.json"  # transformers 5
    values = weights.read_json(file).get("image_processor") if file.is_file() else None
    if not isinstance(values, dict):
        raise JaxsdError(
            f"{folder} has no preprocessor_config.json, which says how CLIP takes its pictures: "
            "copy it from where the model came"
        )
    return values, file


def load_clip(folder: AnyPath) -> Component:
    """Reads `clip/`: both towers, as `train.py clip` leaves them and CLIPModel opens them."""
    values = weights.read_json(folder / "config.json")
    # Both towers end in this space, whatever theirs say, which transformers does not read
    shared = {"projection_dim": values.get("projection_dim", 512)}
    configs = []
    for name, kind, defaults in (
        ("text_config", CLIPTextConfig, _CLIP_TEXT),
        ("vision_config", CLIPVisionConfig, {}),
    ):
        if not isinstance(values.get(name), dict):
            raise JaxsdError(f"{folder / 'config.json'} has no {name}: not a CLIP model")
        own = defaults | values[name] | shared
        configs.append(kind.from_json(own, f"{folder / 'config.json'}, {name}"))
    net = Net(CLIPModel(*configs))
    return Component(net, weights.load(folder, net, np.float32))


def save_component(
    folder: AnyPath,
    net: Net,
    params: Params,
    dtype: Any = None,
    variant: str | None = None,
    orbax: bool = False,
) -> None:
    """Writes a component folder that diffusers or transformers opens; with `orbax` jaxsd alone.

    So it is with dtype int8, whose file has a name of its own, lest others take it for weights.
    """
    values = net.config.to_json()
    weights.write_json(folder / "config.json", values)
    name = weights.DIFFUSERS_FILE if "_class_name" in values else weights.TRANSFORMERS_FILE
    if orbax:
        from jaxsd.checkpoints import save_arrays

        save_arrays(params, folder / ORBAX, dtype)
        return
    if variant is None and quantised.is_asked_for(dtype):
        variant = quantised.FORM
    if variant is not None:
        name = name.replace(".", f".{variant}.", 1)
    weights.save(params, folder, name, dtype=dtype)


# --- Whole models ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model as its files have it."""

    components: dict[str, Component]  # "unet", "vae", "text_encoder", "text_encoder_2"
    schedule: Schedule
    tokenizers: dict[str, Tokenizer]  # "tokenizer", "tokenizer_2"
    index: dict[str, Any]  # model_index.json


def load_parts(
    model: str | PurePath,
    dtype: Any = None,
    variant: str | None = None,
    *,
    family: str | None = None,
    config: str | PurePath | None = None,
    tokenizer: str | PurePath | None = None,
    use_ema: bool = False,
    sharding: Placement | None = None,
    only: Collection[str] = FOLDERS,
) -> Parts:
    """Reads a model from wherever `find` finds it: a diffusers folder or a single file.

    dtype, variant, sharding: see `weights.load`. tokenizer: a folder or a Hub id with a vocabulary,
    in place of the model's own. only: which networks to read.

    Of a single file only: family, a name of `jaxsd.families`, where the file cannot tell; config, a
    diffusers folder whose configs (it needs no weights) take the place of the family's; use_ema,
    the UNet's moving averages in place of its weights. A single file has no vocabulary: it is
    looked for in `tokenizer`, in `config`, in tokenizer/ beside the file, then on the Hub.

    JaxsdError says what is missing, wrong or ambiguous.
    """
    path = find(model, variant)
    if path.is_file():
        return _load_file(path, dtype, family, config, tokenizer, use_ema, sharding, only)
    if family or config or use_ema:
        raise JaxsdError(f"{path} is a folder, with configs of its own: family, config and use_ema "
                         "are for single files")  # fmt: skip
    index = weights.read_json(path / "model_index.json")
    named = [n for n, v in index.items() if isinstance(v, list) and v and v[0] is not None]
    known = [name for name in named if name in (*FOLDERS, "scheduler", *TOKENIZERS)]
    places = {name: part_of(path, name, index) for name in known}
    if missing := [f"{name}/" for name, place in places.items() if not place.is_dir()]:
        raise JaxsdError(f"{path} lacks {', '.join(missing)}")
    if "unet" not in named:
        raise JaxsdError(f"{path}/model_index.json names no unet: not a model that jaxsd knows")
    tokenizers = {}
    for name in (name for name in TOKENIZERS if name in named):
        place = places[name]
        if tokenizer is not None:
            place, _ = find_vocabulary(path, name, tokenizer, None)
        tokenizers[name] = open_tokenizer(place)
    return Parts(
        {
            name: load_component(places[name], dtype, variant, sharding=sharding)
            for name in FOLDERS
            if name in named and name in only
        },
        _read_schedule(places.get("scheduler", path / "scheduler")),
        tokenizers,
        {name: value for name, value in index.items() if name != BASE},
    )


def _load_file(
    file: AnyPath,
    dtype: Any,
    family: str | None,
    config: str | PurePath | None,
    tokenizer: str | PurePath | None,
    use_ema: bool,
    sharding: Placement | None,
    only: Collection[str],
) -> Parts:
    entries = read_entries(file)
    found = {part.component: part for part in single.parts(entries)}
    if "unet" not in found:
        raise JaxsdError(
            f"{file} is not a model in a single file: it has no tensor {single.UNET.prefix}*; "
            "`jaxsd info` says what it is"
        )
    folder = None if config is None else find(config)
    if folder is None:
        configs, schedule = _family_configs(family or _guess_family(file, entries))
        schedule = dataclasses.replace(schedule, **single.schedule_marks(entries))
    else:
        configs, schedule = _folder_configs(folder)
    if missing := configs.keys() - found.keys():
        raise JaxsdError(f"{file} holds no {listing(sorted(missing))}")
    alien = [f"{found[name].prefix}*" for name in found.keys() - configs.keys()]
    if alien := alien + single.unexpected(entries, found.values()):
        raise JaxsdError(f"{file} holds what is no part of the model: {listing(sorted(alien))}")
    if use_ema and not single.has_ema(entries):
        raise JaxsdError(f"{file} holds no moving averages: leave use_ema out")
    components = {}
    for name, values in configs.items():
        if name not in only:
            continue
        net = make_net(values)
        own = single.select(entries, found[name], net.shapes, use_ema)
        components[name] = Component(net, read(own, net, dtype, sharding, file))
    tokenizers = {}
    for tower, name in zip(("text_encoder", "text_encoder_2"), TOKENIZERS, strict=True):
        if tower in configs:
            place, own = find_vocabulary(file, name, tokenizer, folder)
            # OpenCLIP's towers were trained with a padding other than OpenAI's.
            pad = "!" if configs[tower].hidden_act == "gelu" else END
            tokenizers[name] = open_tokenizer(place, None if own else pad)
    return Parts(components, schedule, tokenizers, make_index(configs, schedule))


def _guess_family(file: AnyPath, entries: Mapping[str, Entry]) -> str:
    names = single.family(entries)
    if len(names) == 1:
        return names[0]
    if names:
        raise JaxsdError(
            f"{file} does not tell which family it is of, for they differ in what the network "
            f"predicts or how it is sampled: pass family, one of {', '.join(names)}"
        )
    raise JaxsdError(
        f"{file} is of no family that comes with jaxsd; pass config, a diffusers folder with the "
        "configs of its shapes"
    )


def _family_configs(name: str) -> tuple[dict[str, Any], Schedule]:
    family = get_family(name)
    configs = {name: getattr(family, name) for name in FOLDERS}
    return {name: config for name, config in configs.items() if config}, family.schedule


def _folder_configs(folder: AnyPath) -> tuple[dict[str, Any], Schedule]:
    index = weights.read_json(folder / "model_index.json")
    files = {name: part_of(folder, name, index) / "config.json" for name in FOLDERS}
    configs = {
        name: read_config(weights.read_json(file), name, str(file))
        for name, file in files.items()
        if file.is_file()
    }
    return configs, _read_schedule(part_of(folder, "scheduler", index))


def _read_schedule(folder: AnyPath) -> Schedule:
    file = folder / "scheduler_config.json"
    return Schedule.from_json(weights.read_json(file), str(file))


# --- Writing ---------------------------------------------------------------------------------


def save_parts(
    parts: Parts,
    folder: str | PurePath,
    dtype: Any = None,
    variant: str | None = None,
    orbax: bool = False,
) -> None:
    """Writes a folder that diffusers opens or, with `orbax`, one that jaxsd alone does.

    What stood there under the same names is replaced. The folder appears whole: until the last
    file is written it has another name. In a bucket, where nothing can be renamed, model_index.json
    comes last. dtype: float32, float16 or bfloat16, by default each array's own; or int8, which
    jaxsd alone opens. variant: a part of the files' names, fp16 say.
    """
    with moving_into(folder) as partial:
        for name, component in parts.components.items():
            net, params = component.net, component.params
            save_component(partial / name, net, params, dtype, variant, orbax)
        schedule = parts.schedule.to_json()
        weights.write_json(partial / "scheduler" / "scheduler_config.json", schedule)
        for name, tokenizer in parts.tokenizers.items():
            save_tokenizer(tokenizer, partial / name)
        weights.write_json(partial / "model_index.json", parts.index)
    if variant is None and not orbax:
        for name in parts.components:
            _remove_other_form(as_path(folder) / name, quantised.is_asked_for(dtype))


def _remove_other_form(folder: AnyPath, eight: bool) -> None:
    """Of the plain form and that of eight bits the one that was not written: it would be read."""
    for name in (weights.DIFFUSERS_FILE, weights.TRANSFORMERS_FILE):
        other = name if eight else name.replace(".", f".{quantised.FORM}.", 1)
        (folder / other).unlink(missing_ok=True)


def make_index(configs: Mapping[str, Any], schedule: Schedule) -> dict[str, Any]:
    """What model_index.json says of a model with these networks: which of diffusers' classes."""
    unet = configs["unet"]
    if "vae" not in configs:
        name = "DDIMPipeline"
    else:
        xl = "XL" if "text_encoder_2" in configs else ""
        what = {9: "Inpaint", 8: "InstructPix2Pix"}.get(unet.in_channels, "")
        refiner = "Img2Img" if xl and "text_encoder" not in configs else ""
        name = f"StableDiffusion{xl}{what or refiner}Pipeline"
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": "0.36.0"}
    index["scheduler"] = ["diffusers", schedule.class_name]
    for name, config in configs.items():
        values = config.to_json()
        library = "diffusers" if "_class_name" in values else "transformers"
        index[name] = [library, values.get("_class_name") or values["architectures"][0]]
    for tower, name in zip(("text_encoder", "text_encoder_2"), TOKENIZERS, strict=True):
        if tower in configs:
            index[name] = ["transformers", "CLIPTokenizer"]
    if "text_encoder" not in configs and "text_encoder_2" not in configs:
        return index
    absent = {name: [None, None] for name in ("feature_extractor", "image_encoder")}
    if "text_encoder_2" not in configs:
        return index | absent | {"safety_checker": [None, None], "requires_safety_checker": False}
    if "text_encoder" not in configs:
        absent |= {"text_encoder": [None, None], "tokenizer": [None, None]}
        absent |= {"requires_aesthetics_score": True}
    return index | absent | {"force_zeros_for_empty_prompt": "text_encoder" in configs}
