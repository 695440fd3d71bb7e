"""Parts of the UNet that are one kernel on TPUs, interpreted on CPU, against their plain forms."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding

from jaxsd import eight_bits, kernels, nn, sharding
from jaxsd.kernels import tpu, tpu_convolution, tpu_feedforward
from jaxsd.models.blocks import ResnetBlock
from jaxsd.models.transformer import TransformerBlock
from jaxsd.nn import Net

MORE = 1.25  # of the error that the plain form makes in bfloat16
EPS = 1e-5


def normal(seed, *shape, dtype=jnp.float32, scale=1.0):
    x = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(x, dtype)


def convolved(h, w, i, o, residual=True, b=2):
    """x, scale, shift, weight, bias, residual"""
    x, weight = normal(0, b, h, w, i), normal(1, o, i, 3, 3, scale=(9 * i) ** -0.5)
    more = normal(5, b, h, w, o, dtype=jnp.bfloat16) if residual else None
    affine = (1 + normal(2, b, i, scale=0.3), normal(3, b, i))
    return (x.astype(jnp.bfloat16), *affine, weight.astype(jnp.bfloat16), normal(4, b, o), more)


def fed(t, c, b=2):
    """x and the weights of a feed-forward four times as wide."""
    weights = tpu_feedforward.Weights(
        1 + normal(1, c, scale=0.3),
        normal(2, c),
        normal(3, 8 * c, c, dtype=jnp.bfloat16, scale=c**-0.5),
        normal(4, 8 * c),
        normal(5, c, 4 * c, dtype=jnp.bfloat16, scale=(4 * c) ** -0.5),
        normal(6, c),
    )
    return normal(0, b, t, c, dtype=jnp.bfloat16), weights


convolution = functools.partial(tpu_convolution.convolution, interpret=True)
feed_forward = functools.partial(tpu_feedforward.feed_forward, eps=EPS, interpret=True)
plainly_fed = functools.partial(tpu_feedforward.plain, eps=EPS)


def assert_as_near(ours, plain, true):
    """Of two results in bfloat16, ours is about as near to the truth, in RMS and at the worst."""
    assert ours.dtype == plain.dtype == jnp.bfloat16 and ours.shape == true.shape
    mine, other = (abs(y.astype(jnp.float32) - true) for y in (ours, plain))
    assert jnp.sqrt((mine**2).mean()) <= MORE * jnp.sqrt((other**2).mean())
    assert mine.max() <= 2 * other.max()


def widened(given):
    return jax.tree.map(lambda x: x.astype(jnp.float32), given)


@pytest.mark.parametrize(
    "h, w, i, o, parts, residual",
    [
        (16, 64, 32, 48, 1, True),  # one tile of positions; a row is half a tile of lanes
        (32, 64, 48, 32, 1, False),  # two of them, and three groups of channels
        (16, 128, 32, 32, 1, True),  # a row is a whole tile
        (32, 64, 96, 32, 2, True),  # the channels in two parts
        (16, 128, 64, 32, 2, False),
    ],
)
def test_half_a_resnet_block(h, w, i, o, parts, residual, monkeypatch):
    monkeypatch.setattr(tpu_convolution, "CHANNELS", i // parts)
    given = convolved(h, w, i, o, residual)
    true = jax.jit(tpu_convolution.plain)(*widened(given))
    assert_as_near(convolution(*given), jax.jit(tpu_convolution.plain)(*given), true)


@pytest.mark.parametrize("w, i, parts", [(64, 32, 1), (128, 64, 2)])
def test_what_is_brought_is_there_before_it_is_read(w, i, parts, monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # which knows of races

    monkeypatch.setattr(tpu_convolution, "CHANNELS", i // parts)
    given = convolved(16, w, i, 16, b=4)
    strictly = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    y = tpu_convolution.convolution(*given, interpret=strictly)
    np.testing.assert_array_equal(y, convolution(*given))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("t, c", [(1024, 64), (1152, 64), (256, 192)])
def test_a_feed_forward(t, c):
    given = fed(t, c)
    true = jax.jit(plainly_fed)(*widened(given))
    assert_as_near(feed_forward(*given), jax.jit(plainly_fed)(*given), true)


@pytest.mark.parametrize(
    "fused, plain, given",
    [
        (convolution, tpu_convolution.plain, convolved(16, 64, 32, 16)),
        (convolution, tpu_convolution.plain, convolved(16, 64, 32, 16, residual=False)),
        (feed_forward, plainly_fed, fed(128, 64)),
    ],
)
def test_gradients_are_those_of_the_plain_form(fused, plain, given):
    y, back = jax.vjp(fused, *given)
    d_out = normal(9, *y.shape, dtype=y.dtype)
    expected = jax.vjp(plain, *given)[1](d_out)
    for ours, theirs in zip(*map(jax.tree.leaves, (back(d_out), expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rows", [16, 3])
def test_each_device_has_its_own_rows(rows):
    split = NamedSharding(sharding.make_mesh(-1, 4), sharding.HEADS)
    place = NamedSharding(split.mesh, sharding.ROWS if rows == 16 else sharding.WHOLE)
    whole = NamedSharding(split.mesh, sharding.WHOLE)
    x, weights = fed(128, 64, b=rows)
    given = (jax.device_put(x, place), jax.device_put(weights, whole))
    step = jax.jit(functools.partial(feed_forward, split=split))
    assert "all-gather" not in step.lower(*given).compile().as_text()
    np.testing.assert_array_equal(step(*given), feed_forward(x, weights))

    rows = 16 if rows == 16 else 2
    x, scale, shift, weight, bias, more = convolved(16, 64, 16, 16, b=rows)
    by_row = [jax.device_put(a, place if rows == 16 else whole) for a in (x, scale, shift)]
    given = (*by_row, weight, bias, more)
    step = jax.jit(functools.partial(convolution, split=split))
    assert rows != 16 or "all-gather" not in step.lower(*given).compile().as_text()
    expected = convolution(x, scale, shift, weight, bias, more)
    np.testing.assert_array_equal(step(*given), expected)


@pytest.mark.parametrize(
    "shape, outputs, dtype, fused",
    [
        ((8, 64, 64, 320), 320, jnp.bfloat16, True),
        ((8, 64, 64, 960), 320, jnp.bfloat16, True),
        ((1, 64, 64, 960), 320, jnp.bfloat16, True),  # two halves of its channels
        ((1, 64, 64, 320), 320, jnp.bfloat16, False),  # works on two at a time
        ((8, 64, 64, 320), 320, jnp.float32, False),
        ((8, 64, 64, 640), 640, jnp.bfloat16, False),  # full tiles
        ((8, 64, 64, 512), 128, jnp.bfloat16, False),
        ((8, 96, 96, 320), 320, jnp.bfloat16, False),  # rows that are no half of a tile
        ((8, 64, 64, 320), 4, jnp.bfloat16, False),
        ((8, 128, 128, 320), 320, jnp.bfloat16, False),  # too large
        ((96, 64, 64, 960), 320, jnp.bfloat16, False),  # too many scales and shifts
    ],
)
def test_which_convolutions_are_fused(shape, outputs, dtype, fused):
    assert tpu_convolution.convolves(shape, outputs, dtype, "TPU v5 lite") == fused
    assert not tpu_convolution.convolves(shape, outputs, dtype, "TPU v5")  # half of the memory


@pytest.mark.parametrize(
    "shape, dtype, fused",
    [
        ((8, 4096, 320), jnp.bfloat16, True),
        ((8, 1024, 640), jnp.bfloat16, True),
        ((8, 1024, 640), jnp.float32, False),
        ((8, 256, 1280), jnp.bfloat16, False),
        ((8, 1000, 320), jnp.bfloat16, False),
    ],
)
def test_which_feed_forwards_are_fused(shape, dtype, fused):
    for kind in ("TPU v5 lite", "TPU v5"):
        assert tpu_feedforward.feeds(shape, dtype, kind) == fused
    assert not tpu_feedforward.feeds(shape, dtype, "")


@pytest.fixture
def interpreted(monkeypatch):
    """As on a TPU, with a list of what was fused."""
    fused = []

    def interpreting(name, kernel):
        def call(*given):
            fused.append(name)
            return kernel(*given, True)

        return call

    for module, function in ((tpu_convolution, "convolution"), (tpu_feedforward, "feed_forward")):
        kernel = getattr(module, function)
        monkeypatch.setattr(module, function, interpreting(function, kernel))
    monkeypatch.setattr(tpu, "vector_memory", lambda kind: 128 << 20)
    monkeypatch.setattr(tpu, "attends", lambda *_: False)  # which is tested elsewhere
    with kernels.compiling_for("tpu"):
        yield fused


def resnet():
    net = Net(ResnetBlock(32, 48, 16, EPS, 24, dropout=0.5))
    params = net.init(jax.random.key(0))
    x, time = normal(0, 2, 16, 64, 32, dtype=jnp.bfloat16), normal(1, 2, 24, dtype=jnp.bfloat16)
    return net, params, (x, time)


def transformer():
    net = Net(TransformerBlock(64, 16, 2, dropout=0.5))
    params = net.init(jax.random.key(0))
    x, told = normal(0, 2, 1024, 64, dtype=jnp.bfloat16), normal(1, 2, 7, 16, dtype=jnp.bfloat16)
    return net, params, (x, told)


BLOCKS = {"convolution": resnet, "feed_forward": transformer}


def assert_as_plain(net, params, given):
    ours = net(params, *given)
    with kernels.compiling_for("any"):
        plain = jax.jit(lambda *given: net(*given))(params, *given)
        true = jax.jit(lambda *given: net(*given))(params, *widened(given))
    assert_as_near(ours, plain, true)


@pytest.mark.parametrize("name, times", [("convolution", 2), ("feed_forward", 1)])
def test_blocks_take_the_kernels(name, times, interpreted):
    assert_as_plain(*BLOCKS[name]())
    assert interpreted == [name] * times


@pytest.mark.parametrize(
    "name, form, times", [("convolution", "fp8", 2), ("feed_forward", "int8", 1)]
)
def test_blocks_in_eight_bits_take_them(name, form, times, interpreted):
    net, params, given = BLOCKS[name]()
    params = eight_bits.quantised({f"mid_block.{n}": x for n, x in params.items()}, form)
    params = {n.removeprefix("mid_block."): x for n, x in params.items()}
    assert eight_bits.is_quantised(params)
    assert_as_plain(net, params, given)
    assert interpreted == [name] * times


@pytest.mark.parametrize("name, fused", [("convolution", 1), ("feed_forward", 0)])
def test_dropout_is_not_left_out(name, fused, interpreted):
    net, params, given = BLOCKS[name]()
    jax.eval_shape(lambda: net(params, *given, dropout_key=jax.random.key(1)))
    assert interpreted == [name] * fused  # a ResNet block drops in its second half only


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("tensor, fused", [(1, True), (2, False)])
def test_channels_that_are_split_stay_so(name, tensor, fused, interpreted):
    net, params, given = BLOCKS[name]()
    mesh = sharding.make_mesh(-1, 2 // tensor, tensor, devices=jax.devices()[:2])
    with kernels.compiling_for("tpu", NamedSharding(mesh, sharding.HEADS)):
        given = [jnp.concatenate([x, x]) for x in given]
        jax.eval_shape(lambda: net(params, *given))
    assert bool(interpreted) == fused


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("remat", ["none", "selective"])
def test_trainings_are_not_fused(name, remat, interpreted):
    net, params, given = BLOCKS[name]()
    with nn.rematerialise(remat):
        jax.eval_shape(lambda: net(params, *given))
    assert interpreted == []


def test_compiled_for_eight_chips_each_has_its_rows(tpus):
    mesh = sharding.make_mesh(devices=tpus("v5e:2x4"))
    rows, whole = (NamedSharding(mesh, spec) for spec in (sharding.ROWS, sharding.WHOLE))

    def shape(where, *sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=where)

    net = Net(ResnetBlock(640, 320, 32, EPS, 1280))
    params = {name: shape(whole, *sizes) for name, sizes in net.shapes.items()}
    with kernels.compiling_for("tpu", NamedSharding(mesh, sharding.HEADS)):
        given = (params, shape(rows, 16, 64, 64, 640), shape(rows, 16, 1280))
        program = jax.jit(lambda *given: net(*given)).lower(*given).compile().as_text()
    assert len(re.findall(r"bf16\[2,320,4096\]\S* custom-call", program)) == 2
    assert "all-gather" not in program
    net = Net(TransformerBlock(320, 768, 8, 0.0))
    params = {name: shape(whole, *sizes) for name, sizes in net.shapes.items()}
    with kernels.compiling_for("tpu", NamedSharding(mesh, sharding.HEADS)):
        given = (params, shape(rows, 16, 4096, 320), shape(rows, 16, 77, 768))
        program = jax.jit(lambda *given: net(*given)).lower(*given).compile().as_text()
    assert len(re.findall(r"bf16\[2,320,4096\]\S* custom-call", program)) == 1
    assert "all-gather" not in program


@pytest.mark.parametrize(
    "name, kind", [("v5e:2x4", "TPU v5 lite"), ("v5p:2x2x2", "TPU v5"), ("v6e:2x4", "TPU v6 lite")]
)
def test_what_chips_are_called(name, kind, tpus):
    mesh = sharding.make_mesh(devices=tpus(name))
    with kernels.compiling_for("tpu", NamedSharding(mesh, sharding.HEADS)):
        assert kernels.target().kind == kind
    with kernels.compiling_for("tpu"):
        assert kernels.target().kind == ""
