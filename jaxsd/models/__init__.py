"""The networks: UNet, VAE and CLIP, each a file to be read in one sitting."""

from jaxsd.models.clip import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig
from jaxsd.models.unet import UNet, UNetConfig
from jaxsd.models.vae import AutoencoderKL, VAEConfig

__all__ = [
    "AutoencoderKL",
    "CLIPModel",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPVisionConfig",
    "UNet",
    "UNetConfig",
    "VAEConfig",
]
