"""The networks: UNet, ControlNet, VAEs and CLIP, each a file to be read in one sitting."""

from jaxsd.models.clip import (
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTextProjectionConfig,
    CLIPVisionConfig,
)
from jaxsd.models.controlnet import ControlNet
from jaxsd.models.embeddings import guidance_scale_embedding
from jaxsd.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from jaxsd.models.unet import UNet, branches, class_input, deep_shape
from jaxsd.models.unet_config import ControlNetConfig, UNet2DConfig, UNetConfig
from jaxsd.models.vae import AutoencoderKL, VAEConfig

__all__ = [
    "AutoencoderKL",
    "AutoencoderTiny",
    "CLIPModel",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTextProjectionConfig",
    "CLIPVisionConfig",
    "ControlNet",
    "ControlNetConfig",
    "TinyVAEConfig",
    "UNet",
    "UNet2DConfig",
    "UNetConfig",
    "VAEConfig",
    "branches",
    "class_input",
    "deep_shape",
    "guidance_scale_embedding",
]
