"""Tiny models with random weights against diffusers and transformers, float32.

The bound is the 1e-4 that full-size models are held to; the errors seen are near 1e-6.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL as TorchVAE
from diffusers import UNet2DConditionModel as TorchUNet
from torch_reference import nchw, nhwc, randomise, relative_error, to_params

from jaxsd.models import (
    AutoencoderKL,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)
from jaxsd.nn import Net

TOLERANCE = 1e-5
rng = np.random.default_rng(0)

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
VAE = VAEConfig(
    sample_size=32,
    block_out_channels=(4, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=2,
)
TEXT = CLIPTextConfig(
    vocab_size=1000,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=6,
    eos_token_id=999,
)
VISION = CLIPVisionConfig(
    hidden_size=12,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=30,
    patch_size=10,
    projection_dim=6,
)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


def unet_error(config, size, times, seed=0):
    """The network under `jit` against diffusers', for one picture per timestep."""
    torch.manual_seed(seed)
    module = randomise(TorchUNet.from_config(config.to_json()), seed)
    net = Net(UNet(config))
    params = to_params(module, net)
    x, t = normal(len(times), *size, config.in_channels), np.array(times, np.float32)
    context = (
        normal(len(times), 77, config.cross_attention_dim) if config.text_conditional else None
    )
    labels = None
    if config.class_embed_type:
        labels = np.eye(10, dtype=np.float32)[np.arange(len(times))]
        labels[-1] = 0  # no class
    inputs = {"encoder_hidden_states": context, "class_labels": labels}
    with torch.no_grad():
        theirs = {k: None if v is None else torch.from_numpy(v) for k, v in inputs.items()}
        expected = module(nchw(x), torch.from_numpy(t), **theirs).sample
    ours = jax.jit(net.__call__)(
        params, jnp.asarray(x), jnp.asarray(t), **{k: v for k, v in inputs.items() if v is not None}
    )
    return relative_error(ours, nhwc(expected))


@pytest.fixture
def report(record_property):
    """Holds an error to the tolerance, and puts it on record."""

    def check(error, tolerance=TOLERANCE):
        print(f"relative error {error:.1e}")
        record_property("relative_error", error)
        assert error <= tolerance

    return check


@pytest.mark.parametrize("size", [(32, 32), (15, 18), (7, 9), (1, 1)])
def test_unet_with_text(size, report):
    report(unet_error(LATENTS, size, [0.0, 1.0, 500.0, 999.0]))


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
    for config, x, missing in (
        (LATENTS, jnp.zeros((1, 8, 8, 4)), "encoder_hidden_states"),
        (PIXELS, jnp.zeros((1, 8, 8, 3)), "class_labels"),
    ):
        net = Net(UNet(config))
        with pytest.raises(ValueError, match=missing):
            net({n: jnp.zeros(s) for n, s in net.shapes.items()}, x, jnp.zeros(1))


def test_unet_without_a_middle(report):
    report(unet_error(dataclasses.replace(PIXELS, mid_block_type=None), (8, 8), [7.0]))


def test_fractional_timesteps(report):
    report(unet_error(LATENTS, (16, 16), [0.5, 123.4567, 998.001]))
    report(unet_error(PIXELS, (16, 16), [0.5, 123.4567, 998.001]))


def test_other_heads_and_constants(report):
    report(unet_error(dataclasses.replace(LATENTS, attention_head_dim=1), (8, 8), [7.0]))
    report(unet_error(dataclasses.replace(PIXELS, attention_head_dim=16), (8, 8), [7.0]))
    report(
        unet_error(
            dataclasses.replace(LATENTS, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-3),
            (8, 8),
            [7.0],
        )
    )


