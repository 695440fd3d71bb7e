"""What LoRA files call the layers that they change: every spelling leads to one parameter name.

Three spellings are about, and their mixtures:

kohya          lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha
PEFT           unet.mid_block.attentions.0.proj_in.lora_A.weight, .lora_B.weight
old diffusers  unet.mid_block.attentions.0.proj_in.lora.down.weight, .lora.up.weight

Points that have become underscores cannot be told from underscores, so nothing is turned back: each
parameter of the model is listed under all the names that a file may have for it.
kohya's files for Stable Diffusion XL have LDM's names under the underscores (`ldm`).
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxsd.errors import JaxsdError
from jaxsd.weights.entries import Entry
from jaxsd.weights.ldm import unet_names

Shapes = Mapping[str, tuple[int, ...]]

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae")
KOHYA, PEFT, DIFFUSERS = "kohya", "PEFT", "old diffusers"

# How a name begins, and the component that it says; PEFT's own files do not say any.
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "vae.": "vae",
    "diffusion_model.": "unet",  # ComfyUI, before LDM's names
}
# How a name ends, what that part is, and whose spelling it is. PEFT may add an adapter's name.
ENDINGS = tuple(
    (re.compile(f"{pattern}$"), part, style)
    for pattern, part, style in (
        (r"\.lora_down\.weight", "down", KOHYA),
        (r"\.lora_up\.weight", "up", KOHYA),
        (r"\.lora_mid\.weight", "mid", KOHYA),
        (r"\.alpha", "alpha", KOHYA),
        (r"\.lora_A(\.\w+)?\.weight", "down", PEFT),
        (r"\.lora_B(\.\w+)?\.weight", "up", PEFT),
        (r"\.lora_magnitude_vector(\.\w+)?(\.weight)?", "magnitude", PEFT),
        (r"(_lora|\.lora|\.lora_linear_layer)\.down\.weight", "down", DIFFUSERS),
        (r"(_lora|\.lora|\.lora_linear_layer)\.up\.weight", "up", DIFFUSERS),
    )
)
# What is no pair of low-rank factors, by a pattern in the name.
OTHER_KINDS = {
    r"\.hada_": "LoHa layers",
    r"\.lokr_": "LoKr layers",
    r"\.oft_|\.boft_": "OFT layers",
    r"\.glora_|\.[ab][12]\.weight": "GLoRA layers",
    r"\.on_input": "IA3 layers",
    r"\.diff(_b)?$": "differences of whole weights",
    r"\.dora_scale$": "DoRA under kohya's names, where programs differ about its meaning",
    r"\.lora_B.*bias$|\.lora_bias": "biases",
    r"lora_embedding_[AB]": "factors of an embedding table",
}
# Models whose denoiser is a transformer, not a UNet.
TRANSFORMERS = re.compile(
    r"^(transformer\.|lora_transformer_)|(double|single|joint)_(transformer_)?blocks"
)
# The width of the text states that a UNet attends to.
FAMILIES = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "the refiner of Stable Diffusion XL",
    2048: "Stable Diffusion XL",
}
# Attention layers of the text towers, and their names in old files of diffusers.
ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


class Key(NamedTuple):
    """A tensor's name in a LoRA file, taken apart."""

    component: str | None  # one of COMPONENTS; None where the file is silent
    module: str  # with underscores for points
    part: str  # "down", "up", "mid", "alpha" or "magnitude"
    style: str


def split(name: str) -> Key | None:
    """Takes a tensor's name apart; None if it is none of a LoRA's."""
    name = name.replace(".processor.", ".")
    found = ((part, style, pattern.search(name)) for pattern, part, style in ENDINGS)
    part, style, end = next((one for one in found if one[2]), ("", "", None))
    if end is None:
        return None
    module = name[: end.start()].removeprefix("base_model.model.")
    prefix = next((p for p in PREFIXES if module.startswith(p)), "")
    module = module.removeprefix(prefix).removeprefix("base_model.model.")
    return Key(PREFIXES.get(prefix), module.replace(".", "_"), part, style)


