"""Attention and convolution, each in the form that is fastest for its platform and shape.

`jaxsd.nn` calls these and knows nothing of platforms. A form is chosen while a program is traced,
by the platform that it is for: JAX's default backend or, where a program is compiled ahead of time
for a machine that is not at hand, what `compiling_for` says. Each choice has a line in
docs/performance.md with what it was measured to save.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsd.kernels import cpu, tpu

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """What the program being traced is for: "cpu", "gpu" or "tpu"."""
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Programs traced in this context are for another platform than this process computes on."""
    token = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(token)


def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    causal: bool = False,
) -> Float[Array, "b t h d"]:
    """softmax(q k^T / sqrt(d)) v for each head, scores and sums in float32."""
    if platform() == "cpu":
        if q.dtype == jnp.float16:  # of which it has no product that is summed in float32
            q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        if not causal and cpu.attends_in_blocks(q.shape, k.shape[1]):
            return cpu.attention(q, k, v)
    if platform() == "tpu" and not causal and tpu.attends(q.shape, k.shape[1]):
        return tpu.attention(q, k, v)
    with jax.numpy_dtype_promotion("standard"):  # of bfloat16's scores to float32, inside
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


def convolution(
    x: Float[Array, "b h w i"],
    weight: Float[Array, "o i kh kw"],
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "b h2 w2 o"]:
    """The convolution of pictures with kernels in torch's layout."""
    same = stride == 1 and weight.shape[2:] == (3, 3) and padding == ((1, 1), (1, 1))
    if same and platform() == "cpu" and (form := cpu.convolution_form(x.shape, x.dtype, weight)):
        return form(x, weight)
    # Transposed here, because XLA's CPU backend has a fast convolution for this order of axes
    # only, and puts others into it outside of loops only: ten times slower inside them.
    return jax.lax.conv_general_dilated(
        x,
        weight.transpose(2, 3, 1, 0),
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
