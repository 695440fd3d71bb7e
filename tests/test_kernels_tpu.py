"""The TPU's attention, interpreted on CPU, against the plain form; compiled where libtpu is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxsd import sharding
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
    ],
)
def test_the_plain_form_and_its_gradients(t, s, d, straight, monkeypatch):
    monkeypatch.setattr(tpu, "UNROLLED", straight)
    given = arrays(2, t, s, 2, d)
    assert_near(with_gradients(interpreted)(*given), with_gradients(plain)(*given))


def test_padding_has_no_share_where_all_scores_are_low():
    q, k, v, do = arrays(1, 128, 100, 1, 8)
    q, k = q.at[..., 0].set(17.0), k.at[..., 0].set(-17.0)  # 2^score is 0 in float32
    given = (q, k, v, do)
    assert_near(with_gradients(interpreted)(*given), with_gradients(plain)(*given))


@pytest.mark.parametrize("fsdp, tensor", [(2, 1), (1, 2)])
def test_each_device_computes_its_own_rows_and_heads(fsdp, tensor):
    mesh = sharding.make_mesh(-1, fsdp, tensor)
    place = NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    given = arrays(8, 128, 128, 2, 8)
    step = with_gradients(interpreted)
    placed = [jax.device_put(x, place) for x in given]
    program = step.lower(*placed).compile().as_text()
    for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert kind not in program
    assert_near(step(*placed), with_gradients(plain)(*given))
