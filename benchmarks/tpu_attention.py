"""What self-attention of a UNet costs on a TPU in each form, estimated without one.

    python benchmarks/tpu_attention.py --tokens 4096 --heads 8 --channels 40

compiles the four projections with the attention between them, 8 rows in bfloat16, for one v5e, and
prints estimates by bundles: ours, jax's own for TPUs (flash, splash), and XLA's plain form.
"""

import dataclasses
import os
import tempfile
from pathlib import Path

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import tpu_bundles
import tpu_estimate
import tyro
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import SingleDeviceSharding

from jaxsd.kernels import tpu


@dataclasses.dataclass(frozen=True)
class Options:
    tokens: int = 4096
    heads: int = 8
    channels: int = 40
    """Of each head."""
    rows: int = 8


def _filled(x: jax.Array) -> jax.Array:
    """[b, h, t, d], the channels filled up to 128, as jax's kernels want them."""
    return jnp.pad(x.transpose(0, 2, 1, 3), [(0, 0)] * 3 + [(0, -x.shape[3] % 128)])


def _flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    t, d = q.shape[1], q.shape[3]
    sizes = BlockSizes(min(512, t), min(1024, t), min(1024, t), 1)
    o = flash_attention(*map(_filled, (q, k, v)), sm_scale=d**-0.5, block_sizes=sizes)
    return o[..., :d].transpose(0, 2, 1, 3)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    t, h, d = q.shape[1:]
    sizes = splash.BlockSizes(min(512, t), min(1024, t), min(1024, t))
    mask = masks.MultiHeadMask([masks.FullMask((t, t))] * h)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    o = jax.vmap(kernel)(*map(_filled, (q * d**-0.5, k, v)))
    return o[..., :d].transpose(0, 2, 1, 3)


FORMS = {
    "ours": tpu.attention,
    "splash": _splash,
    "flash": _flash,
    "XLA": jax.nn.dot_product_attention,
}


def main(options: Options) -> None:
    folder = Path(tempfile.mkdtemp())
    os.environ["LIBTPU_INIT_ARGS"] = tpu_bundles.FLAGS.format(folder=folder)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    where = SingleDeviceSharding(topology.devices[0])
    rows, tokens, heads = options.rows, options.tokens, options.heads
    width = heads * options.channels
    x = jax.ShapeDtypeStruct((rows, tokens, width), jnp.bfloat16, sharding=where)
    weight = jax.ShapeDtypeStruct((width, width), jnp.bfloat16, sharding=where)
    print(f"| [{rows}, {tokens}, {heads}, {options.channels}] | ms | of it kernels |")
    print("| --- | --- | --- |")
    for name, form in FORMS.items():

        def layer(x, to_q, to_k, to_v, to_out, form=form):
            split = [(x @ w).reshape(rows, tokens, heads, -1) for w in (to_q, to_k, to_v)]
            return form(*split).reshape(x.shape).astype(x.dtype) @ to_out

        text = jax.jit(layer).lower(x, *[weight] * 4).compile().as_text()
        found = tpu_estimate.Program(text, tpu_estimate.CHIPS["v5e"], tpu_bundles.read(folder))
        kernels = sum(row.seconds for row in found.rows if row.kind == "kernel")
        print(f"| {name} | {found.seconds * 1e3:.2f} | {kernels * 1e3:.2f} |", flush=True)
        for path in folder.iterdir():
            path.unlink()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
