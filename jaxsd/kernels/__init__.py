"""What costs most, each in the form that is fastest for its platform and shape.

`jaxsd.nn` calls these and knows nothing of platforms. A form is chosen while a program is traced,
by the platform that it is for: JAX's default backend or, where a program is compiled ahead of time
for a machine that is not at hand, what `compiling_for` says. Each choice has a line in
docs/performance.md with what it was measured to save.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jaxsd.kernels import cpu, gpu, tpu, tpu_convolution, tpu_feedforward
from jaxsd.kernels.split import in_rows, pieces, rows_each


class Target(NamedTuple):
    """What programs are traced for: "cpu", "gpu" or "tpu", and how arrays [b, h] lie on chips.

    split: None where a program runs on one chip, or it is not known.
    """

    platform: str
    split: NamedSharding | None = None

    @property
    def device(self) -> Any:
        """One of the chips, all of which are of a kind; None where they are not known."""
        if self.split is not None:
            mesh = self.split.mesh
            return mesh.devices.flat[0] if isinstance(mesh, jax.sharding.Mesh) else None
        return jax.devices()[0] if self.platform == jax.default_backend() else None

    @property
    def kind(self) -> str:
        """What JAX calls the chips, such as "TPU v5 lite"; "" where they are not known."""
        return "" if self.device is None else self.device.device_kind


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def told() -> Target | None:
    """What `compiling_for` says; None outside of it."""
    return _target.get()


def target() -> Target:
    """What the program being traced is for: JAX's default backend unless `compiling_for` says."""
    return told() or Target(jax.default_backend())


def platform() -> str:
    """What the program being traced is for: "cpu", "gpu" or "tpu"."""
    return target().platform


@contextlib.contextmanager
def compiling_for(platform: str, split: NamedSharding | None = None) -> Iterator[None]:
    """Programs traced in this context are for this platform, which need not be the process' own.

    split: how batches and heads (arrays [b, h]) lie on several chips. A program for several is
    told so here, or its attention is XLA's, which is slower on TPUs. For "any" attention and
    convolution are JAX's own, which every platform can compute.
    """
    token = _target.set(Target(platform, split))
    try:
        yield
    finally:
        _target.reset(token)


def _for_tpus() -> bool:
    """Whether a kernel for TPUs may be used.

    Where it may be for several chips, and not known how, XLA can divide its own operations only.
    """
    return platform() == "tpu" and (told() is not None or jax.device_count() == 1)


def _in_rows_alone() -> bool:
    """Whether a kernel for TPUs may be used that leaves channels in one piece."""
    return _for_tpus() and pieces(target().split, 1) == 1


