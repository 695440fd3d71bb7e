"""Tiny UNets with random weights against diffusers', float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers import UNet2DModel
from diffusers.pipelines.latent_consistency_models import pipeline_latent_consistency_text2img
from torch_reference import nchw, nhwc, normal, randomise, relative_error, to_params

from jaxsd.models import UNet, UNet2DConfig, UNetConfig, guidance_scale_embedding
from jaxsd.nn import Net

LATENTS = UNetConfig(
    sample_size=32,
    block_out_channels=(4, 8),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=8,
    attention_head_dim=2,
    norm_num_groups=2,
)
PIXELS = UNetConfig(
    sample_size=32,
    in_channels=3,
    out_channels=3,
    block_out_channels=(8, 16, 16),
    layers_per_block=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    mid_block_type="UNetMidBlock2D",
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
    norm_num_groups=4,
    class_embed_type="simple_projection",
    projection_class_embeddings_input_dim=10,
)
XL = UNetConfig(
    sample_size=32,
    block_out_channels=(2, 4),
    layers_per_block=2,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2),
    attention_head_dim=(2, 4),
    cross_attention_dim=64,
    use_linear_projection=True,
    norm_num_groups=1,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=80,
)
REFINER = dataclasses.replace(
    XL,
    block_out_channels=(2, 4, 4, 4),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    transformer_layers_per_block=3,
    attention_head_dim=(1, 2, 4, 4),
    projection_class_embeddings_input_dim=72,
)


# As google/ddpm-cifar10-32: one head, padding on two sides only, sin before cos
DDPM = UNet2DConfig(
    sample_size=32,
    block_out_channels=(8, 16, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    norm_num_groups=4,
    norm_eps=1e-6,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
)


def class_labels(config, batch):
    """What `class_embed_type` takes, a row of zeros ("no class") among it."""
    kind = config.class_embed_type
    if kind is None:
        return None if config.num_class_embeds is None else np.arange(batch, dtype=np.int32)[::-1]
    if kind == "timestep":
        return np.linspace(0.5, 900, batch, dtype=np.float32)
    width = {"identity": 4 * config.block_out_channels[0]}
    labels = normal(batch, width.get(kind, config.projection_class_embeddings_input_dim))
    labels[-1] = 0
    return labels


def conditions(config, batch):
    """Random values of everything that a network of this config is told besides the time."""
    found = {"class_labels": class_labels(config, batch)}
    if config.text_conditional:
        found["encoder_hidden_states"] = normal(batch, 77, config.cross_attention_dim)
    if config.addition_embed_type:
        count = (
            config.projection_class_embeddings_input_dim - 32
        ) // config.addition_time_embed_dim
        found["text_embeds"] = normal(batch, 32)
        ids = np.random.default_rng(1).integers(0, 1100, (batch, count))
        found["time_ids"] = ids.astype(np.float32)
    if config.time_cond_proj_dim is not None:
        found["timestep_cond"] = normal(batch, config.time_cond_proj_dim)
    return {name: value for name, value in found.items() if value is not None}


def for_torch(inputs):
    """The same conditions as diffusers' keywords."""
    theirs = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in inputs.items()}
    added = {k: theirs.pop(k) for k in ("text_embeds", "time_ids") if k in theirs}
    return {"encoder_hidden_states": None, **theirs, "added_cond_kwargs": added}


def unet_error(config, size, times, seed=0):
    """The network under `jit` against diffusers', for one picture per timestep."""
    torch.manual_seed(seed)
    kind = UNet2DModel if isinstance(config, UNet2DConfig) else TorchUNet
    module = randomise(kind.from_config(config.to_json()), seed)
    net = Net(UNet(config))
    params = to_params(module, net)
    x, t = normal(len(times), *size, config.in_channels), np.array(times, np.float32)
    inputs = conditions(config, len(times))
    theirs = for_torch(inputs)
    if kind is UNet2DModel:
        theirs = {"class_labels": theirs.get("class_labels")}
    with torch.no_grad():
        expected = module(nchw(x), torch.from_numpy(t), **theirs).sample
    ours = jax.jit(net.__call__)(params, jnp.asarray(x), jnp.asarray(t), **inputs)
    return relative_error(ours, nhwc(expected))


@pytest.mark.parametrize("size", [(32, 32), (15, 18), (7, 9), (1, 1)])
def test_unet_with_text(size, report):
    report(unet_error(LATENTS, size, [0.0, 1.0, 500.0, 999.0]))


@pytest.mark.slow
def test_unet_with_odd_sizes_all_the_way_down(report):
    config = dataclasses.replace(
        LATENTS,
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
    )
    report(unet_error(config, (21, 13), [10.0]))


# (10, 14) halves to 5 x 7, an odd size that diffusers' AttnUpBlock2D need not itself come back to.
@pytest.mark.parametrize("size", [(32, 32), (10, 14)])
def test_unet_with_classes(size, report):
    report(unet_error(PIXELS, size, [0.0, 3.0, 999.0]))


def test_a_missing_condition_is_an_error():
    for config, missing in (
        (LATENTS, "encoder_hidden_states"),
        (PIXELS, "class_labels"),
        (XL, "text_embeds"),
        (XL, "time_ids"),
    ):
        net = Net(UNet(config))
        params = {n: jnp.asarray(np.zeros(s, np.float32)) for n, s in net.shapes.items()}
        told = {k: jnp.asarray(v) for k, v in conditions(config, 1).items() if k != missing}
        with pytest.raises(ValueError, match=missing):
            net(params, jnp.zeros((1, 8, 8, config.in_channels)), jnp.zeros(1), **told)


