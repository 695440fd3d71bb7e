"""Names, shapes and counts of the published configurations equal torch's (no weights made)."""

import dataclasses
import math

import pytest
import torch
import transformers
from diffusers import AutoencoderKL as TorchVAE
from diffusers import AutoencoderTiny as TorchTinyVAE
from diffusers import ControlNetModel, UNet2DModel
from diffusers import UNet2DConditionModel as TorchUNet
from torch_reference import names_and_shapes

from jaxsd.components import COMPONENTS
from jaxsd.errors import JaxsdError
from jaxsd.families import get_family
from jaxsd.models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPModel,
    CLIPTextConfig,
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
from jaxsd.nn import Net

# The config.json files of Stable Diffusion 1.5.
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
# Stable Diffusion 2.1
UNET2 = {
    **UNET,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
TEXT2 = {
    **TEXT,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
# A class-conditional network over pixels, in plain and self-attention blocks.
PIXELS = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64, 128, 128],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 32,
    "class_embed_type": "simple_projection",
    "projection_class_embeddings_input_dim": 10,
}
# Stable Diffusion XL
UNET_XL = {
    **UNET2,
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
}
TEXT_XL = {
    **TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
# google/ddpm-cifar10-32
CIFAR = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CONTROLNET = {
    **{k: v for k, v in UNET.items() if k not in ("sample_size", "out_channels")},
    "_class_name": "ControlNetModel",
    "class_embed_type": None,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}
CONTROLNET.pop("center_input_sample")
CONTROLNET.pop("up_block_types")
TAESD = {
    "_class_name": "AutoencoderTiny",
    "act_fn": "relu",
    "block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}
# Of the published weights
UNET_SIZES = {
    "sd1": 859_520_964,
    "sd1-inpaint": 859_535_364,
    "instruct-pix2pix": 859_532_484,
    "sd1-lcm": 859_602_884,
    "sd2": 865_910_724,
    "sd2-inpaint": 865_925_124,
    "sdxl": 2_567_463_684,
    "sdxl-inpaint": 2_567_478_084,
    "sdxl-refiner": 2_259_526_660,
}
CLIP_SIZES = {"B/32": (512, 8, 768, 12, 32, 512), "L/14": (768, 12, 1024, 16, 14, 768)}


def torch_model(cls, config):
    with torch.device("meta"):
        return cls.from_config(config)


def torch_text(config):
    kind = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        return kind(transformers.CLIPTextConfig.from_dict(dict(config)))


@pytest.mark.parametrize(
    "ours, config_class, theirs, config, size",
    [
        (UNet, UNetConfig, TorchUNet, UNET, 859_520_964),
        (UNet, UNetConfig, TorchUNet, UNET2, 865_910_724),
        (UNet, UNetConfig, TorchUNet, UNET_XL, 2_567_463_684),
        (UNet, UNetConfig, TorchUNet, PIXELS, None),
        (AutoencoderKL, VAEConfig, TorchVAE, VAE, 83_653_863),
        (UNet, UNet2DConfig, UNet2DModel, CIFAR, 35_746_307),
        (ControlNet, ControlNetConfig, ControlNetModel, CONTROLNET, 361_279_120),
        (AutoencoderTiny, TinyVAEConfig, TorchTinyVAE, TAESD, 2_445_063),
    ],
    ids=["unet", "of 2.1", "of XL", "with classes", "vae", "cifar10", "controlnet", "taesd"],
)
def test_diffusers_models(ours, config_class, theirs, config, size):
    expected = torch_model(theirs, config)
    ours_config = config_class.from_json(config)
    net = Net(ours(ours_config))
    assert net.shapes == names_and_shapes(expected)
    assert size is None or net.size == size

    # What we write, diffusers opens as the same model; what it writes in full, we read.
    written = ours_config.to_json()
    assert names_and_shapes(torch_model(theirs, written)) == net.shapes
    assert config_class.from_json(written) == ours_config
    in_full = {k: list(v) if isinstance(v, tuple) else v for k, v in expected.config.items()}
    assert config_class.from_json(in_full) == ours_config


def test_bundled_families():
    """The configs that come with the package are those of the files."""
    assert get_family("sd1").unet == UNetConfig.from_json(UNET)
    published = UNetConfig.from_json({**UNET2, "upcast_attention": False})
    assert get_family("sd2-v").unet == published
    assert get_family("sd2").unet == dataclasses.replace(published, sample_size=64)
    legacy = {"eos_token_id": 49407}  # the files say 2, which means the highest id
    assert get_family("sd2").text_encoder == CLIPTextConfig.from_json(TEXT2 | legacy)
    assert get_family("sd1").text_encoder == CLIPTextConfig.from_json(TEXT | legacy)
    assert get_family("sd1").vae == VAEConfig.from_json(VAE)
    published = UNetConfig.from_json({**UNET_XL, "upcast_attention": False})
    assert get_family("sdxl").unet == published
    big = CLIPTextProjectionConfig.from_json(TEXT_XL | legacy)
    assert get_family("sdxl").text_encoder_2 == get_family("sdxl-refiner").text_encoder_2 == big


def test_bundled_extras():
    """What goes beside a pipeline, and the model without one."""
    assert get_family("ddpm-cifar10").unet == UNet2DConfig.from_json(CIFAR)
    assert get_family("sd1").controlnet == ControlNetConfig.from_json(CONTROLNET)
    assert get_family("sdxl").tiny_vae == TinyVAEConfig.from_json(TAESD)
    for name, size in (("sd1", 361_279_120), ("sd2", 364_228_240), ("sdxl", 1_251_014_160)):
        config = get_family(name).controlnet
        net = Net(ControlNet(config))
        assert net.shapes == names_and_shapes(torch_model(ControlNetModel, config.to_json()))
        assert net.size == size
        assert get_family(f"{name}-inpaint").controlnet == config


@pytest.mark.parametrize("name", UNET_SIZES)
def test_unets_of_the_families(name):
    config = get_family(name).unet
    net = Net(UNet(config))
    assert net.size == UNET_SIZES[name]
    assert net.shapes == names_and_shapes(torch_model(TorchUNet, config.to_json()))
    assert UNetConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "values, kind, size",
    [
        (TEXT, "CLIPTextModel", 123_060_480),
        (TEXT2, "CLIPTextModel", 340_387_840),
        (TEXT_XL, "CLIPTextModelWithProjection", 694_659_840),
    ],
)
def test_text_tower(values, kind, size):
    config_class, module = COMPONENTS["text_encoder_2"][kind]
    config = config_class.from_json(values)
    net = Net(module(config))
    assert net.size == size
    # transformers leaves out this prefix since 5.6, but for the tower with a projection; files from
    # before, and ours, have it.
    prefix = "" if module is CLIPTextModelWithProjection else "text_model."
    for written in (values, config.to_json()):
        assert names_and_shapes(torch_text(written), prefix) == net.shapes
    assert config_class.from_json(config.to_json()) == config
    assert config_class.from_json(torch_text(values).config.to_dict()) == config


@pytest.mark.parametrize("name, size", [("B/32", 151_277_313), ("L/14", 427_616_513)])
def test_both_towers(name, size):
    text_width, text_heads, width, heads, patch, projection = CLIP_SIZES[name]
    text = CLIPTextConfig(
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_attention_heads=text_heads,
        projection_dim=projection,
    )
    layers = 12 if name == "B/32" else 24
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
        projection_dim=projection,
    )
    reference = transformers.CLIPConfig(
        text_config=text.to_json(), vision_config=vision.to_json(), projection_dim=projection
    )
    with torch.device("meta"):
        expected = transformers.CLIPModel(reference)
    net = Net(CLIPModel(text, vision))
    assert net.shapes == names_and_shapes(expected)
    assert net.size == size == sum(map(math.prod, net.shapes.values()))


