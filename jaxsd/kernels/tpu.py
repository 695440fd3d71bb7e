"""Attention for TPUs: a Pallas kernel whose scores never leave the chip's vector memory.

Everything is transposed. Heads of 40 to 160 channels would fill the 128 lanes of a tile badly, so
these hold positions instead: q and v are [d, positions], scores are [keys, queries], and the
product with v streams d rows, not 128, through the matrix unit. XLA lays projections out like
this without a copy. Softmax is Milakov & Gimelshein's (1805.02867), to base 2 as the chip has it;
gradients compute the scores again, as in Dao et al. 2022 (2205.14135).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxsd.kernels.split import divides

LANES = 128
QUERIES = 1024  # most at a time
KEYS = 128  # at a time, or twice as many
WIDE = ("TPU v6 lite", "TPU v6e")  # chips whose matrix unit adds up 256 products
UNROLLED = 32  # most blocks of keys in straight code, where the compiler overlaps neighbours
MASKED = -1e30  # the score of a key that is padding: as -inf, but without nan

# For `jax.jit`, where weights are split. The compiler would compute a layer in as many slices as
# there are pieces, each while the next piece is on its way: 20 channels for a matrix unit of 128.
# Where an operand has fewer MiB than this, which all have, it gathers the weight first.
GATHERED = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


# Bytes of vector memory of each core, by what JAX calls a chip. v5e and v6e have most.
_VECTOR_MEMORY = {
    128 << 20: ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e"),
    64 << 20: ("TPU v5", "TPU v5p", "TPU7x"),
}


def vector_memory(kind: str) -> int:
    """Bytes of vector memory of a core of this kind of chip; what all have, where not known."""
    return next((size for size, kinds in _VECTOR_MEMORY.items() if kind in kinds), 16 << 20)


def attends(q: jax.Array, k: jax.Array) -> bool:
    """Whether there are so many scores that XLA, which writes them to memory, is slower.

    And what the kernel holds of keys and values fits: all of a head's, and twice.
    """
    keys, d = k.shape[1], q.shape[3]
    fits = keys <= 1 << 14 and d <= 256 and q.dtype in (jnp.bfloat16, jnp.float32)
    return fits and q.shape[1] * keys >= 1 << 20


def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    split: NamedSharding | None = None,
    kind: str = "",
    interpret: bool = False,
) -> Float[Array, "b t h d"]:
    """softmax(q k^T / sqrt(d)) v.

    split: of [b, h], over several chips, each of which computes its own: XLA itself can divide no
    kernel. An axis that does not divide stays whole. kind: of chip, as JAX calls it, which decides
    how many keys are taken at a time. interpret: on any machine, slowly.
    """
    local = functools.partial(_local, kind=kind, interpret=interpret)
    if split is None:
        return local(q, k, v)
    rows, heads = (*tuple(split.spec), None, None)[:2]
    rows = rows if divides(split, rows, q.shape[0]) else None
    heads = heads if divides(split, heads, q.shape[2]) else None
    spec = PartitionSpec(rows, None, heads, None)
    shared = jax.shard_map(local, mesh=split.mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return shared(q, k, v)


def _local(q: jax.Array, k: jax.Array, v: jax.Array, kind: str, interpret: bool) -> jax.Array:
    (_, t, _, d), s = q.shape, k.shape[1]
    q = (q * jnp.float32(d**-0.5 * math.log2(math.e)).astype(q.dtype)).transpose(0, 2, 3, 1)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 3, 1)
    q = _pad(q, 3, _block(t, QUERIES, LANES)[1])
    padded = _block(s, UNROLLED * KEYS, KEYS)[1]
    # Twice as many, where they cover the keys in as many pieces of straight code
    most = 2 * KEYS if _block(padded, UNROLLED * KEYS, 2 * KEYS)[1] == padded else KEYS
    blocks = most if d >= 64 or kind in WIDE else KEYS, most if kind in WIDE else KEYS
    o: Any = _attend(q, _pad(k, 2, padded), _pad(v, 3, padded), s, blocks, interpret)
    return o[..., :t].transpose(0, 3, 1, 2)


# Of log(Phi(x) / Phi(-x)) / x in powers of x^2, so fitted that x Phi(x) is off by 3.1e-6 at most.
_LOGIT = (1.5956562720, 0.0729375821, -2.4972336081e-4, -6.1161994995e-5, 2.2381633576e-6)
TO_POWER = -math.log2(math.e)  # e^-x is 2 to the power of x times this


def normal_cdf(x: jax.Array) -> jax.Array:
    """Phi(x) in float32 for what is rounded to bfloat16 then, in half the operations of erf's."""
    return jax.nn.sigmoid(normal_logit(x))


