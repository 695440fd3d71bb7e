"""The forms of `jaxsd.kernels` against PyTorch: sizes that divide, and sizes that do not.

Tolerance 2e-5, as for every layer; gradients against the plain form, 2e-5 too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import nchw, nhwc, normal, relative_error

from jaxsd import kernels
from jaxsd.kernels import cpu

TOLERANCE = 2e-5


def torch_attention(q, k, v):
    split = [torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).numpy()


def attention_inputs(b, t, s, h, d):
    return normal(b, t, h, d), normal(b, s, h, d), normal(b, s, h, d)


# One block, several, queries that fill the last block in part, and one block for a whole head.
@pytest.mark.parametrize("t, s, scores", [(96, 96, 1 << 30), (96, 96, 1536), (90, 17, 272)])
def test_attention_in_blocks(t, s, scores, monkeypatch):
    monkeypatch.setattr(cpu, "SCORES", scores)
    q, k, v = attention_inputs(2, t, s, 3, 8)
    ours = cpu.attention(*map(jnp.asarray, (q * 5, k, v)))
    assert relative_error(ours, torch_attention(q * 5, k, v)) <= TOLERANCE


def test_the_gradient_of_attention_in_blocks(monkeypatch):
    monkeypatch.setattr(cpu, "SCORES", 512)
    inputs = [jnp.asarray(x) for x in attention_inputs(2, 50, 32, 2, 8)]
    looked = normal(2, 50, 2, 8)

    def gradients(form):
        return jax.grad(lambda *x: (form(*x) * looked).sum(), argnums=(0, 1, 2))(*inputs)

    for ours, plain in zip(
        gradients(cpu.attention), gradients(jax.nn.dot_product_attention), strict=True
    ):
        assert relative_error(ours, np.asarray(plain)) <= TOLERANCE


def test_scores_are_not_held_at_once(monkeypatch):
    """Stable Diffusion's largest attention: the scores alone would be 2 GiB."""
    shape = jax.ShapeDtypeStruct((2, 4096, 8, 40), jnp.float32)
    monkeypatch.setattr(kernels, "platform", lambda: "cpu")
    compiled = jax.jit(kernels.attention).lower(shape, shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * 2**20


@pytest.mark.parametrize("form", [cpu.gathered, cpu.winograd])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 5), (12, 6)])
@pytest.mark.parametrize("tiles", [1 << 20, 200])
def test_convolutions(form, size, tiles, monkeypatch):
    monkeypatch.setattr(cpu, "_tiles", lambda pixels: tiles)
    x, weight, bias = normal(2, *size, 6), normal(5, 6, 3, 3), normal(5)
    for b in (None, bias):
        ours = form(jnp.asarray(x), jnp.asarray(weight), None if b is None else jnp.asarray(b))
        bias_there = None if b is None else torch.from_numpy(b)
        expected = torch.nn.functional.conv2d(
            nchw(x), torch.from_numpy(weight), bias_there, padding=1
        )
        assert relative_error(ours, nhwc(expected)) <= TOLERANCE


# Few pixels, as many as there are channels and more, and many, whose kernels are transformed in
# each step or once: each is another form, forward and backward.
SHAPES = [
    ((1, 8, 8), 192, cpu.gathered),
    ((1, 14, 14), 192, None),
    ((1, 20, 20), 192, cpu.winograd),
    ((2, 32, 32), 200, cpu.winograd),
]


@pytest.mark.parametrize("size, outputs, form", SHAPES)
def test_a_layer_and_its_gradients(size, outputs, form):
    x, weight, bias = normal(*size, 192), normal(outputs, 192, 3, 3), normal(outputs)
    assert cpu.convolves(x.shape, x.dtype, outputs) is form
    looked = normal(*size, outputs)
    tensors = nchw(x), torch.from_numpy(weight), torch.from_numpy(bias)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    out = torch.nn.functional.conv2d(*tensors, padding=1)
    (out * nchw(looked)).sum().backward()

    def layer(x, weight, bias):
        return kernels.convolution(x, weight, bias, 1, ((1, 1), (1, 1)))

    given = [jnp.asarray(a) for a in (x, weight, bias)]
    ours, back = jax.vjp(layer, *given)
    dx, dweight, dbias = back(jnp.asarray(looked))
    assert relative_error(ours, nhwc(out)) <= TOLERANCE
    assert relative_error(dx, nhwc(tensors[0].grad)) <= TOLERANCE
    assert relative_error(dweight, tensors[1].grad.numpy()) <= TOLERANCE
    assert relative_error(dbias, tensors[2].grad.numpy()) <= TOLERANCE