@pytest.mark.parametrize(
    "config_class, config, change",
    [
        (UNetConfig, UNET, {"time_embedding_dim": 256}),
        (UNetConfig, UNET, {"transformer_layers_per_block": [1, 2]}),
        (UNetConfig, UNET, {"addition_embed_type": "image"}),
        (UNetConfig, UNET, {"addition_embed_type": "text_time"}),
        (UNetConfig, UNET, {"attention_head_dim": [5, 10]}),
        (UNetConfig, UNET, {"layers_per_block": [1, 2, 2, 2]}),
        (UNetConfig, UNET, {"option_of_tomorrow": 3}),
        (UNetConfig, UNET, {"class_embed_type": "projection"}),
        (UNetConfig, UNET, {"class_embed_type": "of_tomorrow"}),
        (UNet2DConfig, CIFAR, {"resnet_time_scale_shift": "scale_shift"}),
        (UNet2DConfig, CIFAR, {"mid_block_type": "UNetMidBlock2DCrossAttn"}),
        (UNet2DConfig, CIFAR, {"class_embed_type": "projection"}),
        (ControlNetConfig, CONTROLNET, {"controlnet_conditioning_channel_order": "hsv"}),
        (ControlNetConfig, CONTROLNET, {"mid_block_type": None}),
        (ControlNetConfig, CONTROLNET, {"class_embed_type": "simple_projection"}),
        (TinyVAEConfig, TAESD, {"encoder_block_out_channels": [64, 64, 64, 32]}),
        (TinyVAEConfig, TAESD, {"act_fn": "silu"}),
        (VAEConfig, VAE, {"use_quant_conv": False}),
        (VAEConfig, VAE, {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}),
        (CLIPTextConfig, TEXT, {"hidden_act": "relu"}),
    ],
)
def test_an_unsupported_option_is_refused(config_class, config, change):
    with pytest.raises(JaxsdError, match=next(iter(change))) as error:
        config_class.from_json({**config, **change}, where="here/config.json")
    assert str(error.value).startswith("here/config.json: ") and "\n" not in str(error.value)


def test_all_unsupported_options_are_listed_at_once():
    with pytest.raises(JaxsdError, match="time_embedding_dim.*encoder_hid_dim"):
        UNetConfig.from_json({**UNET, "time_embedding_dim": 256, "encoder_hid_dim": 7})
    with pytest.raises(JaxsdError, match="sample_size"):
        UNetConfig.from_json({k: v for k, v in UNET.items() if k != "sample_size"})
    with pytest.raises(JaxsdError, match="ResnetDownsampleBlock2D"):
        UNetConfig.from_json({**UNET, "down_block_types": ["ResnetDownsampleBlock2D"] * 4})
