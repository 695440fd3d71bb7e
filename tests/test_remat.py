"""What is computed again gives the same gradients, and less is stored for them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals
from toy import Regression

from jaxsd import kernels, training
from jaxsd.editing import editor
from jaxsd.models import AutoencoderKL, CLIPTextModel, UNet
from jaxsd.models.blocks import ResnetBlock
from jaxsd.models.transformer import Transformer2D
from jaxsd.nn import Net, rematerialise
from jaxsd.training import Options, placement

KEY = jax.random.key(0)
MODES = ("none", "selective", "full")
TOLERANCE = 1e-6  # of the longest gradient


def unet():
    net = Net(UNet(dataclasses.replace(tiny.LATENT_UNET, dropout=0.2)))
    x = jax.random.normal(KEY, (2, 4, 4, 4))
    text = {"encoder_hidden_states": jax.random.normal(KEY, (2, 5, 8))}

    def loss(params):
        t = jnp.array([10.0, 900.0])
        return jnp.square(net(params, x, t, dropout_key=KEY, **text)).sum()

    return net, loss


def vae():
    net = Net(AutoencoderKL(tiny.VAE_CONFIG))
    picture = jnp.asarray(tiny.pictures(2))

    def loss(params):
        mean, _ = net(params, picture, method="encode")
        return jnp.square(net(params, mean, method="decode") - picture).sum()

    return net, loss


def text_tower():
    net = Net(CLIPTextModel(tiny.TEXT))
    ids = jnp.arange(8).reshape(2, 4)
    return net, lambda params: jnp.square(net(params, ids)).sum()


class Blocks(nnx.Module):
    """One of each that a UNet has, with dropout."""

    def __init__(self):
        self.resnet = ResnetBlock(4, 8, 4, 1e-5, 6, dropout=0.2)
        self.transformer = Transformer2D(8, 8, 2, 1, 4, dropout=0.2)

    def __call__(self, x, time, text):
        return self.transformer(self.resnet(x, time), text)


def within(mode, loss):
    def traced(*given):
        with rematerialise(mode):
            return loss(*given)

    return traced


@pytest.mark.parametrize("make", [unet, vae, text_tower])
def test_less_is_stored(make, capsys):
    net, loss = make()
    params = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in net.shapes.items()}
    stored = {}
    for mode in MODES:
        print_saved_residuals(within(mode, loss), params)
        stored[mode] = size(capsys.readouterr().out)
    assert stored["full"] < stored["selective"] < stored["none"] / 2


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_of_a_wide_convolution_its_result_is_stored(platform, capsys):
    """In whatever form it comes: nothing of the pixels or the weights transformed on the way."""
    net = Net(ResnetBlock(192, 192, 32, 1e-5, 6))
    params = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in net.shapes.items()}
    given = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(2, 32, 32, 192), (2, 6)])
    loss = within("selective", lambda *given: net(*given).sum())
    with kernels.compiling_for(platform):
        print_saved_residuals(loss, params, *given)
    products = 2 * 192  # of the time embedding
    constants = 16 * 9 if platform == "cpu" else 0  # of a transform
    assert size(capsys.readouterr().out) == 2 * 32 * 32 * 192 + products + constants


def test_gradients_are_the_same():
    """With dropout: another mask would be another loss."""
    net, found = Net(Blocks()), {}
    params = tiny.parameters(net)
    shapes = (2, 4, 4, 4), (2, 6), (2, 5, 8)
    inputs = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]

    def loss(params):
        return jnp.square(net(params, *inputs, dropout_key=KEY)).sum()

    for mode in MODES:
        slope = jax.value_and_grad(within(mode, loss))
        found[mode] = jax.jit(slope, compiler_options=told(mode))(params)
    value, want = found["none"]
    for mode in MODES[1:]:
        np.testing.assert_allclose(found[mode][0], value, rtol=TOLERANCE)
        assert_close(found[mode][1], want)


class Tower(Regression):
    """Trains a text tower."""

    def __init__(self):
        super().__init__()
        self.net = Net(CLIPTextModel(dataclasses.replace(tiny.TEXT, num_hidden_layers=3)))

    def init(self, key):
        return tiny.parameters(self.net)

    def loss(self, params, aux, batch, now):
        return jnp.square(self.net(params, batch)).mean(), {}


def test_a_step_is_the_same_and_works_with_less_memory():
    """As training compiles and runs it, on the backend that would undo it untold."""
    ids = jnp.arange(64 * 16, dtype=jnp.int32).reshape(64, 16) % 500
    states, metrics, memory = {}, {}, {}
    for mode in MODES:
        options = Options(8, batch_size=64, warmup_steps=0, max_grad_norm=0.0, remat=mode)
        objective, optimizer = Tower(), training.make_optimizer(options)
        mesh = placement.make_mesh(options, jax.devices()[:1])
        state, aux = placement.place_state(objective, optimizer, options, mesh)
        step = training.make_step(objective, optimizer, options)
        program = placement.compile_step(step, state, options).lower(state, aux, ids).compile()
        memory[mode] = program.memory_analysis().temp_size_in_bytes
        states[mode], metrics[mode] = program(state, aux, ids)
    assert memory["full"] < memory["selective"] < memory["none"]
    # Adam's first moment is a tenth of the gradient; its update would magnify rounding
    moments = {mode: optax.tree_utils.tree_get(states[mode].opt_state, "mu") for mode in MODES}
    for mode in MODES[1:]:
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(metrics[mode][name], metrics["none"][name], rtol=TOLERANCE)
        assert_close(moments[mode], moments["none"])


def test_a_training_of_an_editor_works_with_less_memory():
    ids = jnp.arange(64 * 16, dtype=jnp.int32).reshape(64, 16) % 500
    memory = {}
    for mode in MODES:
        options = Options(8, batch_size=64, remat=mode)
        run = editor._Training(Tower(), options)
        state, aux = training.init_state(run.objective, training.make_optimizer(options), options)
        program = run._step.lower(state, aux, ids).compile()
        memory[mode] = program.memory_analysis().temp_size_in_bytes
    assert memory["full"] < memory["selective"] < memory["none"]


def told(mode):
    return training.compiler_options(Options(8, remat=mode), "cpu")


def assert_close(got, want):
    # To the longest of all: a bias before a norm has a gradient whose terms cancel
    longest = max(np.abs(gradient).max() for gradient in want.values())
    for name, gradient in want.items():
        assert np.abs(got[name] - gradient).max() <= TOLERANCE * longest, name


def size(printed: str) -> int:
    """Of residuals but the arguments, each in a line as "f32[2,4,8] output of ..."."""
    lines = [line for line in printed.splitlines() if "from the argument" not in line]
    shapes = [line.split("]")[0].split("[")[1].split(",") for line in lines]
    return sum(math.prod(int(n) for n in shape if n) for shape in shapes)