def test_what_a_gradient_finds_stored():
    """The input and the kernels: the transformed pixels are four times as much."""
    x, weight = jnp.ones((2, 32, 32, 192)), jnp.ones((192, 192, 3, 3))

    def layer(x, weight):
        return kernels.convolution(x, weight, None, 1, ((1, 1), (1, 1)))

    stored = jax.tree.leaves(jax.vjp(layer, x, weight)[1])
    assert sum(array.size for array in stored) <= x.size + weight.size + 144  # a constant


def test_what_is_left_to_the_compiler():
    assert cpu.convolves((2, 32, 32, 192), jnp.float32, 63) is None  # few channels
    assert cpu.convolves((4, 32, 32, 192), jnp.float32, 64) is cpu.winograd
    assert cpu.convolves((4, 31, 32, 192), jnp.float32, 64) is None  # and few pixels
    assert cpu.convolves((4, 32, 32, 192), jnp.float32, 64, gradient=True) is None
    assert cpu.convolves((4, 32, 32, 192), jnp.float32, 159, gradient=True) is None
    assert cpu.convolves((4, 32, 32, 192), jnp.float32, 160, gradient=True) is cpu.winograd
    assert cpu.convolves((65, 16, 16, 64), jnp.float32, 64) is None  # more than caches hold
    assert cpu.convolves((2, 32, 32, 192), jnp.bfloat16, 192) is None
    assert cpu.convolves((1, 14, 14, 192), jnp.float32, 192) is None  # few pixels
    assert cpu.convolves((2, 20, 20, 192), jnp.float32, 192) is cpu.winograd
    assert cpu.convolves((2, 20, 20, 192), jnp.float32, 192, gradient=True) is None


@pytest.mark.parametrize("side, form", [(8, cpu.gathered), (16, cpu.winograd), (48, cpu.winograd)])
def test_what_is_no_number_stays_in_its_picture(side, form):
    x, weight = normal(2, side, side, 192), normal(192, 192, 3, 3)
    assert cpu.convolves(x.shape, x.dtype, 192) is form
    spoilt = x.copy()
    spoilt[0, 0, 0, 0] = np.nan
    ours, expected = (
        np.asarray(form(jnp.asarray(a), jnp.asarray(weight), None)) for a in (spoilt, x)
    )
    assert np.isnan(ours[0]).any()
    np.testing.assert_array_equal(ours[1], expected[1])


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_attention_in_blocks_of_bfloat16(scale):
    """Scores and sums in float32: no worse than twice what the plain form rounds."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in attention_inputs(1, 512, 512, 2, 40))
    q, k = q * jnp.bfloat16(scale), k * jnp.bfloat16(scale)
    exact = torch_attention(*(np.asarray(x, np.float32) for x in (q, k, v)))
    with jax.numpy_dtype_promotion("standard"):
        others = jax.nn.dot_product_attention(q, k, v)
    errors = [np.asarray(x, np.float32) - exact for x in (cpu.attention(q, k, v), others)]
    ours, theirs = (float(np.sqrt(np.square(error).mean())) for error in errors)
    assert ours <= 2 * theirs


def test_what_a_program_is_for():
    assert kernels.platform() == jax.default_backend()
    with kernels.compiling_for("tpu"):
        assert kernels.platform() == "tpu"
    assert kernels.platform() == jax.default_backend()


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [40, 64, 80, 160])
@pytest.mark.parametrize("keys", [77, 1024])
def test_attention_on_a_gpu(channels, keys):
    """bfloat16 against float32: 2e-2 of the largest, what rounding to 8 bits allows."""
    q, k, v = attention_inputs(2, 1024, keys, 4, channels)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    expected = torch_attention(*(np.asarray(x, np.float32) for x in half))
    ours = jax.jit(kernels.attention)(*half).astype(jnp.float32)
    assert relative_error(ours, expected) <= 2e-2


@jax.numpy_dtype_promotion("standard")  # where there is no GPU, jax's own form needs it
@pytest.mark.gpu
@pytest.mark.parametrize("channels", [40, 64, 80, 160])
@pytest.mark.parametrize("keys", [77, 1024])
def test_the_gradient_of_attention_on_a_gpu(channels, keys):
    """The same, 3e-2: the gradient rounds what it is given, too."""
    q, k, v = attention_inputs(2, 1024, keys, 4, channels)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    weights = jnp.asarray(normal(*q.shape), jnp.bfloat16)
    given = [torch.from_numpy(np.asarray(x, np.float32)).requires_grad_() for x in half]
    split = [x.transpose(1, 2) for x in given]
    out = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2)
    (out * torch.from_numpy(np.asarray(weights, np.float32))).sum().backward()

    def loss(*given):
        return (kernels.attention(*given) * weights).astype(jnp.float32).sum()

    ours = jax.jit(jax.grad(loss, (0, 1, 2)))(*half)
    for x, reference in zip(ours, given, strict=True):
        assert relative_error(x.astype(jnp.float32), reference.grad.numpy()) <= 3e-2
