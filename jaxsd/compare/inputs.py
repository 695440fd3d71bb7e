"""What each network is fed, here and in PyTorch: a table by config.

Pictures are NHWC float32 here; `reference` turns them around for PyTorch and hands ids over as
integers. Values are drawn from one seed, so that a comparison can be repeated.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxsd.compare.plan import Size
from jaxsd.models import (
    CLIPTextConfig,
    CLIPTextProjectionConfig,
    ControlNetConfig,
    TinyVAEConfig,
    UNet2DConfig,
    UNetConfig,
    VAEConfig,
)

Inputs = dict[str, np.ndarray]
TIMESTEP = 501  # whole: PyTorch's networks are given whole ones, and not in half precision


@dataclasses.dataclass(frozen=True)
class Fed:
    """A row of FED: makes the inputs, and calls a module of ours and one of PyTorch with them."""

    inputs: Callable[[Any, Size], Inputs]  # (config, size)
    ours: Callable[[Any, Mapping[str, Any]], Any]
    theirs: Callable[[Any, Mapping[str, Any]], Any]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _unet_inputs(config: Any, size: Size) -> Inputs:
    """For a UNet of either class, or a ControlNet: what its config asks for."""
    inputs = {
        "sample": normal(1, *size.latents, config.in_channels),
        "timestep": np.array([TIMESTEP], np.int32),
    }
    if config.text_conditional:
        inputs["encoder_hidden_states"] = normal(1, 77, config.cross_attention_dim)
    if config.class_conditional:
        inputs["class_labels"] = _class_labels(config)
    if getattr(config, "addition_embed_type", None) == "text_time":
        ids = np.array([[*size.pixels, 0, 0, *size.pixels]], np.int32)
        # The refiner has five ids: to the network they and the text are one row of numbers.
        numbers = ids.size * config.addition_time_embed_dim
        text = config.projection_class_embeddings_input_dim - numbers
        inputs |= {"text_embeds": normal(1, text), "time_ids": ids}
    if guidance := getattr(config, "time_cond_proj_dim", None):
        inputs["timestep_cond"] = normal(1, guidance)
    if isinstance(config, ControlNetConfig):
        picture = np.random.default_rng(1).uniform(
            size=(1, *size.pixels, config.conditioning_channels)
        )
        inputs["controlnet_cond"] = picture.astype(np.float32)
    return inputs


def _class_labels(config: Any) -> np.ndarray:
    """Class 1, or what stands for a class."""
    if config.class_embed_type in (None, "timestep"):
        return np.array([1], np.int32)
    if config.class_embed_type == "identity":
        return normal(1, 4 * config.block_out_channels[0])
    return np.eye(1, config.projection_class_embeddings_input_dim, 1, dtype=np.float32)


def _call_their_unet(module: Any, inputs: Mapping[str, Any]) -> None:
    added = {k: v for k, v in inputs.items() if k in ("text_embeds", "time_ids")}
    given = {k: v for k, v in inputs.items() if k not in added}
    # diffusers insists on text, which a network without cross-attention does not read.
    module(**{"encoder_hidden_states": None} | given, added_cond_kwargs=added)


def _vae_inputs(config: Any, size: Size) -> Inputs:
    return {
        "pictures": normal(1, *size.pixels, config.in_channels),
        "latents": normal(1, *size.latents, config.latent_channels),
    }


def _call_vae(module: Any, inputs: Mapping[str, Any]) -> None:
    module.encode(inputs["pictures"])
    module.decode(inputs["latents"])


def _text_inputs(config: Any, size: Size) -> Inputs:
    """A prompt of half the tower's length, ended and filled up with the end token."""
    length = config.max_position_embeddings
    # Old configs say 2 and mean the highest id.
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    ids = np.random.default_rng(0).integers(0, end, (1, length), np.int32)
    ids[:, length // 2 :] = end
    return {"input_ids": ids}


def _call(module: Any, inputs: Mapping[str, Any]) -> None:
    module(**inputs)


FED: dict[type, Fed] = {
    UNetConfig: Fed(_unet_inputs, _call, _call_their_unet),
    ControlNetConfig: Fed(_unet_inputs, _call, _call_their_unet),
    UNet2DConfig: Fed(_unet_inputs, _call, _call),
    VAEConfig: Fed(_vae_inputs, _call_vae, _call_vae),
    TinyVAEConfig: Fed(_vae_inputs, _call_vae, _call_vae),
    CLIPTextConfig: Fed(_text_inputs, _call, _call),
    # Ours projects only for those who ask.
    CLIPTextProjectionConfig: Fed(
        _text_inputs, lambda module, inputs: module.penultimate(**inputs), _call
    ),
}
