"""The names that CompVis (LDM) and OpenCLIP gave to the weights, from diffusers' names, by rule.

A single-file checkpoint has these names, and so have kohya's LoRA files for Stable Diffusion XL
(with underscores for dots). Each table is made from the names that a network has, so it holds for
every depth and width; it says as much of modules as of parameters:

unet_names(net.shapes)["down_blocks.0.resnets.1.conv1.bias"] == "input_blocks.2.0.in_layers.2.bias"
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.weights.entries import Entry

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TRANSFORMER = {name: name for name in ("norm", "proj_in", "transformer_blocks", "proj_out")}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {
    "conv_shortcut": "nin_shortcut"
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
VAE_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
# Of a UNet, and of a ControlNet's copy of one.
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
}
OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{
        f"self_attn.{x}_proj.{kind}": f"attn.in_proj_{kind}"
        for x in "qkv"
        for kind in ("weight", "bias")
    },
}
PARTS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}  # of an in_proj, in rows


# --- Names -----------------------------------------------------------------------------------


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """LDM's name of every parameter (or module) of a UNet or a ControlNet.

    names: all that the network has, because LDM counts the layers from end to end. JaxsdError for a
    name that a UNet of the LDM kind does not have.
    """
    names = list(names)
    parts = [name.split(".") for name in names]
    first = ["down_blocks", "0", "resnets"]
    layers = 1 + max((int(p[3]) for p in parts if p[:3] == first), default=0)
    attended = {p[1] for p in parts if p[0] == "up_blocks" and p[2:3] == ["attentions"]}
    hints = len({p[2] for p in parts if p[:2] == ["controlnet_cond_embedding", "blocks"]})

    def rename(name: str) -> str | None:
        match name.split("."):
            case ["down_blocks", block, kind, i, *rest]:
                first = 1 + int(block) * (layers + 1)
                if kind == "downsamplers":
                    return _join(f"input_blocks.{first + layers}.0", rest, {"conv": "op"})
                return _layer(f"input_blocks.{first + int(i)}", kind, rest)
            case ["up_blocks", block, kind, i, *rest]:
                first = int(block) * (layers + 1)
                if kind == "upsamplers":
                    place = 2 if block in attended else 1
                    return _join(f"output_blocks.{first + layers}.{place}", rest, {"conv": "conv"})
                return _layer(f"output_blocks.{first + int(i)}", kind, rest)
            case ["mid_block", kind, i, *rest]:
                place = UNET_ENDS.get(f"mid_block.{kind}.{i}")
                return place and _join(place, rest, RESNET if kind == "resnets" else TRANSFORMER)
            case ["controlnet_down_blocks", i, *rest]:
                return ".".join([f"zero_convs.{i}.0", *rest])
            case ["controlnet_cond_embedding", "blocks", i, *rest]:
                return ".".join([f"input_hint_block.{2 + 2 * int(i)}", *rest])
            case ["controlnet_cond_embedding", "conv_out", *rest]:
                return ".".join([f"input_hint_block.{2 + 2 * hints}", *rest])
            case whole:
                return _join("", whole, UNET_ENDS)

    return _table(names, rename)


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """LDM's name of every parameter of an AutoencoderKL; its decoder counts from the picture."""
    names = list(names)
    last = max(
        (int(n.split(".")[2]) for n in names if n.startswith("decoder.up_blocks.")), default=0
    )

    def rename(name: str) -> str | None:
        match name.split("."):
            case ["quant_conv" | "post_quant_conv", *_]:
                return name
            case [coder, "down_blocks", block, kind, i, *rest]:
                place = f"{coder}.down.{block}"
                if kind == "downsamplers":
                    return _join(f"{place}.downsample", rest, {"conv": "conv"})
                return _join(f"{place}.block.{i}", rest, VAE_RESNET)
            case [coder, "up_blocks", block, kind, i, *rest]:
                place = f"{coder}.up.{last - int(block)}"
                if kind == "upsamplers":
                    return _join(f"{place}.upsample", rest, {"conv": "conv"})
                return _join(f"{place}.block.{i}", rest, VAE_RESNET)
            case [coder, "mid_block", "resnets", i, *rest]:
                return _join(f"{coder}.mid.block_{1 + int(i)}", rest, VAE_RESNET)
            case [coder, "mid_block", "attentions", "0", *rest]:
                return _join(f"{coder}.mid.attn_1", rest, VAE_ATTENTION)
            case [coder, *rest]:
                return _join(coder, rest, VAE_ENDS)

    return _table(names, rename)


def open_clip_names(names: Iterable[str]) -> dict[str, str]:
    """OpenCLIP's name of every parameter of a text tower; q, k and v share one (`part`)."""

    def rename(name: str) -> str | None:
        match name.removeprefix("text_model.").split("."):
            case ["encoder", "layers", i, *rest]:
                return _join(f"transformer.resblocks.{i}", rest, OPEN_CLIP_LAYER)
            case rest:
                return _join("", rest, OPEN_CLIP)

    return _table(names, rename)


def ema_name(name: str) -> str:
    """The name of a weight's moving average, of its own name, `model.diffusion_model....`."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def _table(names: Iterable[str], rename: Callable[[str], str | None]) -> dict[str, str]:
    table = {name: rename(name) for name in names}
    if alien := [name for name, other in table.items() if not other]:
        raise JaxsdError(f"{alien[0]} has no name in the LDM format")
    return {name: str(other) for name, other in table.items()}


def _layer(place: str, kind: str, rest: list[str]) -> str | None:
    if kind == "resnets":
        return _join(f"{place}.0", rest, RESNET)
    return _join(f"{place}.1", rest, TRANSFORMER) if kind == "attentions" else None


def _join(place: str, rest: list[str], names: Mapping[str, str]) -> str | None:
    """`place` and the rest of a name, whose beginning is renamed; None if it is not in `names`."""
    if not rest:
        return place or None
    for count in range(1, len(rest) + 1):
        if (renamed := names.get(".".join(rest[:count]))) is not None:
            return ".".join([place] * bool(place) + [renamed, *rest[count:]])
    return None


# --- Arrays ----------------------------------------------------------------------------------


def view(entry: Entry, name: str, other: str) -> Entry:
    """Of a file's tensor `other`, the bytes that are diffusers' `name`, in diffusers' layout.

    A third of OpenCLIP's in_proj, its text_projection transposed, or the whole as it is.
    """
    shape, strides = entry.shape, entry.strides
    kind = other.rsplit(".", 1)[-1]
    if kind in ("in_proj_weight", "in_proj_bias") and shape and shape[0] % 3 == 0:
        rows = shape[0] // 3
        start = entry.offset + PARTS[name.split(".")[-2]] * rows * strides[0]
        return entry._replace(shape=(rows, *shape[1:]), offset=start)
    if kind == "text_projection":
        return entry._replace(shape=shape[::-1], strides=strides[::-1])
    return entry


def stored(other: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The tensor `other` of a single file, of the arrays (by diffusers' names) that it holds."""
    if "in_proj_" in other:
        order = sorted(arrays, key=lambda name: PARTS[name.split(".")[-2]])
        return np.concatenate([arrays[name] for name in order])
    (array,) = arrays.values()
    if other.endswith("text_projection"):
        return array.T
    if ".mid.attn_1." in other and array.ndim == 2:  # LDM's VAE has 1x1 convolutions there
        return array[:, :, None, None]
    return array
