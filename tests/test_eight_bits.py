"""Weights in eight bits at work: how far they are off, what they cost, what they cannot do."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused
from test_pipeline import CALL

import jaxsd
from jaxsd import eight_bits
from jaxsd.cli import sample
from jaxsd.eight_bits import SUFFIX, Eight, quantised
from jaxsd.models import UNet, UNetConfig
from jaxsd.nn import Net
from jaxsd.weights import quantised as files
from jaxsd.weights.lora import LoRA

NAME = "mid_block.x.weight"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


@pytest.mark.parametrize("shape", [(7, 50), (24, 3, 3, 3)])
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_a_weight_comes_back_within_the_bounds(form, shape):
    """int8: half of 1/127 of its row's greatest. fp8: three bits after the point, so 2^-4 of itself
    (or half of the least number, 2^-10 of 448, in units of the scale)."""
    rng = np.random.default_rng(0)
    rows = 10.0 ** rng.uniform(-6, 3, (shape[0], *[1] * (len(shape) - 1)))
    weight = (rng.normal(size=shape) * rows).astype(np.float32)
    weight[3] = 0
    small = quantised({NAME: jnp.asarray(weight)}, form)
    assert small[NAME].dtype.itemsize == 1 and small[NAME + SUFFIX].shape == shape[:1]
    back = np.asarray(Eight(small[NAME], small[NAME + SUFFIX]).at_work(jnp.zeros(2)))
    most = np.abs(weight).max(tuple(range(1, weight.ndim)), keepdims=True)
    bound = 0.5 / 127 * most
    if form == "fp8":
        bound = np.maximum(np.abs(weight) / 16, most * 2**-10 / 448)
    assert np.all(np.abs(back - weight) <= bound * (1 + 1e-5))
    np.testing.assert_array_equal(back[3], 0)


def test_int8_is_that_of_files(words):
    params = tiny.pipeline(words).params["unet"]
    small = quantised(params, "int8")
    taken = [name for name in params if name + SUFFIX in small]
    assert {name.split(".")[0] for name in taken} == {"down_blocks", "up_blocks"}
    for name in taken:
        np.testing.assert_array_equal(small[name], files.stored(params, name))
    assert all(small[name] is params[name] for name in params if name not in taken)


@pytest.mark.parametrize("form, most", [("int8", 0.03), ("fp8", 0.15)])
def test_a_network_says_nearly_the_same(words, form, most):
    """Relative to what it says, root mean squares: a few layers' errors, which add up at random."""
    pipe = tiny.pipeline(words)
    x, cond = pipe.noise([1, 2]), pipe.encode(["a red seven", "nine"])
    before = np.asarray(pipe.predict(x, 500.0, cond))
    pipe.quantize(form)
    after = np.asarray(pipe.predict(x, 500.0, cond))
    error = np.sqrt(np.mean((after - before) ** 2) / np.mean(before**2))
    assert 1e-5 < error < most


def test_pictures_are_drawn_and_come_again(words):
    pipe = tiny.pipeline(words)
    before = np.asarray(pipe.sample(**CALL))
    pipe.quantize("int8")
    after = np.asarray(pipe.sample(**CALL))
    assert 0 < np.abs(after - before).max() < np.abs(before).max()
    np.testing.assert_array_equal(after, pipe.sample(**CALL))


def test_loaded_in_eight_bits(words, tmp_path):
    pipe = tiny.pipeline(words)
    pipe.save(tmp_path / "model")
    pipe.quantize("fp8")
    again = jaxsd.load(tmp_path / "model", quantize="fp8")
    assert again.quantised and again.params["unet"].keys() == pipe.params["unet"].keys()
    for name, value in pipe.params["unet"].items():
        got = again.params["unet"][name]
        np.testing.assert_array_equal(value.astype(jnp.float32), got.astype(jnp.float32))


def test_half_precision_stays_the_dtype_of_computing(words, tmp_path):
    tiny.pipeline(words).save(tmp_path / "model")
    pipe = jaxsd.load(tmp_path / "model", dtype=jnp.bfloat16, quantize="int8")
    net = pipe.unet
    x = jnp.zeros((1, 4, 4, 4), jnp.bfloat16)
    text = pipe.encode(["nine"])["encoder_hidden_states"].astype(jnp.bfloat16)
    seen = jax.eval_shape(net, pipe.params["unet"], x, jnp.zeros(1), text)
    assert seen.dtype == jnp.bfloat16


@pytest.mark.parametrize("form", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_restored_weights_do_not_outlive_their_layer(form):
    """In a loop over steps the program works with less than all weights restored would take."""
    config = UNetConfig(
        sample_size=4,
        down_block_types=("DownBlock2D",) * 2,
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=2,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=10,
    )
    net = Net(UNet(config))
    params = tiny.parameters(net)
    whole = sum(value.nbytes for value in params.values())

    def steps(params, x, count):
        told = (jnp.zeros(1), None, jnp.zeros((1, 10)))
        return jax.lax.fori_loop(0, count, lambda i, x: net(params, x, *told), x)

    def sizes(params):
        options = {"xla_backend_optimization_level": "3"}
        made = jax.jit(steps).lower(params, jnp.zeros((1, 4, 4, 4)), 3).compile(options)
        found = made.memory_analysis()
        return found.argument_size_in_bytes, found.temp_size_in_bytes

    arguments, temporaries = sizes(quantised(params, form))
    assert arguments < 0.3 * whole
    assert temporaries < 0.15 * whole  # no copy of what is in eight bits, either


# --- What is refused ----------------------------------------------------------------------------


def test_what_cannot_be_done_in_eight_bits(words, tmp_path):
    pipe = tiny.pipeline(words)
    assert "int8 or fp8, not 'int4'" in refused(pipe.quantize, "int4")
    pipe.add_lora(LoRA({}))
    assert "merge the LoRAs first" in refused(pipe.quantize, "int8")
    pipe.merge_loras()
    assert not eight_bits.is_quantised(pipe.params["unet"])
    pipe.quantize("int8")
    assert "already" in refused(pipe.quantize, "int8")
    assert "nothing can be added" in refused(pipe.add_lora, LoRA({}))
    assert "save before quantize()" in refused(pipe.save, tmp_path / "model")


def test_the_command_line_offers_every_form():
    [offered, _] = typing.get_args(typing.get_type_hints(sample.Options)["quantize"])
    assert set(typing.get_args(offered)) == set(eight_bits.FORMS)
