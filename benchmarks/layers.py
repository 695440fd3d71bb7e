"""Layers as they are against the plain way of writing them: forward and backward, or in a loop.

`python benchmarks/layers.py` prints the time of ours as a share of the plain form's, median and
range over interleaved rounds in one run. Absolute times say nothing: they depend on the machine.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import kernels, training
from jaxsd.nn import Conv2d, GroupNorm, Linear, Net

ROUNDS = 15


def plain_linear(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, weight) + bias


def plain_group_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    groups = x.reshape(x.shape[0], -1, 16, x.shape[-1] // 16)
    centred = groups - groups.mean((1, 3), keepdims=True)
    variance = jnp.square(centred).mean((1, 3), keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape) * weight + bias


def plain_conv(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    axes = ("NHWC", "OIHW", "NHWC")
    x = jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=axes)
    return x + bias


def transposed_conv(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """In the order of axes that XLA's CPU backend is fast for, inside of loops too."""
    axes = ("NHWC", "HWIO", "NHWC")
    weight = weight.transpose(2, 3, 1, 0)
    return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=axes) + bias


def step(function: Callable) -> Callable:
    """The gradient of a sum of squares with respect to every argument, compiled."""
    gradient = jax.grad(lambda x, w, b: jnp.square(function(x, w, b)).sum(), argnums=(0, 1, 2))
    told = training.compiler_options(training.Options(8), jax.default_backend())
    return jax.jit(gradient, compiler_options=told)


def in_loop(function: Callable) -> Callable:
    """Four applications inside `fori_loop`, as a sampler applies its network."""

    def loop(x, w, b):
        return jax.lax.fori_loop(0, 4, lambda i, x: jnp.tanh(function(x, w, b)), x)

    return kernels.jit(loop)


def seconds(function: Callable, arguments: tuple[jax.Array, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def compare(
    name: str, ours: Callable, plain: Callable, arguments: tuple, use: Callable = step
) -> None:
    ours, plain = use(ours), use(plain)
    for function in (ours, plain):
        seconds(function, arguments)  # compiles
    ratios = [seconds(ours, arguments) / seconds(plain, arguments) for _ in range(ROUNDS)]
    low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
    print(f"| {name} | {middle:.2f} | {low:.2f} – {high:.2f} |")


def made(layer: Any, shape: tuple[int, ...]) -> tuple[Callable, tuple[jax.Array, ...]]:
    """A layer as a function of an input of this shape, weight and bias; and these."""
    net = Net(layer)
    params = net.init(jax.random.key(1))

    def ours(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return net({"weight": weight, "bias": bias}, x)

    x = jax.random.normal(jax.random.key(0), shape)
    return ours, (x, params["weight"], params["bias"])


def main() -> None:
    print(f"| ours / plain, {jax.devices()[0].device_kind} | median | 10 – 90 % |")
    print("| --- | --- | --- |")
    for shape, outputs in (((64, 64, 64), 512), ((2, 4096, 320), 320)):
        ours, arguments = made(Linear(shape[-1], outputs), shape)
        compare(f"Linear {list(shape)} → {outputs}", ours, plain_linear, arguments)
    for shape in ((64, 8, 8, 64), (2, 64, 64, 320)):
        ours, arguments = made(GroupNorm(16, shape[-1], 1e-5), shape)
        compare(f"GroupNorm {list(shape)}", ours, plain_group_norm, arguments)
    for shape in ((64, 8, 8, 64), (1, 32, 32, 320)):
        ours, arguments = made(Conv2d(shape[-1], shape[-1], 3, padding=1), shape)
        compare(f"Conv2d {list(shape)}", ours, plain_conv, arguments)
        compare(f"Conv2d {list(shape)}, in a loop", ours, plain_conv, arguments, in_loop)
    for shape in ((2, 64, 64, 320), (2, 32, 32, 640), (2, 16, 16, 1280), (2, 8, 8, 1280)):
        ours, arguments = made(Conv2d(shape[-1], shape[-1], 3, padding=1), shape)
        compare(f"Conv2d {list(shape)}, in a loop", ours, transposed_conv, arguments, in_loop)
    for shape, keys in (((2, 4096, 8, 40), 4096), ((2, 1024, 8, 80), 1024), ((2, 4096, 8, 40), 77)):
        q, k, v = (
            jax.random.normal(jax.random.key(i), (shape[0], rows, *shape[2:]))
            for i, rows in enumerate((shape[1], keys, keys))
        )
        name = f"attention {list(shape)} to {keys}"
        compare(name, kernels.attention, jax.nn.dot_product_attention, (q, k, v), jax.jit)


if __name__ == "__main__":
    main()