@pytest.mark.parametrize("size", [(32, 32), (22, 14), (16, 34)])
def test_vae(size, report):
    torch.manual_seed(0)
    module = randomise(TorchVAE.from_config(VAE.to_json()))
    net = Net(AutoencoderKL(VAE))
    params = to_params(module, net)
    pictures, latents = normal(2, *size, 3), normal(2, size[0] // 2, size[1] // 2, 4)
    with torch.no_grad():
        expected = module.encode(nchw(pictures)).latent_dist
        decoded = module.decode(nchw(latents)).sample
    mean, logvar = net(params, jnp.asarray(pictures), method="encode")
    report(relative_error(mean, nhwc(expected.mean)))
    report(relative_error(logvar, nhwc(expected.logvar)))
    report(relative_error(net(params, jnp.asarray(latents), method="decode"), nhwc(decoded)))


def test_vae_of_four_stages(report):
    config = dataclasses.replace(
        VAE,
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    torch.manual_seed(0)
    module = randomise(TorchVAE.from_config(config.to_json()))
    net = Net(AutoencoderKL(config))
    params = to_params(module, net)
    pictures = normal(1, 40, 27, 3)  # odd on the way down: the rows that do not fit are dropped
    with torch.no_grad():
        expected = module.encode(nchw(pictures)).latent_dist
        decoded = module.decode(expected.mean).sample
    mean, _ = net(params, jnp.asarray(pictures), method="encode")
    report(relative_error(mean, nhwc(expected.mean)))
    report(relative_error(net(params, mean, method="decode"), nhwc(decoded)))


def token_ids(batch, length=77):
    """Random ids, each row ended (and padded) by the end-of-text token, as the tokenizer does."""
    ids = rng.integers(1, 999, (batch, length))
    for row, end in zip(ids, rng.integers(1, length, batch), strict=True):
        row[end:] = 999
    return ids.astype(np.int32)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_text_tower(hidden_act, report):
    config = dataclasses.replace(TEXT, hidden_act=hidden_act, num_hidden_layers=3)
    torch.manual_seed(0)
    reference = transformers.CLIPTextConfig.from_dict(config.to_json())
    module = randomise(transformers.CLIPTextModel(reference))
    net = Net(CLIPTextModel(config))
    params = to_params(module, net, "text_model.")
    for ids in (token_ids(3), token_ids(2, 10)):
        with torch.no_grad():
            expected = module(torch.from_numpy(ids).long(), output_hidden_states=True)
            report(relative_error(net(params, jnp.asarray(ids)), expected.last_hidden_state))
            for skip in (0, 1, 2):
                skipped = module.final_layer_norm(expected.hidden_states[-1 - skip])
                ours = net(params, jnp.asarray(ids), clip_skip=skip)
                report(relative_error(ours, skipped))


@pytest.mark.parametrize("eos", [999, 2])  # 2: configs from before 2023 that mean the highest id
def test_both_towers(eos, report):
    text = dataclasses.replace(TEXT, eos_token_id=eos)
    torch.manual_seed(0)
    reference = transformers.CLIPConfig(
        text_config=text.to_json(), vision_config=VISION.to_json(), projection_dim=6
    )
    module = randomise(transformers.CLIPModel(reference))
    net = Net(CLIPModel(text, VISION))
    params = to_params(module, net)
    ids, pictures = token_ids(3), normal(2, 30, 30, 3)
    with torch.no_grad():
        expected = module(torch.from_numpy(ids).long(), nchw(pictures))
        text_features = module.get_text_features(torch.from_numpy(ids).long()).pooler_output
        image_features = module.get_image_features(nchw(pictures)).pooler_output
    ours = net(params, jnp.asarray(ids), method="text_features")
    report(relative_error(ours, text_features))
    ours = net(params, jnp.asarray(pictures), method="image_features")
    report(relative_error(ours, image_features))
    text_unit, image_unit, scale = net(params, jnp.asarray(ids), jnp.asarray(pictures))
    report(relative_error(text_unit, expected.text_embeds))
    report(relative_error(image_unit, expected.image_embeds))
    report(relative_error(scale * (text_unit @ image_unit.T), expected.logits_per_text))