def compiler_options() -> dict[str, str]:
    """For `jax.jit`, of networks that are large and need no gradient.

    On CPU: on all cores, where a picture's bits do not depend on its place in the batch then, and
    in the order that takes the least memory. The default runs ahead where it can, and holds twice
    as much of Stable Diffusion for no gain in time.
    """
    if platform() != "cpu":
        return {}
    all_cores = cpu.all_cores() if cpu.pictures_alike() else {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", **all_cores}


def jit(function: Callable[..., Any]) -> jax.stages.Wrapped:
    """`jax.jit` of a network that needs no gradient."""
    return jax.jit(function, compiler_options=compiler_options())


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
    if not causal and _for_tpus() and tpu.attends(q, k):
        return tpu.attention(q, k, v, target().split, target().kind)
    if platform() == "gpu" and gpu.flash(target().device, q.shape, k.shape[1], q.dtype):
        return gpu.attention(q, k, v, causal)
    with jax.numpy_dtype_promotion("standard"):  # of bfloat16's scores to float32, inside
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


def moments(
    x: Float[Array, "b *space c"], groups: int
) -> tuple[Float[Array, "b groups"], Float[Array, "b groups"]]:
    """Mean and variance over space and each group of channels, of float32."""
    if platform() == "gpu":
        return gpu.moments(x, groups)

    mean = _grouped_mean(x, groups)
    each = jnp.repeat(mean, x.shape[-1] // groups, axis=-1)
    each = each.reshape(len(x), *[1] * (x.ndim - 2), -1)
    return mean, _grouped_mean(jnp.square(x - each), groups)


def _grouped_mean(x: jax.Array, groups: int) -> jax.Array:
    # Channels are summed over space first: splitting the big tensor's last axis into groups costs
    # a copy on every backend.
    means = x.mean(tuple(range(1, x.ndim - 1)))
    return means.reshape(len(x), groups, -1).mean(-1)


def linear(
    x: Float[Array, "... i"], weight: Float[Array, "o i"], parts: int = 1
) -> list[Float[Array, "... p"]]:
    """x weight^T, the outputs in equal parts."""
    x = in_rows(x, target().split)
    if platform() == "tpu":
        # Of axes as they are, which XLA lays out as what follows wants them; and each part a
        # product of its own, at whose end is done what is done to the part.
        dimensions = (((x.ndim - 1,), (1,)), ((), ()))
        y = [jax.lax.dot_general(x, part, dimensions) for part in jnp.split(weight, parts)]
        return [checkpoint_name(part, "linear") for part in y]
    # Flat, because XLA's CPU backend takes a fast matrix product only for two plain axes: three
    # times faster through the gradient than contracting "...i,oi->...o". Named (for
    # `nn.rematerialise`) as a whole: of parts a copy would be kept.
    flat = checkpoint_name(x.reshape(-1, x.shape[-1]) @ weight.T, "linear")
    return jnp.split(flat.reshape(*x.shape[:-1], flat.shape[-1]), parts, -1)


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), computed in float32."""
    y = x.astype(jnp.float32)
    if platform() == "tpu" and x.dtype == jnp.bfloat16:
        return (y * tpu.normal_cdf(y)).astype(x.dtype)
    # By erf, as in torch: jax's own takes erfc, which is three times the work for a TPU.
    return (0.5 * y * (1 + jax.lax.erf(math.sqrt(0.5) * y))).astype(x.dtype)


def convolution(
    x: Float[Array, "b h w i"],
    weight: Float[Array, "o i kh kw"],
    bias: Float[Array, " o"] | None,
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
    gradient: bool = False,
) -> Float[Array, "b h2 w2 o"]:
    """The convolution of pictures with kernels in torch's layout.

    gradient: in the form of which both passes are fastest.
    """
    x = in_rows(x, target().split)
    kind = (weight.shape[2:], stride, padding)
    if kind == ((3, 3), 1, ((1, 1), (1, 1))) and platform() == "cpu":
        if form := cpu.convolves(x.shape, x.dtype, len(weight), gradient):
            # A gradient finds what was given, and nothing of the much that is made on the way.
            return jax.checkpoint(form)(x, weight, bias)
    if kind == ((1, 1), 1, ((0, 0), (0, 0))):
        y = (x.reshape(-1, x.shape[-1]) @ weight[:, :, 0, 0].T).reshape(*x.shape[:-1], -1)
    else:
        # Transposed here, because XLA's CPU backend has a fast convolution for this order of axes
        # only, and puts others into it outside of loops only: ten times slower inside them.
        y = jax.lax.conv_general_dilated(
            x,
            weight.transpose(2, 3, 1, 0),
            window_strides=(stride, stride),
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    return y if bias is None else y + bias.reshape(1, 1, 1, -1)


def fuses_convolution(x: Float[Array, "b h w i"], outputs: int) -> bool:
    """Whether `normed_convolution` is faster than what it is made of, for so many channels."""
    rows = rows_each(len(x), target().split)
    shape = (rows, *x.shape[1:])
    return _in_rows_alone() and tpu_convolution.convolves(shape, outputs, x.dtype, target().kind)


def fuses_feed_forward(x: Float[Array, "b t c"]) -> bool:
    """Whether `feed_forward` is faster than what it is made of."""
    return _in_rows_alone() and tpu_feedforward.feeds(x.shape, x.dtype, target().kind)


def normed_convolution(
    x: Float[Array, "b h w i"],
    scale: Float[Array, "b i"],
    shift: Float[Array, "b i"],
    weight: Float[Array, "o i 3 3"],
    bias: Float[Array, "b o"],
    residual: Float[Array, "b h w o"] | None,
) -> Float[Array, "b h w o"]:
    """convolution(silu(x scale + shift)) + bias + residual; where `fuses_convolution`."""
    given = (x, scale, shift, weight, bias, residual)
    return tpu_convolution.convolution(*given, target().split)


def feed_forward(
    x: Float[Array, "b t c"], weights: tpu_feedforward.Weights, eps: float
) -> Float[Array, "b t c"]:
    """x + outer(GEGLU(LayerNorm(x))), eps of LayerNorm; where `fuses_feed_forward`."""
    return tpu_feedforward.feed_forward(x, weights, eps, target().split)
