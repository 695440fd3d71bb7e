"""What the layers compile to."""

import re

import jax
import pytest

from jaxsd.nn import Conv2d, Net


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="looks at what the CPU backend does")
def test_a_convolution_in_a_loop_takes_the_fast_kernel():
    """Its input channels come last but one: XLA's Eigen convolution knows only this order."""
    net = Net(Conv2d(4, 4, 3, padding=1))

    @jax.jit
    def loop(params, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: net(params, x), x)

    params, x = net.init(jax.random.key(0)), jax.numpy.ones((2, 8, 8, 4))
    program = loop.lower(params, x).compile().as_text()
    kernels = re.findall(r"convolution\(.*dim_labels=b01f_(\w+)->b01f", program)
    assert kernels and set(kernels) == {"01io"}, kernels
