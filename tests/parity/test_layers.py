"""Each layer against torch's, float32, to 2e-5."""

import diffusers.models.attention_processor as torch_attention
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.attention import FeedForward as TorchFeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding as TorchTimestepEmbedding
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch_reference import nchw, nhwc, randomise, relative_error, to_params

from jaxsd import nn
from jaxsd.models import blocks, embeddings, transformer

TOLERANCE = 2e-5
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


def picture_layer_error(layer, module, x, *more, **kwargs):
    """Error of a layer over [b, h, w, c]; `more` is handed to both as it is."""
    randomise(module)
    net = nn.Net(layer)
    ours = net(to_params(module, net), jnp.asarray(x), *map(jnp.asarray, more), **kwargs)
    return relative_error(ours, nhwc(module(nchw(x), *map(torch.from_numpy, more))))


def layer_error(layer, module, *inputs):
    randomise(module)
    net = nn.Net(layer)
    ours = net(to_params(module, net), *map(jnp.asarray, inputs))
    return relative_error(ours, module(*map(torch.from_numpy, inputs)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)])
def test_linear(shape, bias):
    error = layer_error(nn.Linear(7, 5, bias), torch.nn.Linear(7, 5, bias), normal(*shape))
    assert error <= TOLERANCE


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel, padding", [(1, 0), (3, 1), (3, 0), (4, 2)])
def test_conv2d(kernel, padding, stride):
    layer = nn.Conv2d(5, 6, kernel, stride, padding)
    module = torch.nn.Conv2d(5, 6, kernel, stride, padding)
    assert picture_layer_error(layer, module, normal(2, 9, 12, 5)) <= TOLERANCE


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_downsample(size, asymmetric):
    module = Downsample2D(4, use_conv=True, padding=0 if asymmetric else 1, name="op")
    layer = blocks.Downsample(4, asymmetric)
    assert picture_layer_error(layer, module, normal(2, *size, 4)) <= TOLERANCE


@pytest.mark.parametrize("size", [None, (10, 14), (9, 13), (10, 13), (23, 6)])
def test_upsample(size):
    x, module = normal(2, 5, 7, 4), randomise(Upsample2D(4, use_conv=True))
    net = nn.Net(blocks.Upsample(4))
    ours = net(to_params(module, net), jnp.asarray(x), size)
    assert relative_error(ours, nhwc(module(nchw(x), size))) <= TOLERANCE
    if size is not None:
        expected = torch.nn.functional.interpolate(nchw(x), size, mode="nearest")
        np.testing.assert_array_equal(nn.upsample_nearest(jnp.asarray(x), size), nhwc(expected))


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("groups, eps", [(1, 1e-5), (4, 1e-6), (8, 1e-5)])
def test_group_norm(groups, eps, offset):
    # An offset far above the spread tells a two-pass variance from E[x^2] - E[x]^2.
    x = normal(2, 5, 6, 8) + np.float32(offset)
    error = picture_layer_error(nn.GroupNorm(groups, 8, eps), torch.nn.GroupNorm(groups, 8, eps), x)
    assert error <= TOLERANCE


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8)])
def test_layer_norm(shape):
    assert layer_error(nn.LayerNorm(8), torch.nn.LayerNorm(8), normal(*shape)) <= TOLERANCE


def test_embedding():
    layer, module = nn.Embedding(9, 4, nn.normal(0.02)), torch.nn.Embedding(9, 4)
    assert layer_error(layer, module, np.array([[0, 8, 3], [3, 1, 1]])) == 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_attention(heads, causal, scale):
    q, k, v = normal(2, 11, 16) * np.float32(scale), normal(2, 11, 16), normal(2, 11, 16)
    split = [torch.from_numpy(x).reshape(2, 11, heads, -1).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*split, is_causal=causal)
    ours = nn.attention(*map(jnp.asarray, (q, k, v)), heads, causal)
    assert relative_error(ours, expected.transpose(1, 2).reshape(2, 11, 16)) <= TOLERANCE


def test_cross_attention():
    module = torch_attention.Attention(12, cross_attention_dim=10, heads=3, dim_head=4)
    layer = transformer.CrossAttention(12, 10, 3, dropout=0.0)
    assert layer_error(layer, module, normal(2, 6, 12), normal(2, 9, 10)) <= TOLERANCE


def test_attention_block():
    module = torch_attention.Attention(
        8, heads=2, dim_head=4, norm_num_groups=4, eps=1e-5, bias=True, residual_connection=True
    )
    layer = blocks.AttentionBlock(8, 2, 4, 1e-5)
    assert picture_layer_error(layer, module, normal(2, 5, 3, 8)) <= TOLERANCE


def test_feed_forward_with_exact_gelu():
    module, layer = TorchFeedForward(6, activation_fn="geglu"), transformer.FeedForward(6, 0.0)
    assert layer_error(layer, module, 3 * normal(2, 50, 6)) <= TOLERANCE


@pytest.mark.parametrize("outputs", [6, 8])
def test_resnet_block(outputs):
    module = ResnetBlock2D(in_channels=6, out_channels=outputs, temb_channels=5, groups=2, eps=1e-5)
    layer = blocks.ResnetBlock(6, outputs, 2, 1e-5, time_channels=5)
    error = picture_layer_error(layer, module, normal(2, 5, 4, 6), normal(2, 5))
    assert error <= TOLERANCE


def test_activations():
    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    t = torch.from_numpy(x)
    references = {
        "gelu": torch.nn.functional.gelu(t),
        "quick_gelu": t * torch.sigmoid(1.702 * t),
        "silu": torch.nn.functional.silu(t),
    }
    assert references.keys() == nn.ACTIVATIONS.keys()
    for name, expected in references.items():
        ours = np.asarray(nn.ACTIVATIONS[name](jnp.asarray(x)))
        assert np.abs(ours - expected.numpy()).max() <= 2e-6, name


@pytest.mark.parametrize("flip, shift", [(True, 0), (False, 0), (True, 1), (False, 1)])
def test_timestep_embedding(flip, shift):
    t = np.array([0, 1, 12, 499.5, 0.25, 980.0625, 999, 1000], np.float32)
    expected = get_timestep_embedding(
        torch.from_numpy(t), 320, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    ours = embeddings.timestep_embedding(jnp.asarray(t), 320, flip, shift)
    # sin(999 f) in float32: half a unit in the last place of the angle is already 3e-5.
    assert np.abs(np.asarray(ours) - expected.numpy()).max() <= 1e-4
    module, layer = TorchTimestepEmbedding(320, 64), embeddings.TimestepEmbedding(320, 64)
    assert layer_error(layer, module, expected.numpy()) <= TOLERANCE


def test_dropout_acts_only_with_a_key():
    net, x = nn.Net(nn.Dropout(0.25)), jnp.ones((100, 100))
    assert (net({}, x) == x).all()
    first, again, other = (net({}, x, dropout_key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    assert set(np.unique(first)) == {0, np.float32(1 / 0.75)}
    assert abs(float(first.mean()) - 1) < 0.03