def normal_logit(x: jax.Array, times: float = 1.0) -> jax.Array:
    """log(Phi(x) / Phi(-x)), by which `normal_cdf` is the logistic function's, times a constant."""
    powers = [power * times for power in _LOGIT]
    square = jnp.minimum(x * x, 36.0)  # beyond, all of Phi is decided
    return x * functools.reduce(lambda sum, c: sum * square + c, powers[-2::-1], powers[-1])


def sigmoid(power: jax.Array) -> jax.Array:
    """In a kernel, 1 / (1 + e^-x), power = TO_POWER x, for what is rounded to bfloat16 then."""
    return pl.reciprocal(1 + jnp.exp2(power), approx=True)


def _block(size: int, most: int, unit: int) -> tuple[int, int]:
    """The size of equal blocks, multiples of a unit up to a most, and what they cover together."""
    count = -(-size // most)
    block = -(-size // (count * unit)) * unit
    return block, count * block


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)])


# --- The gradient ----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(q: Any, k: Any, v: Any, keys: int, blocks: tuple[int, int], interpret: bool) -> Any:
    """q [b, h, d, t], k [b, h, s, d], v [b, h, d, s] -> [b, h, d, t], of the first `keys` keys.

    blocks: how many of which are taken at a time, and for the gradient, which holds more of each.
    """
    return _forward(q, k, v, keys, blocks[0], interpret)[0]


def _attend_forward(
    q: Any, k: Any, v: Any, keys: int, blocks: tuple[int, int], interpret: bool
) -> Any:
    # Named for `nn.rematerialise`: "selective" need not run the kernel again for these.
    made = _forward(q, k, v, keys, blocks[0], interpret)
    o, log_sum = (checkpoint_name(x, "attention") for x in made)
    return o, (q, k, v, o, log_sum)


def _attend_backward(
    keys: int, blocks: tuple[int, int], interpret: bool, kept: Any, do: Any
) -> Any:
    return _backward(kept, do, keys, blocks[1], interpret)


_attend.defvjp(_attend_forward, _attend_backward)


# --- The kernels -----------------------------------------------------------------------------