def other_kind(names: Iterable[str]) -> str | None:
    """What a file holds that is no LoRA proper, in words; None if there is nothing known."""
    for pattern, words in OTHER_KINDS.items():
        if any(re.search(pattern, name) for name in names):
            return words
    return None


def parameters(component: str, shapes: Shapes) -> dict[str, str]:
    """The parameter that each possible `Key.module` means, of a component with these shapes."""
    # Linear layers and convolutions: no LoRA changes a norm.
    modules = {
        name.removesuffix(".weight"): name
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4)
    }
    found = {module.replace(".", "_"): name for module, name in modules.items()}
    if component == "unet":
        ours = [module for module in modules if not module.endswith(".cond_proj")]  # of LCM alone
        with contextlib.suppress(JaxsdError):  # a UNet of another kind has no such names
            ldm = unet_names(ours)
            found = {ldm[module].replace(".", "_"): modules[module] for module in ours} | found
    aliases = {
        old.replace(".", "_"): name for module, name in modules.items() for old in _old(module)
    }
    return aliases | found


def _old(module: str) -> list[str]:
    """Other names that a module has had."""
    bare = module.removeprefix("text_model.")  # which transformers >= 5.6 leaves out
    stem, _, last = bare.removesuffix(".0").rpartition(".")
    if last == "to_out":
        return [f"{stem}.to_out"]
    if last in ATTENTION:
        old = f"{stem}.{ATTENTION[last]}"
        return [bare, old, f"text_model.{old}"]
    return [bare]


def kohya_prefixes(layers: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The beginning of kohya's names for each component of a LoRA that changes these layers."""
    first = "lora_te1_" if "text_encoder_2" in layers else "lora_te_"
    return {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}


# --- Families --------------------------------------------------------------------------------


def text_width(shapes: Shapes) -> int | None:
    """The width of the text states that a UNet attends to, of its shapes or a LoRA file's."""
    for name, shape in shapes.items():
        key = split(name)
        module = key.module if key else name.removesuffix(".weight").replace(".", "_")
        down = key is None or key.part == "down"  # both are [_, width, ...]
        if module.endswith("attn2_to_k") and down and len(shape) >= 2:
            return shape[1]
    return None


def family(shapes: Shapes) -> str | None:
    """The family of a UNet or of a LoRA file, in words; None where names and shapes do not tell."""
    if any(TRANSFORMERS.search(name) for name in shapes):
        return "a transformer such as Stable Diffusion 3 or Flux"
    if _second_tower(shapes):
        return FAMILIES[2048]
    width = text_width(shapes)
    return (
        None
        if width is None
        else FAMILIES.get(width, f"a model with text states of {width} channels")
    )


def differ(file: Shapes, model: Mapping[str, Shapes]) -> bool:
    """Whether a LoRA file was made for another family than the model's, by what both tell."""
    width = text_width(file)
    other_width = "unet" in model and width not in (None, text_width(model["unet"]))
    other_towers = _second_tower(file) and "text_encoder_2" not in model
    return other_width or other_towers or any(TRANSFORMERS.search(name) for name in file)


def _second_tower(names: Iterable[str]) -> bool:
    return any(key.component == "text_encoder_2" for name in names if (key := split(name)))


def describe(entries: Mapping[str, Entry]) -> str | None:
    """A line about a LoRA file from its header alone; None if it is none.

    "LoRA, rank 16, Stable Diffusion XL, 722 layers, PEFT names".
    """
    keys = {name: key for name in entries if (key := split(name))}
    downs = [entries[name].shape for name, key in keys.items() if key.part == "down"]
    if not downs or not all(downs):
        return None
    ranks = [shape[0] for shape in downs]
    low, high = min(ranks), max(ranks)
    styles = sorted({key.style for key in keys.values() if key.part == "down"})
    kind = "DoRA" if any(key.part == "magnitude" for key in keys.values()) else "LoRA"
    facts = [
        kind,
        f"rank {low}" if low == high else f"ranks {low} to {high}",
        family({name: entry.shape for name, entry in entries.items()}),
        f"{len(downs)} layers",
        f"{' and '.join(styles)} names",
    ]
    return ", ".join(fact for fact in facts if fact)
