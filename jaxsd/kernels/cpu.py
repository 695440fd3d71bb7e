"""Forms for XLA's CPU backend, whose matrix product is fast and whose other kernels are not.

All of it is plain JAX: products of plain matrices, in pieces that fit the caches.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Rows of queries at a time: as many as make scores of this size with all keys.
SCORES = 1 << 21

# YNNPACK's kernels, the compiler's first choice, without that for convolutions
PRODUCTS_AND_SUMS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,"
    "LIBRARY_FUSION_TYPE_REDUCE"
}


@functools.cache
def all_cores() -> dict[str, str]:
    """For `jax.jit`: convolutions by Eigen on all cores, where YNNPACK's would use one.

    Nothing where the installed jaxlib does not know that choice, which calls itself experimental.
    """
    try:
        program = jax.jit(lambda x: x, compiler_options=PRODUCTS_AND_SUMS)
        program.lower(np.float32(0)).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return PRODUCTS_AND_SUMS


@functools.cache
def pictures_alike() -> bool:
    """Whether, with `all_cores`, a picture's bits do not depend on its place in the batch.

    With AVX-512 they do not. With AVX2 the last pixels of a batch, where they do not fill a block,
    are added up in another order. Of other processors it is not known. (YNNPACK's never do.)
    """
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text().split()
    except OSError:  # not Linux
        return False


def attends_in_blocks(shape: tuple[int, ...], keys: int) -> bool:
    """Whether scores are so many that to hold them all costs more than a loop over blocks."""
    b, t, h, _ = shape
    return t * keys >= 1 << 16 and b * h * t * keys >= 1 << 20


def attention(
    q: Float[Array, "b t h d"], k: Float[Array, "b s h d"], v: Float[Array, "b s h d"]
) -> Float[Array, "b t h d"]:
    """Some queries of one head at a time, with all keys.

    The scores of one block are all that exist at once, in gradients too, which compute them again.
    (Over several devices it is computed on each: real ones are not CPUs.)
    """
    b, t, h, d = q.shape
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(b * h, x.shape[1], d) for x in (q, k, v))
    rows = min(t, 1 << max(0, (SCORES // k.shape[1]).bit_length() - 1))
    count = -(-t // rows)
    q = jnp.pad(q, ((0, 0), (0, count * rows - t), (0, 0)))
    k = k.transpose(0, 2, 1)

    @jax.checkpoint
    def block(i: jax.Array) -> jax.Array:
        head, start = i // count, i % count * rows
        queries = jax.lax.dynamic_slice(q, (head, start, 0), (1, rows, d))[0]
        scores = jnp.matmul(queries, k[head], preferred_element_type=jnp.float32)
        scores = scores * np.float32(d**-0.5)  # not the queries, which bfloat16 would round again
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1, keepdims=True)
        weights = weights.astype(v.dtype)
        values = jnp.matmul(weights, v[head], preferred_element_type=jnp.float32)
        return (values / total).astype(v.dtype)

    blocks = jax.lax.map(block, jnp.arange(b * h * count))
    return blocks.reshape(b, h, count * rows, d)[:, :, :t].transpose(0, 2, 1, 3)


def zero_of(x: jax.Array) -> jax.Array:
    """int32 0, by way of x: what it is added to stays in the loop that makes x.

    What does not change XLA would compute before the loop, and keep. (On CPU it drops barriers too
    soon for them to be of use.) 0 also where x is not a number. The first entry of x must not be
    known, such as that of what is padded.
    """
    return jnp.minimum(jnp.abs(x.reshape(-1)[0]), 0).astype(jnp.int32)


def convolves(
    shape: tuple[int, ...], dtype: Any, outputs: int, gradient: bool = False
) -> Callable | None:
    """What computes a 3x3 convolution of this shape fastest, or None: the compiler's own does.

    gradient: of both passes, there and back.
    """
    b, h, w, inputs = shape
    pixels, channels = b * h * w, min(inputs, outputs)
    if dtype != jnp.float32 or channels < 64:
        return None
    if channels < 160:
        # Transforms weigh as much as products, unless there are many pixels and caches hold them.
        # Those of gradients compile for longer than they save.
        return winograd if 4096 <= pixels <= 1 << 14 and not gradient else None
    if pixels >= (1024 if gradient else 256):
        return winograd
    # Transforming the weights (and in a gradient theirs) would cost more than it saves. Where they
    # are more than the pixels they stay as they lie, and the pixels are put in their order.
    return gathered if pixels <= channels else None


def gathered(
    x: Float[Array, "b h w i"], weight: Float[Array, "o i 3 3"], bias: Float[Array, " o"] | None
) -> Float[Array, "b h w o"]:
    """As one matrix product: each pixel's neighbourhood, in the order of torch's kernels."""
    b, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    around = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    rows = jnp.stack(around, -1).reshape(b * h * w, -1)
    y = rows @ weight.reshape(len(weight), -1).T
    return (y if bias is None else y + bias[None]).reshape(b, h, w, -1)


# Lavin & Gray 2015 (1509.09308), F(2x2, 3x3): the kernel's transform, and how inputs and outputs
# are combined is written out below, for it is all additions.
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)


def _tiles(pixels: int) -> int:
    """Tiles times channels that are transformed at a time.

    Small pictures as they are, nearly; of large ones, which come from memory, what caches hold.
    """
    return 1 << (21 if pixels <= 1 << 14 else 18)


def winograd(
    x: Float[Array, "b h w i"], weight: Float[Array, "o i 3 3"], bias: Float[Array, " o"] | None
) -> Float[Array, "b h w o"]:
    """Sixteen products for four pixels, where the definition has thirty-six.

    In bands of rows, so that what is transformed stays in the caches and small.
    """
    b, h, w, inputs = x.shape
    outputs = len(weight)
    down, across = -(-h // 2), -(-w // 2)
    band = max(1, min(down, _tiles(b * h * w) // (b * across * (inputs + outputs))))
    bands = -(-down // band)
    band = -(-down // bands)  # as equal as can be
    below = 2 * band * bands - h
    # Once before a loop over steps, or, where little would be saved, in each step: what is
    # transformed takes 16/9 of the weights, and most of these are in convolutions of few pixels.
    kernels = _transformed(weight, None if b * h * w >= 8 * min(inputs, outputs) else x)
    x = jnp.pad(x, ((0, 0), (1, 1 + below), (1, 1 + w % 2), (0, 0)))

    def one(i: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x, 2 * band * i, 2 * band + 2, 1)
        tile = [
            [part[:, r : r + 2 * band : 2, c : c + 2 * across : 2] for c in range(4)]
            for r in range(4)
        ]
        rows = [_spread(*column) for column in zip(*tile, strict=True)]  # of each column
        spread = [_spread(*row) for row in zip(*rows, strict=True)]
        flat = [[s.reshape(-1, inputs) for s in row] for row in spread]
        products = [[flat[r][c] @ kernels[4 * r + c].T for c in range(4)] for r in range(4)]
        pairs = [_gather(*column) for column in zip(*products, strict=True)]
        pixels = [jnp.stack(_gather(*row), 1) for row in zip(*pairs, strict=True)]
        y = jnp.stack(pixels, 1)
        if bias is not None:  # here: added afterwards, it would be a second copy of all pixels
            y = y + bias.reshape(1, 1, 1, -1)
        y = y.reshape(b, band, across, 2, 2, outputs)
        return y.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * band, 2 * across, outputs)

    if bands == 1:
        return one(jnp.int32(0))[:, :h, :w]
    y = jax.lax.map(jax.checkpoint(one), jnp.arange(bands)).swapaxes(0, 1)
    return y.reshape(b, -1, 2 * across, outputs)[:, :h, :w]


def _transformed(weight: Float[Array, "o i 3 3"], x: jax.Array | None) -> Float[Array, "16 o i"]:
    """The kernels' transform, with an `x` in the loop that makes it."""
    matrix: Any = np.einsum("ai,bj->abij", _KERNEL, _KERNEL).reshape(16, 9)
    if x is not None:
        matrix = matrix + zero_of(x).astype(jnp.float32)
    flat = weight.reshape(-1, 9)
    return jax.lax.dot_general(matrix, flat, (((1,), (1,)), ((), ()))).reshape(
        16, *weight.shape[:2]
    )


def _spread(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, ...]:
    return a - c, b + c, c - b, b - d


def _gather(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, ...]:
    return a + b + c, b - c - d