def _forward(
    q: Any, k: Any, v: Any, keys: int, block: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The attention, and for each query log2 of its sum of 2^score [b, h, 1, t], in float32."""
    b, h, d, t = q.shape
    s = k.shape[2]
    rows, _ = _block(t, QUERIES, LANES)

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, log_ref: Any) -> None:
        queries = q_ref[0, 0]

        def step(carry: Any, scores: jax.Array, at: Any) -> Any:
            most, total, o = carry
            now = jnp.maximum(most, scores.max(0, keepdims=True))
            weights, less = jnp.exp2(scores - now), jnp.exp2(most - now)
            values = v_ref[0, 0, :, pl.ds(at, block)]
            total = total * less + weights.reshape(-1, 8, rows).sum(0)
            return now, total, o * less + product(values, weights.astype(values.dtype))

        start = (
            jnp.full((1, rows), MASKED, jnp.float32),
            jnp.zeros((8, rows), jnp.float32),  # a tile, whose rows are added up at the end
            jnp.zeros((d, rows), jnp.float32),
        )

        def scores(at: Any) -> jax.Array:
            return _scores(k_ref, queries, at, block, keys)

        most, total, o = _over_keys(step, start, scores, s, block)
        total = total.sum(0, keepdims=True)
        o_ref[0, 0] = (o / total).astype(o_ref.dtype)
        log_ref[0, 0] = most + jnp.log2(total)

    return pl.pallas_call(
        kernel,
        grid=(b, h, t // rows),
        in_specs=[_some(d, rows), _all(s, d), _all(d, s)],
        out_specs=[_some(d, rows), _some(1, rows)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32),
        ],
        compiler_params=_options(k, v, scratch=0),
        cost_estimate=_cost(2, q, k),
        interpret=interpret,
    )(q, k, v)


def _backward(
    kept: tuple[Any, ...], do: Any, keys: int, block: int, interpret: bool
) -> tuple[jax.Array, ...]:
    """The gradients of q, k and v, in their shapes: k's and v's are summed over blocks of q."""
    q, k, v, o, log_sum = kept
    k_t, v_t = (x.swapaxes(2, 3) for x in (k, v))
    b, h, d, t = q.shape
    s = k.shape[2]
    rows = next(rows for rows in range(QUERIES // 2, 0, -LANES) if t % rows == 0)
    log_2 = math.log(2)

    def kernel(*refs: Any) -> None:
        q_ref, k_ref, k_t_ref, v_t_ref, o_ref, do_ref, log_ref, dq_ref, dk_ref, dv_ref = refs[:10]
        dk_sum, dv_sum = refs[10:]
        queries, d_out, log_sum = q_ref[0, 0], do_ref[0, 0], log_ref[0, 0]
        of_out = d_out.astype(jnp.float32) * o_ref[0, 0].astype(jnp.float32)
        of_out = of_out.sum(0, keepdims=True)

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            dk_sum[...] = jnp.zeros_like(dk_sum)
            dv_sum[...] = jnp.zeros_like(dv_sum)

        def products(at: Any) -> Any:
            d_weights = product(v_t_ref[0, 0, pl.ds(at, block), :], d_out)
            return _scores(k_ref, queries, at, block, keys), d_weights

        def step(dq: jax.Array, made: Any, at: Any) -> jax.Array:
            scores, d_weights = made
            here = (slice(None), pl.ds(at, block))
            weights = jnp.exp2(scores - log_sum)
            d_scores = (weights * (d_weights - of_out)).astype(queries.dtype)
            dv_sum[here] += product(d_out, weights.astype(d_out.dtype), 1)
            dk_sum[here] += product(queries, d_scores, 1)
            return dq + product(k_t_ref[0, 0, :, pl.ds(at, block)], d_scores)

        dq = _over_keys(step, jnp.zeros((d, rows), jnp.float32), products, s, block)
        dq_ref[0, 0] = (dq * log_2).astype(dq_ref.dtype)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _() -> None:
            dk_ref[0, 0] = (dk_sum[...] * log_2).astype(dk_ref.dtype)
            dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)

    some, single, whole = _some(d, rows), _some(1, rows), _all(d, s)
    dq, dk, dv = pl.pallas_call(
        kernel,
        grid=(b, h, t // rows),
        in_specs=[some, _all(s, d), whole, _all(s, d), some, some, single],
        out_specs=[some, whole, whole],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k_t, k_t)],
        scratch_shapes=[pltpu.VMEM((d, s), jnp.float32)] * 2,
        compiler_params=_options(k, k_t, v_t, k_t, k_t, scratch=2 * d * s * 4),
        cost_estimate=_cost(5, q, k),
        interpret=interpret,
    )(q, k, k_t, v_t, o, do, log_sum)
    return dq, dk.swapaxes(2, 3), dv


def _scores(k_ref: Any, queries: jax.Array, at: Any, block: int, keys: int) -> jax.Array:
    """Of a block of keys, of which there are `keys`, in float32."""
    scores = product(k_ref[0, 0, pl.ds(at, block), :], queries)
    if k_ref.shape[2] == keys:
        return scores
    key = at + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return jnp.where(key < keys, scores, MASKED)


def product(a: jax.Array, b: jax.Array, axis: int = 0) -> jax.Array:
    """In a kernel, a's last axis with one of b's, summed in float32."""
    dimensions = (((1,), (axis,)), ((), ()))
    # Products of bfloat16 are exact, and Mosaic refuses to be asked for more
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _over_keys(step: Callable, carry: Any, products: Callable, size: int, block: int) -> Any:
    """carry = step(carry, products(at), at) for each block of keys, which begins `at`.

    The products of the next block come before the step of this one, in which the matrix unit has
    little to do: the compiler does both at once, but does not look so far ahead by itself.
    """
    straight, covered = _block(size, UNROLLED * KEYS, block)
    assert covered == size

    def some(i: Any, carry: Any) -> Any:
        starts = [pl.multiple_of(i * straight, LANES) + at for at in range(0, straight, block)]
        made = products(starts[0])
        for at, later in zip(starts, [*starts[1:], None], strict=True):
            ahead = None if later is None else products(later)
            carry, made = step(carry, made, at), ahead
        return carry

    return jax.lax.fori_loop(0, size // straight, some, carry)


def _some(channels: int, rows: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, channels, rows), lambda row, head, i: (row, head, 0, i))


def _all(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, *shape), lambda row, head, i: (row, head, 0, 0))


def _options(*whole: jax.Array, scratch: int) -> pltpu.CompilerParams:
    """whole: arrays of which a head is in vector memory at once, and the next one on its way."""

    def tiled(x: jax.Array) -> int:
        rows, columns = x.shape[2:]
        return -(-rows // 16) * 16 * -(-columns // LANES) * LANES * x.dtype.itemsize

    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=(16 << 20) + 2 * sum(map(tiled, whole)) + scratch,
    )


def _cost(products: int, q: jax.Array, k: jax.Array) -> pl.CostEstimate:
    scores = k.shape[2] * q.size // q.shape[2]
    moved = (2 * q.size + 2 * k.size) * q.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * products * scores * q.shape[2], transcendentals=scores, bytes_accessed=moved
    )
