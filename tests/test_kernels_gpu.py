"""Forms for NVIDIA GPUs: what they compute, on CPU; and, where jax's plugin is, their programs."""

import re
from types import SimpleNamespace

import gpu_estimate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from toy import Regression

from jaxsd import kernels, sharding, training
from jaxsd.kernels import gpu
from jaxsd.nn import GroupNorm, Net, block, rematerialise
from jaxsd.training.placement import compile_step, make_mesh, spread
from jaxsd.training.step import Aux, state_of


def device(kind="NVIDIA H200", capability="9.0"):
    return SimpleNamespace(device_kind=kind, compute_capability=capability)


@pytest.fixture
def asked(monkeypatch):
    """What cuDNN is asked for, on an H200 that is none: XLA answers."""
    calls, plain = [], jax.nn.dot_product_attention

    def attend(*arrays, implementation=None, **rest):
        calls.append((implementation, arrays[1].shape[1], sorted(rest)))
        return plain(*arrays, **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    monkeypatch.setattr(kernels.Target, "device", property(lambda self: device()))
    return calls


def qkv(queries, keys, channels=8, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal((2, n, 2, channels)), dtype) for n in (queries, keys, keys)
    ]


@pytest.mark.parametrize(
    "kind, capability, dtype, channels, flash",
    [
        ("NVIDIA H200", "9.0", "bfloat16", 40, True),
        ("NVIDIA H200", "9.0", "bfloat16", 160, True),
        ("NVIDIA A100-SXM4-80GB", "8.0", "bfloat16", 160, False),
        ("NVIDIA A100-SXM4-80GB", "8.0", "float16", 64, True),
        ("NVIDIA A100-SXM4-80GB", "8.0", "float32", 64, False),
        ("Tesla V100-SXM2-16GB", "7.0", "float16", 64, False),
        ("AMD Instinct MI300X", "gfx942", "bfloat16", 64, False),
    ],
)
def test_what_cudnn_takes(kind, capability, dtype, channels, flash):
    """Read off jax's own conditions."""
    shape = (1, 256, 2, channels)
    assert gpu.flash(device(kind, capability), shape, 256, jnp.dtype(dtype)) == flash
    assert not gpu.flash(device(kind, capability), shape, 32, jnp.dtype(dtype))  # not worth it
    assert not gpu.flash(None, shape, 256, jnp.dtype(dtype))


