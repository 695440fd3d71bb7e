"""A training step compiled for chips that are not there: weights gathered, layers in one piece."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from toy import Regression

from jaxsd import kernels, sharding, training
from jaxsd.training.placement import compile_step, make_mesh, spread
from jaxsd.training.step import Aux, state_of

WIDTH = 256


class Convolved(Regression):
    """One convolution, its kernel split by channels of the output."""

    def loss(self, params, aux, batch, now):
        y = kernels.convolution(batch, params["weight"], None, 1, ((1, 1), (1, 1)))
        return jnp.square(y.astype(jnp.float32)).mean(), {}


def test_a_layer_is_not_computed_in_slices(tpus):
    options = training.Options(1, batch_size=64, fsdp=8, dtype="bfloat16", ema_decay=0.0)
    mesh, optimizer = make_mesh(options, tpus("v5e:2x4")), training.make_optimizer(options)
    shape = jax.ShapeDtypeStruct((WIDTH, WIDTH, 3, 3), jnp.float32)
    state = jax.eval_shape(lambda w: state_of({"weight": w}, optimizer), shape)
    state = spread(state, options, mesh)
    rows = NamedSharding(mesh, sharding.ROWS)
    pictures = jax.ShapeDtypeStruct((64, 32, 32, WIDTH), jnp.bfloat16, sharding=rows)
    step = compile_step(training.make_step(Convolved(), optimizer, options), state, options)
    program = step.lower(state, Aux((), {}), pictures).compile().as_text()
    assert re.search(r"all-gather|async-collective", program)
    assert "collective-permute" not in program
    assert len(re.findall(r" convolution\(", program)) == 2  # and the kernel's gradient
