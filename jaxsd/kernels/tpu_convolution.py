"""For TPUs, half of a ResNet block in one kernel: affine, SiLU, 3x3 convolution, and what is added.

As in `tpu`, positions lie in the lanes of a tile, and channels, 320 of which fill two and a half
tiles of 128, in the sublanes. Of the product weights [o, 9 i] x shifted pictures [9 i, positions]
only 3 i is filled up to 128 then, where a convolution of XLA fills up both its channels: of 320 it
keeps the matrix unit at 69 % at most, this one at 94 %. The shifted pictures are made in vector
memory while the matrix unit works on those made before.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jaxsd.kernels import tpu
from jaxsd.kernels.split import in_rows, over_rows

GROUP = 16  # channels that are shifted at a time: a tile of bfloat16
POSITIONS = 1024  # whose results are made at a time
CHANNELS = 512  # most of those summed over at a time
MEMORY = 100 << 20  # bytes of vector memory
LIMIT = 110 << 20  # of them, what the compiler makes on the way included


def convolves(shape: tuple[int, ...], outputs: int, dtype: Any, kind: str) -> bool:
    """Whether the kernel is for pictures [b, h, w, i], so many channels of results, and this chip.

    Where both numbers of channels fill tiles of 128, XLA's convolution is as fast.
    """
    b, h, w, i = shape
    if dtype != jnp.bfloat16 or w not in (64, 128) or (h * w) % POSITIONS:
        return False
    if (i % tpu.LANES == 0 and outputs % tpu.LANES == 0) or outputs % GROUP:
        return False
    parts = _parts(i)
    if parts is None or b * parts % 2 != 0:  # works on two at a time
        return False
    return _memory(b, h * w, w, i, outputs) <= MEMORY and LIMIT < tpu.vector_memory(kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def convolution(
    x: Float[Array, "b h w i"],
    scale: Float[Array, "b i"],
    shift: Float[Array, "b i"],
    weight: Float[Array, "o i 3 3"],
    bias: Float[Array, "b o"],
    residual: Float[Array, "b h w o"] | None = None,
    split: NamedSharding | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "b h w o"]:
    """conv(silu(x scale + shift), weight) + bias + residual; scale, shift and bias in float32.

    split: of [b, ...], over several chips, each of which computes its own rows. interpret: on any
    machine, slowly. The gradient is the plain form's.
    """
    kernel = functools.partial(_local, interpret=interpret)
    by_row = (True, True, True, False, True, True)
    return over_rows(kernel, split, len(x), by_row)(x, scale, shift, weight, bias, residual)


def plain(x: Any, scale: Any, shift: Any, weight: Any, bias: Any, residual: Any) -> jax.Array:
    """The same, in XLA's operations."""
    y = jax.nn.silu(x.astype(jnp.float32) * scale[:, None, None] + shift[:, None, None])
    y = jax.lax.conv_general_dilated(
        y.astype(x.dtype),
        weight.transpose(2, 3, 1, 0),
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y.astype(jnp.float32) + bias[:, None, None]
    return (y if residual is None else y + residual.astype(jnp.float32)).astype(x.dtype)


def _forward(*given: Any) -> Any:
    return convolution(*given), given[:6]


def _backward(split: Any, interpret: Any, given: Any, d_out: Any) -> Any:
    x, *others = given
    _, back = jax.vjp(plain, in_rows(x, split), *others)
    return back(d_out)


convolution.defvjp(_forward, _backward)


def _parts(channels: int) -> int | None:
    """In how many parts the channels are taken, whose products are added up."""
    parts = -(-channels // CHANNELS)
    return parts if parts <= 2 and channels % (parts * GROUP) == 0 else None


def _memory(rows: int, positions: int, width: int, channels: int, outputs: int) -> int:
    """Bytes of vector memory: all rows' scale and shift, each filled up to a tile, the shifted
    pictures, and blocks that come and go, each twice."""
    parts = _parts(channels) or 1
    part = channels // parts
    shifted = 2 * sum(3 * part // 2 * 4 * lanes for lanes in _shifted(positions, width))
    results = 2 // parts
    blocks = part * positions + 2 * results * outputs * positions + 9 * channels * outputs
    affine = rows * channels * tpu.LANES * 4
    return affine + shifted + 2 * 2 * blocks + (parts > 1) * outputs * positions * 4


def _shifted(positions: int, width: int) -> list[int]:
    """The lanes of pictures kept for the rows above and below and, where these are no whole tiles
    away, of those kept for a row itself."""
    return [positions + 2 * width] + [positions] * (width % tpu.LANES != 0)


def _local(
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    b, h, w, i = x.shape
    o, positions = len(weight), h * w
    parts = _parts(i)
    assert parts is not None

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(b, positions, -1).swapaxes(1, 2)

    affine = jnp.stack([scale, shift], -1)  # [b, i, 2]
    rows = weight.reshape(o, parts, i // parts, 3, 3).transpose(1, 3, 0, 4, 2)
    rows = rows.reshape(parts, 3, o, 3 * i // parts)  # [part, ky, o, (kx i)]
    more = None if residual is None else flat(residual)
    y = _kernel(flat(x), affine, rows, bias[..., None], more, w, interpret)
    return y.swapaxes(1, 2).reshape(b, h, w, o)


class _Unit(NamedTuple):
    """Where in vector memory a unit of work lies: its x as fetched, and the shifted pictures.

    far [3 i/2, positions + 2 width]: by kx, from a row above the picture to one below it. near: the
    same of the picture alone, where a row is no whole number of tiles. Of 32 bits, in which lie two
    channels, since others cannot be moved along lanes.
    """

    arrived: Any
    x: Any
    far: Any
    near: Any = None


def _kernel(
    x: jax.Array,
    affine: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    width: int,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    """x [b, i, positions] -> [b, o, positions].

    Units of work are pictures or, of those with many channels, halves of their channels. Each step
    of the grid multiplies two, the first while the second is shifted, and this one while the next
    step's first is; the very first is shifted before all.
    """
    (b, i, positions), (parts, _, o, _) = x.shape, weight.shape
    part, count = i // parts, b * parts
    half, rows = part // 2, 2 // parts
    groups, tiles = part // GROUP, positions // POSITIONS
    at_once = -(-groups // tiles)
    sizes = _shifted(positions, width)

    def kernel(*refs: Any) -> None:
        x_ref, affine_ref, w_ref, bias_ref, *others = refs
        residual_ref = others.pop(0) if residual is not None else None
        out_ref, total, arrived, *held = others
        each = len(held) // 2
        first, second = (_Unit(arrived.at[n], *held[n * each :][:each]) for n in (0, 1))
        step = pl.program_id(0)

        def fetch(number: Any, to: _Unit) -> Any:
            row, of = jax.lax.div(number, parts), jax.lax.rem(number, parts)
            source = x_ref.at[row, pl.ds(pl.multiple_of(of * part, GROUP), part)]
            return pltpu.make_async_copy(source, to.x, to.arrived)

        def arrive(number: Any, unit: _Unit, next_number: Any, next_unit: _Unit) -> None:
            """Waits for the x of one unit and has the next one's brought, if there are such."""
            pl.when(number < count)(lambda: fetch(number, unit).wait())
            pl.when(next_number < count)(lambda: fetch(next_number, next_unit).start())

        def shift(number: Any, unit: _Unit, group: Any) -> None:
            """A group of channels: what stands left, here and right of each position."""
            number = jnp.minimum(number, count - 1)
            row, of = jax.lax.div(number, parts), jax.lax.rem(number, parts)
            begin = pl.multiple_of(group * GROUP, GROUP)
            affine = affine_ref[row, pl.ds(pl.multiple_of(of * part + begin, GROUP), GROUP)]
            y = unit.x[pl.ds(begin, GROUP)].astype(jnp.float32) * affine[:, :1] + affine[:, 1:]
            y = pltpu.bitcast((y * tpu.sigmoid(y * tpu.TO_POWER)).astype(x.dtype), jnp.uint32)
            column = jax.lax.broadcasted_iota(jnp.int32, y.shape, 1) & (width - 1)
            for kx, beyond in enumerate((0, None, width - 1)):
                z = y
                if beyond is not None:
                    z = pltpu.roll(y, (1 - kx) % positions, 1)
                    z = jnp.where(column == beyond, jnp.uint32(0), z)
                at = pl.ds(pl.multiple_of(kx * half + group * 8, 8), 8)
                if unit.near is None:
                    unit.far[at, width : width + positions] = z
                else:
                    unit.near[at] = z
                    z = jnp.concatenate([z, jnp.zeros((8, 2 * width), jnp.uint32)], 1)
                    unit.far[at] = pltpu.roll(z, width, 1)

        def multiply(unit: _Unit, tile: Any) -> None:
            second_part = unit is second and parts == 2
            begin = pl.multiple_of(tile * POSITIONS, POSITIONS)
            here = pl.ds(begin, POSITIONS)
            sums = total[:, here] if second_part else jnp.zeros((o, POSITIONS), jnp.float32)
            for ky in range(3):
                if unit.near is not None and ky == 1:
                    shifted = unit.near[:, here]
                else:
                    above = pl.multiple_of(begin + ky * width, tpu.LANES)
                    shifted = unit.far[:, pl.ds(above, POSITIONS)]
                sums += tpu.product(w_ref[int(second_part), ky], pltpu.bitcast(shifted, x.dtype))
            if unit is first and parts == 2:
                total[:, here] = sums
                return
            row = int(unit is second and parts == 1)
            sums += bias_ref[row]
            if residual_ref is not None:
                sums += residual_ref[row, :, here].astype(jnp.float32)
            out_ref[row, :, here] = sums.astype(out_ref.dtype)

        def multiply_and_shift(unit: _Unit, number: Any, other: _Unit) -> None:
            @pl.loop(0, tiles)
            def _(tile: Any) -> None:
                multiply(unit, tile)
                for n in range(at_once):
                    shift(number, other, jnp.minimum(tile * at_once + n, groups - 1))

        @pl.when(step == 0)
        def _() -> None:
            fetch(0, first).start()
            for unit in (first, second):
                if unit.near is None:
                    nothing = jnp.zeros((3 * half, width), jnp.uint32)
                    unit.far[:, :width] = unit.far[:, width + positions :] = nothing
            arrive(0, first, 1, second)
            pl.loop(0, groups)(lambda group: shift(0, first, group))

        number = 2 * step
        arrive(number + 1, second, number + 2, first)
        multiply_and_shift(first, number + 1, second)
        arrive(number + 2, first, number + 3, second)
        multiply_and_shift(second, number + 2, first)

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda step: (0,) * array.ndim)

    def row(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, o, lanes), lambda step: (step, 0, 0))

    given = [x, affine, weight, bias]
    specs = [pl.BlockSpec(memory_space=pl.ANY), whole(affine), whole(weight), row(1)]
    if residual is not None:
        given, specs = [*given, residual], [*specs, row(positions)]
    unit = [pltpu.VMEM((part, positions), x.dtype)]
    unit += [pltpu.VMEM((3 * half, lanes), jnp.uint32) for lanes in sizes]
    kept = pltpu.VMEM((o, positions) if parts == 2 else (8, tpu.LANES), jnp.float32)
    moved = x.size + (1 if residual is None else 2) * b * o * positions
    return pl.pallas_call(
        kernel,
        grid=(count // 2,),
        in_specs=specs,
        out_specs=row(positions),
        out_shape=jax.ShapeDtypeStruct((b, o, positions), x.dtype),
        scratch_shapes=[kept, pltpu.SemaphoreType.DMA((2,)), *unit, *unit],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * 9 * i * o * b * positions,
            transcendentals=2 * x.size,
            bytes_accessed=(moved + weight.size) * x.dtype.itemsize,
        ),
        interpret=interpret,
    )(*given)
