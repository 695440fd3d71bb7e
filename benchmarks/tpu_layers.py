"""What layers of a UNet cost on a TPU, in each form there is, estimated without one.

    python benchmarks/tpu_layers.py --layers attention resnet feed-forward

compiles each with 8 rows in bfloat16 for one chip, a v5e, and prints estimates by bundles
(tpu_bundles.py). attention: four projections and the attention between them, by our kernel, by
jax's own for TPUs (flash, splash), and by XLA. resnet, a ResNet block, and feed-forward, of a
transformer from its norm to its residual: by our kernels, and by XLA. With --gradient as in a
training: the layer, and the gradients of all that it takes.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import tpu_bundles
import tpu_estimate
import tyro
from flax import nnx
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, SingleDeviceSharding

from jaxsd import kernels, sharding
from jaxsd.kernels import tpu, tpu_convolution, tpu_feedforward
from jaxsd.models.blocks import ResnetBlock
from jaxsd.models.transformer import FeedForward
from jaxsd.nn import LayerNorm, Net

Layer = Literal["attention", "resnet", "feed-forward"]


@dataclasses.dataclass(frozen=True)
class Options:
    layers: tuple[Layer, ...] = ("attention", "resnet", "feed-forward")
    side: int = 64
    """Of the feature map."""
    channels: int = 320
    inputs: int | None = None
    """Channels that a ResNet block is given, if others."""
    heads: int = 8
    rows: int = 8
    topology: str = "v5e:2x4"
    """Of whose chips one is compiled for."""
    gradient: bool = False


class Fed(nnx.Module):
    """The last third of a transformer block."""

    def __init__(self, channels: int):
        self.norm = LayerNorm(channels)
        self.ff = FeedForward(channels, 0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.ff.after(self.norm, x)


def _filled(x: jax.Array) -> jax.Array:
    """[b, h, t, d], the channels filled up to 128, as jax's kernels want them."""
    return jnp.pad(x.transpose(0, 2, 1, 3), [(0, 0)] * 3 + [(0, -x.shape[3] % 128)])


def _flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    t, d = q.shape[1], q.shape[3]
    q_block, k_block = min(512, t), min(1024, t)
    sizes = BlockSizes(
        block_q=q_block, block_k_major=k_block, block_k=k_block, block_b=1,
        block_q_major_dkv=q_block, block_q_dkv=q_block, block_k_major_dkv=k_block,
        block_k_dkv=k_block, block_q_dq=q_block, block_k_major_dq=k_block, block_k_dq=k_block,
    )  # fmt: skip
    o = flash_attention(*map(_filled, (q, k, v)), sm_scale=d**-0.5, block_sizes=sizes)
    return o[..., :d].transpose(0, 2, 1, 3)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    t, h, d = q.shape[1:]
    q_block, k_block = min(512, t), min(1024, t)
    sizes = splash.BlockSizes(
        block_q=q_block, block_kv=k_block, block_kv_compute=k_block, block_q_dkv=q_block,
        block_kv_dkv=k_block, block_kv_dkv_compute=k_block, block_q_dq=q_block, block_kv_dq=k_block,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.FullMask((t, t))] * h)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    o = jax.vmap(kernel)(*map(_filled, (q * d**-0.5, k, v)))
    return o[..., :d].transpose(0, 2, 1, 3)


def _ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return tpu.attention(q, k, v, kind=kernels.target().kind)


ATTENTION = {
    "ours": _ours,
    "splash": _splash,
    "flash": _flash,
    "XLA": jax.nn.dot_product_attention,
}


@contextlib.contextmanager
def by_xla() -> Iterator[None]:
    """Programs traced in this context have no kernel but that of attention."""
    with (
        mock.patch.object(tpu_convolution, "convolves", lambda *_: False),
        mock.patch.object(tpu_feedforward, "feeds", lambda *_: False),
    ):
        yield


def forms(
    layer: Layer, options: Options, array: Callable[..., jax.ShapeDtypeStruct]
) -> tuple[str, tuple, dict[str, Callable]]:
    """What the layer is called, what it takes, and the forms there are of it."""
    rows, side, channels = options.rows, options.side, options.channels
    tokens = (rows, side * side, channels)
    if layer == "attention":
        split = (rows, side * side, options.heads, channels // options.heads)

        def projected(form: Callable) -> Callable:
            def attend(x, to_q, to_k, to_v, to_out):
                o = form(*((x @ w).reshape(split) for w in (to_q, to_k, to_v)))
                return o.reshape(x.shape).astype(x.dtype) @ to_out

            return attend

        given = (array(*tokens), *[array(channels, channels)] * 4)
        return str(list(split)), given, {name: projected(form) for name, form in ATTENTION.items()}
    if layer == "resnet":
        inputs = options.inputs or channels
        net = Net(ResnetBlock(inputs, channels, 32, 1e-5, 1280))
        name = f"[{rows}, {side}, {side}, {inputs}] → {channels}"
        given = (array(rows, side, side, inputs), array(rows, 1280))
    else:
        net, name, given = Net(Fed(channels)), str(list(tokens)), (array(*tokens),)
    params = {name: array(*sizes) for name, sizes in net.shapes.items()}

    def ours(*given: Any) -> jax.Array:
        return net(*given)

    def plain(*given: Any) -> jax.Array:
        with by_xla():
            return net(*given)

    return name, (params, *given), {"ours": ours, "XLA": plain}


def pulled(form: Callable) -> Callable:
    """The gradients of what the form takes, for a gradient of what it gives."""

    def both(gradient: jax.Array, *given: Any) -> Any:
        made, pull = jax.vjp(form, *given)
        return made, pull(gradient)

    return both


def main(options: Options) -> None:
    folder = Path(tempfile.mkdtemp())
    os.environ["LIBTPU_INIT_ARGS"] = tpu_bundles.FLAGS.format(folder=folder)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    chip = tpu_estimate.CHIPS[options.topology.split(":")[0]]
    where = SingleDeviceSharding(topology.devices[0])

    split = NamedSharding(sharding.make_mesh(devices=topology.devices[:1]), sharding.HEADS)

    def array(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=where)

    for layer in options.layers:
        name, given, ways = forms(layer, options, array)
        print(f"| {layer} {name} | ms | of it kernels |\n| --- | --- | --- |")
        for way, form in ways.items():
            with kernels.compiling_for("tpu", split):
                taken = given
                if options.gradient:
                    taken = (array(*jax.eval_shape(form, *given).shape), *given)
                    form = pulled(form)
                lowered = jax.jit(form).lower(*taken)
            text = lowered.compile().as_text()
            found = tpu_estimate.Program(text, chip, tpu_bundles.read(folder))
            of_kernels = sum(row.seconds for row in found.rows if row.kind == "kernel")
            print(f"| {way} | {found.seconds * 1e3:.2f} | {of_kernels * 1e3:.2f} |", flush=True)
            for path in folder.iterdir():
                path.unlink()
        print()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
