"""Tiny VAEs and text towers with random weights against diffusers and transformers, float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL as TorchVAE
from diffusers import AutoencoderTiny as TorchTinyVAE
from torch_reference import nchw, nhwc, normal, randomise, relative_error, to_params

from jaxsd.components import make_net
from jaxsd.models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTextProjectionConfig,
    CLIPVisionConfig,
    TinyVAEConfig,
    VAEConfig,
)
from jaxsd.nn import Net

rng = np.random.default_rng(0)

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


@functools.partial(jax.jit, static_argnames=("net", "method", "clip_skip"))
def run(net, params, *inputs, **how):
    """As one program: op by op each size compiles dozens."""
    return net(params, *inputs, **how)


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
    mean, logvar = run(net, params, jnp.asarray(pictures), method="encode")
    report(relative_error(mean, nhwc(expected.mean)))
    report(relative_error(logvar, nhwc(expected.logvar)))
    report(relative_error(run(net, params, jnp.asarray(latents), method="decode"), nhwc(decoded)))


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
    mean, _ = run(net, params, jnp.asarray(pictures), method="encode")
    report(relative_error(mean, nhwc(expected.mean)))
    report(relative_error(run(net, params, mean, method="decode"), nhwc(decoded)))


@pytest.mark.parametrize("size", [(16, 24), (13, 9)])
def test_tiny_vae(size, report):
    config = TinyVAEConfig(
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(6, 6, 6),
        num_encoder_blocks=(1, 2, 1),
        num_decoder_blocks=(2, 0, 1),
    )
    torch.manual_seed(0)
    module = randomise(TorchTinyVAE.from_config(config.to_json()))
    net = Net(AutoencoderTiny(config))
    params = to_params(module, net)
    pictures, latents = normal(2, *size, 3), 3 * normal(2, 4, 5, 4)  # 3: where tanh bends
    with torch.no_grad():
        expected = module.encode(nchw(pictures)).latents
        decoded = module.decode(nchw(latents)).sample
    mean, logvar = run(net, params, jnp.asarray(pictures), method="encode")
    report(relative_error(mean, nhwc(expected)))
    assert (np.exp(logvar) == 0).all()
    report(relative_error(run(net, params, jnp.asarray(latents), method="decode"), nhwc(decoded)))
    assert config.downscale == 4


@pytest.mark.parametrize("config", [VAE, TinyVAEConfig(num_encoder_blocks=(1,) * 4)])
def test_vaes_in_bfloat16(config):
    net = make_net(config)
    params = {n: jnp.asarray(0.1 * normal(*s), jnp.bfloat16) for n, s in net.shapes.items()}
    pictures = jnp.asarray(normal(1, 16, 16, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention needs it
        mean, _ = jax.jit(lambda p, x: net(p, x, method="encode"))(params, pictures)
        out = jax.jit(lambda p, x: net(p, x, method="decode"))(params, mean)
    assert out.shape == pictures.shape and out.dtype == mean.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(out, np.float32)).all()


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
            report(relative_error(run(net, params, jnp.asarray(ids)), expected.last_hidden_state))
            for skip in (0, 1, 2):
                skipped = module.final_layer_norm(expected.hidden_states[-1 - skip])
                ours = run(net, params, jnp.asarray(ids), clip_skip=skip)
                report(relative_error(ours, skipped))


@pytest.mark.parametrize("eos", [999, 2])
def test_what_xl_reads_of_its_text_towers(eos, report):
    config = dataclasses.replace(TEXT, num_hidden_layers=4, hidden_act="gelu", eos_token_id=eos)
    projected = CLIPTextProjectionConfig(**dataclasses.asdict(config))
    ids = token_ids(3)
    for ours, kind, prefix in (
        (CLIPTextModel(config), transformers.CLIPTextModel, "text_model."),
        (CLIPTextModelWithProjection(projected), transformers.CLIPTextModelWithProjection, ""),
    ):
        torch.manual_seed(0)
        reference = transformers.CLIPTextConfig.from_dict(ours.config.to_json())
        module, net = randomise(kind(reference)), Net(ours)
        params = to_params(module, net, prefix)
        with torch.no_grad():
            expected = module(torch.from_numpy(ids).long(), output_hidden_states=True)
        for skip in (0, 1, 3):
            how = {"clip_skip": skip, "method": "penultimate"}
            hidden, pooled = run(net, params, jnp.asarray(ids), **how)
            report(relative_error(hidden, expected.hidden_states[-(skip + 2)]))
            assert (pooled is None) == (kind is transformers.CLIPTextModel)
            if pooled is not None:
                report(relative_error(pooled, expected.text_embeds))
        for skip in (-2, 4):
            with pytest.raises(ValueError):
                run(net, params, jnp.asarray(ids), **how | {"clip_skip": skip})
        # The ordinary states are the same with and without a projection.
        report(relative_error(run(net, params, jnp.asarray(ids)), expected.last_hidden_state))


def test_a_text_tower_with_more_tokens_than_its_config():
    """Textual inversion appends rows; sequences may be shorter than the tower was made for."""
    net = Net(CLIPTextModel(TEXT))
    params = net.init(jax.random.key(0))
    name = "text_model.embeddings.token_embedding.weight"
    longer = params | {name: jnp.concatenate([params[name], params[name][5:7]])}
    ids = token_ids(2, 9)
    replaced = np.where(ids == ids[0, 0], 1000, ids)
    longer[name] = longer[name].at[1000].set(params[name][ids[0, 0]])
    expected = run(net, params, jnp.asarray(ids))
    np.testing.assert_array_equal(run(net, longer, jnp.asarray(replaced)), expected)


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
    ours = run(net, params, jnp.asarray(ids), method="text_features")
    report(relative_error(ours, text_features))
    ours = run(net, params, jnp.asarray(pictures), method="image_features")
    report(relative_error(ours, image_features))
    text_unit, image_unit, scale = run(net, params, jnp.asarray(ids), jnp.asarray(pictures))
    report(relative_error(text_unit, expected.text_embeds))
    report(relative_error(image_unit, expected.image_embeds))
    report(relative_error(scale * (text_unit @ image_unit.T), expected.logits_per_text))
