"""Single-file checkpoints: which weights of which network each tensor is, and what else is inside.

A file such as v1-5-pruned.safetensors holds the networks of a model under CompVis' (LDM) names, one
prefix for each. Everything here works on headers; `ldm` has the names behind the prefixes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.weights import ldm
from jaxsd.weights.entries import Entry
from jaxsd.weights.files import listing

Shape = tuple[int, ...]


class Part(NamedTuple):
    """A network in a single file."""

    component: str  # as the folder of a diffusers model is called
    prefix: str
    names: Callable[[Iterable[str]], dict[str, str]]  # diffusers' names -> those after the prefix


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


UNET = Part("unet", "model.diffusion_model.", ldm.unet_names)
VAE = Part("vae", "first_stage_model.", ldm.vae_names)
CONTROLNET = Part("controlnet", "control_model.", ldm.unet_names)
CLIP = Part("text_encoder", "cond_stage_model.transformer.", _same)
OPEN_CLIP = Part("text_encoder", "cond_stage_model.model.", ldm.open_clip_names)
XL_CLIP = Part("text_encoder", "conditioner.embedders.0.transformer.", _same)
XL_OPEN_CLIP = Part("text_encoder_2", "conditioner.embedders.1.model.", ldm.open_clip_names)
REFINER_OPEN_CLIP = Part("text_encoder_2", "conditioner.embedders.0.model.", ldm.open_clip_names)
PARTS = (UNET, VAE, CONTROLNET, CLIP, OPEN_CLIP, XL_CLIP, XL_OPEN_CLIP, REFINER_OPEN_CLIP)

# What a file may hold besides the networks' weights, without a change to the pictures: tables of
# the schedule, moving averages, CLIP's other half, what the VAE was trained with, constants.
IGNORED = re.compile(
    r"betas|logvar|lvlb_weights|scale_factor|(\w+_)?alphas_cumprod(_prev)?|posterior_\w+|v_pred|ztsnr"
    r"|denoiser\.sigmas|model_ema\..*|first_stage_model\.(loss|model_ema)\..*"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(model|transformer)\."
    r"(logit_scale|attn_mask|visual\..*|vision_model\..*|visual_projection\..*"
    r"|text_projection(\.weight)?|.*position_ids)"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.logit_scale"
)
# (width of the text states, channels in) of the UNet -> the families it can be.
FAMILIES = {
    (768, 4): ("sd1",),
    (768, 9): ("sd1-inpaint",),
    (768, 8): ("instruct-pix2pix",),
    (1024, 4): ("sd2", "sd2-v", "sd-turbo"),
    (1024, 9): ("sd2-inpaint",),
    (2048, 4): ("sdxl",),
    (2048, 9): ("sdxl-inpaint",),
    (1280, 4): ("sdxl-refiner",),
}


def parts(entries: Mapping[str, Entry]) -> list[Part]:
    """The networks that a file holds; none if it is no single-file checkpoint."""
    return [part for part in PARTS if any(name.startswith(part.prefix) for name in entries)]


def family(entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """The families that the file's UNet can be of: none, one, or those between which it is mute."""
    first = entries.get(f"{UNET.prefix}input_blocks.0.0.weight")
    texts = [e for n, e in entries.items() if n.endswith("attn2.to_k.weight") and len(e.shape) == 2]
    if first is None or len(first.shape) != 4 or not texts:
        return ()
    found = FAMILIES.get((texts[0].shape[1], first.shape[1]), ())
    if len(found) > 1 and "v_pred" in entries:  # some trainers leave this mark
        return tuple(name for name in found if name.endswith("-v"))
    return found


def is_idle(name: str, part: Part) -> bool:
    """Whether a tensor of this network's is of no use; but XL's second projection is."""
    projection = part.component == "text_encoder_2" and name.endswith("text_projection")
    return IGNORED.fullmatch(name) is not None and not projection


def schedule_marks(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """What some trainers mark by the mere names of empty tensors, as the schedule's fields."""
    marks: dict[str, tuple[str, Any]] = {
        "v_pred": ("prediction_type", "v_prediction"),
        "ztsnr": ("rescale_betas_zero_snr", True),
    }
    return dict(field for name, field in marks.items() if name in entries)


def has_ema(entries: Mapping[str, Entry]) -> bool:
    """Whether the file holds the UNet's moving averages beside its weights."""
    return any(name.startswith("model_ema.diffusion_model") for name in entries)


def unexpected(entries: Mapping[str, Entry], found: Iterable[Part]) -> list[str]:
    """Names outside every network of the file, and not of the kinds that are known to be idle."""
    prefixes = tuple(part.prefix for part in found)
    return [n for n in entries if not n.startswith(prefixes) and not IGNORED.fullmatch(n)]


def select(
    entries: Mapping[str, Entry], part: Part, names: Iterable[str], use_ema: bool = False
) -> dict[str, Entry]:
    """The tensors of one network under diffusers' names, as `weights.tensors.read` takes them.

    names: all that the network has. What the file holds under the prefix beyond them keeps its own
    name, to be refused. use_ema: the UNet's moving averages in place of its weights.
    """
    names = list(names)
    selected, used = {}, set()
    if use_ema and part is UNET:
        for name, other in part.names(names).items():
            if (key := ldm.ema_name(part.prefix + other)) in entries:
                selected[name] = ldm.view(entries[key], name, other)
        return selected
    for name, other in part.names(names).items():
        if (key := part.prefix + other) in entries:
            selected[name] = ldm.view(entries[key], name, other)
            used.add(key)
    layers = 1 + max((_layer(name) for name in selected), default=-1)
    for key in entries.keys() - used:
        if key.startswith(part.prefix) and not is_idle(key, part):
            # OpenCLIP's last layer, whose output Stable Diffusion 2 does not read
            if part is not OPEN_CLIP or _layer(key) != layers:
                selected[key.removeprefix(part.prefix)] = entries[key]
    return selected


def _layer(name: str) -> int:
    found = re.search(r"\.(?:layers|resblocks)\.(\d+)\.", name)
    return int(found[1]) if found else -1


# --- Writing ---------------------------------------------------------------------------------


def parts_to_write(components: Iterable[str], open_clip: bool) -> list[Part]:
    """Where each component goes. open_clip: whether the only text tower is OpenCLIP's."""
    components = set(components)
    towers = {
        ("text_encoder",): [OPEN_CLIP if open_clip else CLIP],
        ("text_encoder", "text_encoder_2"): [XL_CLIP, XL_OPEN_CLIP],
        ("text_encoder_2",): [REFINER_OPEN_CLIP],
    }.get(tuple(sorted(components & {"text_encoder", "text_encoder_2"})))
    if towers is None or not {"unet", "vae"} <= components:
        raise JaxsdError(
            "a single file holds a UNet, a VAE and a text tower; this model has "
            f"{listing(sorted(components))}"
        )
    if alien := sorted(components - {"unet", "vae", "text_encoder", "text_encoder_2"}):
        raise JaxsdError(f"a single file has no place for {listing(alien)}")
    return [UNET, VAE, *towers]


def layout(part: Part, shapes: Mapping[str, Shape]) -> dict[str, tuple[Shape, list[str]]]:
    """Of each tensor to be written: its shape, and the names of the arrays that it is made of."""
    made: dict[str, list[str]] = {}
    for name, other in part.names(shapes).items():
        made.setdefault(other, []).append(name)
    return {
        part.prefix + other: (
            ldm.stored(other, {n: np.broadcast_to(np.float32(0), shapes[n]) for n in names}).shape,
            names,
        )
        for other, names in made.items()
    }
