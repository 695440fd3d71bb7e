"""The TPU's attention, interpreted on CPU, against the plain form; compiled where libtpu is."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxsd import kernels, nn, sharding
from jaxsd.kernels import tpu

TOLERANCE = 2e-5  # of the largest entry


def arrays(b, t, s, h, d):
    rng = np.random.default_rng(0)
    sizes = (t, s, s, t)
    return [jnp.asarray(rng.normal(size=(b, n, h, d)), jnp.float32) for n in sizes]


def plain(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.float32(np.sqrt(q.shape[-1]))
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v)


interpreted = functools.partial(tpu.attention, interpret=True)


def with_gradients(attention):
    def both(q, k, v, do):
        o, back = jax.vjp(attention, q, k, v)
        return o, *back(do)

    return jax.jit(both)


def assert_near(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        assert abs(one - other).max() <= TOLERANCE * abs(other).max()


@pytest.mark.parametrize(
    "t, s, d, straight",
    [
        (256, 256, 40, 32),
        (1152, 256, 8, 32),  # two blocks of queries
        (100, 77, 40, 32),  # no whole block of either
        (130, 300, 64, 1),  # a loop over blocks of keys, the last not whole
        (128, 700, 16, 4),  # the same of several at a time
        (128, 1024, 64, 4),  # twice as many keys at a time
        (128, 6400, 64, 32),  # which would not cover these
    ],
)
def test_the_plain_form_and_its_gradients(t, s, d, straight, monkeypatch):
    monkeypatch.setattr(tpu, "UNROLLED", straight)
    given = arrays(2, t, s, 2, d)
    assert_near(with_gradients(interpreted)(*given), with_gradients(plain)(*given))


@pytest.mark.parametrize(
    "kind, d, of_both",
    [
        ("TPU v5 lite", 40, [128, 128]),
        ("TPU v5 lite", 64, [256, 128]),
        ("TPU v6 lite", 40, [256, 256]),
        ("", 40, [128, 128]),
    ],
)
def test_as_many_keys_at_a_time_as_the_chip_adds_up(kind, d, of_both, monkeypatch):
    blocks = []

    def watch(name):
        run = getattr(tpu, name)

        def seen(*given):
            *_, block, _interpret = given
            blocks.append(block)
            return run(*given)

        monkeypatch.setattr(tpu, name, seen)

    watch("_forward")
    watch("_backward")
    given = arrays(1, 128, 1000, 1, d)
    ours = functools.partial(interpreted, kind=kind)
    assert_near(with_gradients(ours)(*given), with_gradients(plain)(*given))
    assert blocks == of_both


def test_padding_has_no_share_where_all_scores_are_low():
    q, k, v, do = arrays(1, 128, 100, 1, 8)
    q, k = q.at[..., 0].set(17.0), k.at[..., 0].set(-17.0)  # 2^score is 0 in float32
    given = (q, k, v, do)
    assert_near(with_gradients(interpreted)(*given), with_gradients(plain)(*given))


@pytest.mark.parametrize("fsdp, tensor, heads", [(2, 1, 2), (1, 2, 2), (1, 2, 1)])
def test_each_device_computes_its_own_rows_and_heads(fsdp, tensor, heads):
    mesh = sharding.make_mesh(-1, fsdp, tensor)
    split = NamedSharding(mesh, sharding.HEADS)
    head_axis = "tensor" if heads == tensor else None
    place = NamedSharding(mesh, jax.P(("data", "fsdp"), None, head_axis))
    given = arrays(8, 128, 128, heads, 8)
    step = with_gradients(functools.partial(interpreted, split=split))
    placed = [jax.device_put(x, place) for x in given]
    program = step.lower(*placed).compile().as_text()
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        assert kind not in program
    assert_near(step(*placed), with_gradients(plain)(*given))


def test_compiled_for_eight_chips_no_rows_are_gathered(tpus):
    mesh = sharding.make_mesh(devices=tpus("v5e:2x4"))
    rows = NamedSharding(mesh, sharding.ROWS)
    x = jax.ShapeDtypeStruct((16, 1024, 128), jnp.bfloat16, sharding=rows)
    with kernels.compiling_for("tpu", NamedSharding(mesh, sharding.HEADS)):
        step = jax.jit(jax.grad(lambda q, k, v: nn.attention(q, k, v, 2).sum(dtype=jnp.float32)))
        program = step.lower(x, x, x).compile().as_text()
    assert re.search(r"bf16\[2,2,64,1024\]\S*, .* custom-call", program)  # two rows of sixteen
    assert "all-gather" not in program and "all-to-all" not in program


def test_rows_that_do_not_divide_stay_whole():
    split = NamedSharding(sharding.make_mesh(), sharding.HEADS)
    given = arrays(3, 128, 128, 1, 8)
    step = with_gradients(functools.partial(interpreted, split=split))
    assert_near(step(*given), with_gradients(plain)(*given))


def test_gelu_for_bfloat16():
    x = jnp.linspace(-20, 20, 100_001)
    ours, slope = jax.vmap(jax.value_and_grad(lambda x: x * tpu.normal_cdf(x)))(x)
    expected, true_slope = jax.vmap(jax.value_and_grad(kernels.gelu))(x)
    assert abs(ours - expected).max() <= 5e-6  # of results that are rounded to 2e-3 of their size
    assert abs(slope - true_slope).max() <= 5e-5


@pytest.mark.parametrize("parts", [1, 2])
def test_a_linear_layer_in_parts(parts):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((2, 3, 5), (8, 5)))
    expected = jnp.split(jnp.einsum("bti,oi->bto", x, weight), parts, -1)
    assert_near(kernels.linear(x, weight, parts), expected)
    with kernels.compiling_for("tpu"):
        assert_near(kernels.linear(x, weight, parts), expected)