def test_unet_without_a_middle(report):
    report(unet_error(dataclasses.replace(PIXELS, mid_block_type=None), (8, 8), [7.0]))


def test_fractional_timesteps(report):
    report(unet_error(LATENTS, (16, 16), [0.5, 123.4567, 998.001]))
    report(unet_error(PIXELS, (16, 16), [0.5, 123.4567, 998.001]))


@pytest.mark.slow
def test_other_heads_and_constants(report):
    report(unet_error(dataclasses.replace(LATENTS, attention_head_dim=1), (8, 8), [7.0]))
    report(unet_error(dataclasses.replace(PIXELS, attention_head_dim=4), (8, 8), [7.0]))
    report(unet_error(dataclasses.replace(PIXELS, downsample_padding=0), (8, 8), [7.0]))
    report(
        unet_error(
            dataclasses.replace(LATENTS, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-3),
            (8, 8),
            [7.0],
        )
    )


def test_xl(report):
    report(unet_error(XL, (16, 16), [0.5, 999.0]))


@pytest.mark.slow
def test_refiner_with_odd_sizes(report):
    report(unet_error(REFINER, (13, 10), [12.0, 981.25]))


def test_a_network_told_its_guidance_scale(report):
    report(unet_error(dataclasses.replace(LATENTS, time_cond_proj_dim=256), (9, 8), [7.0, 500.5]))


@pytest.mark.parametrize("embed", [None, "timestep", "identity", "projection"])
def test_ways_to_give_a_class(embed, report):
    kinds = {"class_embed_type": embed, "num_class_embeds": None if embed else 5}
    report(unet_error(dataclasses.replace(PIXELS, **kinds), (8, 12), [0.0, 3.5, 999.0]))


def test_ddpm(report):
    report(unet_error(DDPM, (8, 12), [0.0, 3.25, 999.0]))


@pytest.mark.parametrize(
    "change",
    [
        {"num_class_embeds": 4, "center_input_sample": True},
        {"class_embed_type": "timestep", "attn_norm_num_groups": 8, "attention_head_dim": 8},
        {"class_embed_type": "identity", "add_attention": False, "downsample_padding": 1},
        {"mid_block_type": None},
    ],
)
def test_ddpm_with_other_options(change, report):
    config = dataclasses.replace(DDPM, **change)
    report(unet_error(config, (8, 8), [3.25, 999.0]))


@pytest.mark.parametrize("only", [True, (False, True)])
def test_attention_to_the_text_only(only, report):
    config = dataclasses.replace(LATENTS, only_cross_attention=only, attention_head_dim=(1, 4))
    report(unet_error(config, (8, 8), [7.0, 8.0]))


def test_more_channels_in(report):
    for channels in (8, 9):  # InstructPix2Pix, inpainting
        report(unet_error(dataclasses.replace(LATENTS, in_channels=channels), (8, 9), [7.0, 8.0]))


def test_residuals_of_a_controlnet(report):
    module = randomise(TorchUNet.from_config(LATENTS.to_json()))
    net = Net(UNet(LATENTS))
    params, x, t = to_params(module, net), normal(2, 8, 8, 4), np.array([3, 700], np.float32)
    sizes = [(8, 4), (8, 4), (4, 4), (4, 8)]
    down, mid = [normal(2, side, side, c) for side, c in sizes], normal(2, 4, 4, 8)
    inputs = conditions(LATENTS, 2)
    with torch.no_grad():
        expected = module(
            nchw(x),
            torch.from_numpy(t),
            **for_torch(inputs),
            down_block_additional_residuals=tuple(map(nchw, down)),
            mid_block_additional_residual=nchw(mid),
        ).sample
    residuals = {
        "down_block_residuals": tuple(map(jnp.asarray, down)),
        "mid_block_residual": jnp.asarray(mid),
    }
    predict = jax.jit(net.__call__)
    report(relative_error(predict(params, x, t, **inputs, **residuals), nhwc(expected)))
    residuals["down_block_residuals"] = residuals["down_block_residuals"][1:]
    with pytest.raises(ValueError, match="3 residuals for 4 skips"):
        predict(params, x, t, **inputs, **residuals)


def test_bfloat16():
    # Heads of one channel each abort XLA's CPU backend (jaxlib 0.10.2), so not XL's four.
    net = Net(UNet(dataclasses.replace(XL, attention_head_dim=2)))
    params = {n: jnp.asarray(0.1 * normal(*s), jnp.bfloat16) for n, s in net.shapes.items()}
    inputs = {k: jnp.asarray(v) for k, v in conditions(XL, 2).items()}
    inputs |= {k: v.astype(jnp.bfloat16) for k, v in inputs.items() if k != "time_ids"}
    x = jnp.asarray(normal(2, 8, 8, 4), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention needs it
        out = jax.jit(net.__call__)(params, x, jnp.array([1.0, 999.5]), **inputs)
    assert out.dtype == jnp.bfloat16 and np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize("channels", [256, 7])
def test_guidance_scale_embedding(channels):
    w = np.array([0, 0.5, 6.5, 13], np.float32)
    pipeline = pipeline_latent_consistency_text2img.LatentConsistencyModelPipeline
    expected = pipeline.get_guidance_scale_embedding(None, torch.from_numpy(w), channels).numpy()
    ours = np.asarray(guidance_scale_embedding(jnp.asarray(w), channels))
    # sin(13000 f) in float32: half a unit in the last place of the angle is already 5e-4.
    assert ours.shape == expected.shape and np.abs(ours - expected).max() <= 2e-3