@jax.numpy_dtype_promotion("standard")  # jax's own form needs it
@pytest.mark.parametrize("queries, keys", [(256, 256), (256, 77), (225, 225), (3277, 5)])
def test_attention_and_its_gradient(queries, keys, asked):
    """Of odd numbers the gradient alone is of padded arrays, whose last entries do not count."""
    given = qkv(queries, keys)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(given[0].shape), jnp.bfloat16)

    def loss(form, *given):
        return (form(*given) * weights).astype(jnp.float32).sum()

    with kernels.compiling_for("gpu"):
        out = kernels.attention(*given)
        assert asked == [("cudnn", keys, ["is_causal"])]
        grads = jax.grad(lambda *x: loss(kernels.attention, *x), (0, 1, 2))(*given)
    if keys % 2:
        lengths = ["is_causal", "key_value_seq_lengths", "query_seq_lengths"]
        assert asked[-1] == ("cudnn", keys + 1, lengths)
    with kernels.compiling_for("any"):
        expected = kernels.attention(*given)
        expected_grads = jax.grad(lambda *x: loss(kernels.attention, *x), (0, 1, 2))(*given)
    assert (out == expected).all()
    for ours, theirs in zip(grads, expected_grads, strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("shape", [(2, 16, 16, 24), (2, 6, 6, 24), (2, 300, 24), (1, 4, 8, 16, 24)])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_moments_in_one_reading(shape, mean):
    """To 2e-6 of float64's, where E[x^2] - E[x]^2 loses all digits, too."""
    rng, groups = np.random.default_rng(0), 4
    offsets = rng.standard_normal((shape[0], *[1] * (len(shape) - 2), shape[-1]))
    x = jnp.asarray(mean + offsets + rng.standard_normal(shape), jnp.float32)
    means, variances = gpu.moments(x, groups)
    exact = np.asarray(x, np.float64).reshape(shape[0], -1, groups, shape[-1] // groups)
    np.testing.assert_allclose(means, exact.mean((1, 3)), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(variances, exact.var((1, 3)), rtol=2e-6)


def test_a_norm_and_its_gradient_as_on_other_platforms():
    """Values and gradients to 1e-5 of the largest, in float32."""
    rng = np.random.default_rng(0)
    norm = Net(GroupNorm(4, 16, 1e-5))
    params = {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in norm.shapes.items()}
    x, weights = (jnp.asarray(rng.standard_normal((2, 24, 24, 16)), jnp.float32) for _ in range(2))

    def run(platform):
        def loss(params, x):
            with kernels.compiling_for(platform):
                y = norm(params, x + 3.0)
            return (y * weights).sum(), y

        (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return jax.tree.leaves((y, grads))

    for ours, theirs in zip(run("gpu"), run("any"), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


# --- compiled for GPUs that are not there ---


def compiled(devices, function, *shapes, dtype=jnp.bfloat16):
    where = jax.sharding.SingleDeviceSharding(devices[0])
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape in shapes]

    def told(*given):
        mesh = sharding.make_mesh(devices=devices[:1])
        with kernels.compiling_for("gpu", NamedSharding(mesh, sharding.HEADS)):
            return function(*given)

    return jax.jit(told).lower(*given)


@pytest.mark.parametrize("channels", [40, 64, 80, 160])
@pytest.mark.parametrize("keys", [77, 1024])
def test_attention_is_cudnns(channels, keys, gpus):
    q, k = (2, 1024, 4, channels), (2, keys, 4, channels)
    text = compiled(gpus, kernels.attention, q, k, k).compile().as_text()
    assert text.count("__cudnn$fmhaSoftmax") == 1

    def loss(*given):
        return kernels.attention(*given).astype(jnp.float32).sum()

    def kept(*given):
        with rematerialise("selective"):
            return block(loss)(*given)

    for form in (loss, kept):
        both = jax.value_and_grad(form, (0, 1, 2))
        text = compiled(gpus, both, q, k, k).compile().as_text()
        for name in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
            assert text.count(f'"__cudnn${name}"') == 1


def test_a_norm_keeps_the_chip_busy(gpus, tmp_path):
    """What reads a whole picture has at least as many blocks as there are multiprocessors."""
    norm = Net(GroupNorm(32, 320, 1e-5))
    params = {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in norm.shapes.items()}
    program = compiled(gpus, lambda x: norm(params, x), (2, 64, 64, 320))
    text = program.compile({"xla_dump_to": str(tmp_path)}).as_text()
    blocks = gpu_estimate.grids(tmp_path)
    read = gpu_estimate.GpuProgram(text, gpu_estimate.GPUS["h200"], blocks)
    large = [row for row in read.rows if row.bytes > 2 << 20]
    assert len(large) == 2  # of the moments, and of what is made of them
    assert all(blocks[row.name] >= gpu_estimate.GPUS["h200"].cores for row in large)


def test_an_update_copies_and_transposes_no_state(gpus):
    class Convolved(Regression):
        def loss(self, params, aux, batch, now):
            y = kernels.convolution(batch, params["weight"], None, 1, ((1, 1), (1, 1)))
            return jnp.square(y.astype(jnp.float32)).mean(), {}

    options = training.Options(1, batch_size=2, dtype="bfloat16", max_grad_norm=1.0)
    mesh, optimizer = make_mesh(options, gpus), training.make_optimizer(options)
    shape = jax.ShapeDtypeStruct((256, 256, 3, 3), jnp.float32)
    state = spread(
        jax.eval_shape(lambda w: state_of({"weight": w}, optimizer), shape), options, mesh
    )
    rows = NamedSharding(mesh, sharding.ROWS)
    pictures = jax.ShapeDtypeStruct((2, 16, 16, 256), jnp.bfloat16, sharding=rows)
    step = compile_step(training.make_step(Convolved(), optimizer, options), state, options)
    text = step.lower(state, Aux((), {}), pictures).compile().as_text()
    whole = r"f32\[(?:256,256,3,3|256,3,3,256|3,3,256,256)\]"
    entry = text[text.index("ENTRY") :]
    assert not re.search(rf"= {whole}\S* copy\(", entry)
    # Parameters, two moments and the average come from one kernel, in the order that they have
    made = re.findall(rf"= \((?:{whole}\S* ?)+\) fusion", entry)
    assert [text.count("f32[256,256,3,3]") for text in made] == [4]
