"""LDM's and OpenCLIP's names: what ours make of diffusers' models, diffusers turns back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils as oracle
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from jaxsd.errors import JaxsdError
from jaxsd.weights import ldm
from jaxsd.weights.entries import Entry, row_major

CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "use_linear_projection": True,
    "cross_attention_dim": 8,
}
REFINER = {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "block_out_channels": (4, 4, 8, 8),
    "transformer_layers_per_block": 4,
}
TINY = {"norm_num_groups": 2, "attention_head_dim": 2}
UNETS = {
    "sd1": CROSS | {"block_out_channels": (4, 8, 8, 8), "cross_attention_dim": 8},
    "inpainting": CROSS
    | {"block_out_channels": (4, 8, 8, 8), "cross_attention_dim": 8, "in_channels": 9},
    "sd2": CROSS
    | {
        "block_out_channels": (4, 8, 8, 8),
        "cross_attention_dim": 16,
        "use_linear_projection": True,
    },
    "sdxl": XL | {"block_out_channels": (4, 8, 8), "transformer_layers_per_block": (1, 2, 3)},
    "refiner": XL | REFINER,
    "one layer": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "cross_attention_dim": 8,
    },
}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("kind", UNETS)
def test_unets(kind):
    model = UNet2DConditionModel(**TINY | UNETS[kind])
    weights = model.state_dict()
    names = ldm.unet_names(weights)
    assert len(set(names.values())) == len(names)
    file = {f"model.diffusion_model.{names[name]}": value for name, value in weights.items()}
    same(oracle.convert_ldm_unet_checkpoint(file, dict(model.config)), weights)
    averages = {ldm.ema_name(name): value for name, value in file.items()}
    blank = {name: torch.zeros(1) for name in file}
    both = oracle.convert_ldm_unet_checkpoint(blank | averages, dict(model.config), True)
    same(both, weights)


def test_names_of_modules_are_those_of_kohya():
    weights = UNet2DConditionModel(**TINY | UNETS["sdxl"]).state_dict()
    modules = {name.rsplit(".", 1)[0] for name in weights}
    names = {other.replace(".", "_"): name for name, other in ldm.unet_names(modules).items()}
    # As in published LoRA files for Stable Diffusion XL.
    assert names["input_blocks_4_1_proj_in"] == "down_blocks.1.attentions.0.proj_in"
    assert names["input_blocks_8_1_transformer_blocks_2_attn2_to_k"] == (
        "down_blocks.2.attentions.1.transformer_blocks.2.attn2.to_k"
    )
    assert names["middle_block_1_transformer_blocks_0_ff_net_0_proj"] == (
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    )
    assert names["output_blocks_2_2_conv"] == "up_blocks.0.upsamplers.0.conv"
    assert names["output_blocks_5_1_transformer_blocks_1_attn1_to_out_0"] == (
        "up_blocks.1.attentions.2.transformer_blocks.1.attn1.to_out.0"
    )
    assert names["input_blocks_3_0_op"] == "down_blocks.0.downsamplers.0.conv"
    assert names["output_blocks_8_0_emb_layers_1"] == "up_blocks.2.resnets.2.time_emb_proj"
    assert names["label_emb_0_2"] == "add_embedding.linear_2"


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_controlnets(kind):
    config = {k: v for k, v in UNETS[kind].items() if k != "up_block_types"}
    model = ControlNetModel(**TINY | config, conditioning_embedding_out_channels=(2, 4, 6, 8))
    weights = model.state_dict()
    names = ldm.unet_names(weights)
    file = {f"control_model.{names[name]}": value for name, value in weights.items()}
    assert "control_model.input_hint_block.14.weight" in file
    theirs = oracle.convert_controlnet_checkpoint(file, dict(model.config))
    ours = {n: v for n, v in weights.items() if not n.startswith("add_embedding")}  # not theirs
    same(ours, {name: theirs[name] for name in ours})


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_vae(depth):
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=(4, 8, 8, 8)[:depth],
        norm_num_groups=2,
        layers_per_block=2,
    )
    weights = model.state_dict()
    names = ldm.vae_names(weights)
    assert len(set(names.values())) == len(names)
    file = {
        f"first_stage_model.{other}": torch.tensor(ldm.stored(other, {name: weights[name].numpy()}))
        for name, other in names.items()
    }
    assert file["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    same(oracle.convert_ldm_vae_checkpoint(file, dict(model.config)), weights)


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_open_clip(kind):
    model = kind(
        CLIPTextConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=8,
            max_position_embeddings=7,
        )
    )
    weights = model.state_dict()
    names = ldm.open_clip_names(weights)
    held = {
        other: {name: weights[name].numpy() for name in names if names[name] == other}
        for other in names.values()
    }
    file = {other: ldm.stored(other, arrays) for other, arrays in held.items()}
    assert file["transformer.resblocks.2.attn.in_proj_weight"].shape == (24, 8)
    theirs = oracle.convert_open_clip_checkpoint(
        model, {f"p.{name}": torch.tensor(value) for name, value in file.items()}, prefix="p."
    )
    bare = {n.removeprefix("text_model."): value for n, value in weights.items()}
    same(bare, {n.removeprefix("text_model."): value for n, value in theirs.items()})
    # and back, without a copy
    for name, other in names.items():
        bytes_ = np.ascontiguousarray(file[other]).view(np.uint8).reshape(-1)
        shape = file[other].shape
        whole = Entry(Path("file"), "F32", shape, 0, row_major(shape, 4))
        entry = ldm.view(whole, name, other)
        ours = np.ndarray(entry.shape, np.float32, bytes_.data, entry.offset, entry.strides)
        np.testing.assert_array_equal(ours, weights[name].numpy())


def test_other_networks_have_no_such_names():
    model = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8),
        **TINY,
    )
    with pytest.raises(JaxsdError, match="down_blocks.1.attentions.0.group_norm.* no name in the"):
        ldm.unet_names(model.state_dict())
    with pytest.raises(JaxsdError, match="no name"):
        ldm.vae_names(["encoder.layers.0.weight"])
