# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a laptop to a pod
#
# The same training on one device and on eight that XLA pretends to have, who holds what of it, and
# what a TPU's compiler says before there is a TPU. It takes about half a minute on two cores.

# %% [markdown]
# A training step is a function of state and batch, and it does not know of devices. *Where arrays
# lie* is decided outside (`jaxsd/sharding.py`), and the compiler adds what devices have to tell
# each other. So a laptop can try what a pod will do: XLA pretends that there are eight devices.
# That is not faster, since they share the same cores, but the program is one for eight. The flag
# is read when JAX starts: it must come first, and a kernel in which JAX runs already must be
# restarted.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Programs below run a few times each: compiling them is what takes the time
    + " --xla_backend_optimization_level=0"
    # Patience: on a busy machine the eighth device may come late to where all eight meet
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import dataclasses
import math
import re
from pathlib import Path

import jax
import numpy as np
from IPython.display import Markdown, display
from jax.sharding import AbstractMesh, NamedSharding
from matplotlib import pyplot

from jaxsd import data, families, sharding, training
from jaxsd.models import UNet
from jaxsd.nn import Net
from jaxsd.objectives.ddpm import DDPM
from jaxsd.training import placement

assert len(jax.devices()) == 8, "restart the kernel and run this cell first"
print(*jax.devices())

# %% [markdown]
# ## One training, three machines
#
# The pixel model, smaller than the one that ships: DDPM on scans, 16 of them in an update. What
# differs below is a *mesh*, devices in a grid with named axes:
#
# | mesh | who holds what |
# |---|---|
# | 1 device | everything |
# | data 8 | each device its eighth of a batch, and a copy of everything else |
# | data 2, fsdp 4 | each an eighth of a batch, and of parameters, averages and moments a quarter |
#
# The tolerance is named before anything is run: the losses of all three agree to $10^{-5}$. They
# cannot agree to the last bit, since sums over a batch are taken in another order.

# %%
TOLERANCE = 1e-5
family = families.get_family("digits-ddpm")
small = dataclasses.replace(
    family.unet,
    block_out_channels=(64,),  # one level in place of two
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    attention_head_dim=32,
)
start = Net(UNet(small)).init(jax.random.key(0))
objective = DDPM(small, family.schedule, initial=start)
OPTIONS = training.Options(6, batch_size=16, learning_rate=1e-3, warmup_steps=1)


def train(devices, fsdp=1):
    """The losses of some updates, and the state after them: what `train.py` does, in short."""
    options = dataclasses.replace(OPTIONS, fsdp=fsdp)
    mesh = placement.make_mesh(options, devices)
    optimizer = training.make_optimizer(options)
    state, aux = placement.place_state(objective, optimizer, options, mesh)
    step = placement.compile_step(training.make_step(objective, optimizer, options), state, options)
    losses = []
    for batch in data.batches(data.elements("digit-scans", "train", 0), 16, 0, options.steps):
        batch = sharding.split(batch, mesh)
        state, metrics = step(state, aux, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses), state, batch, mesh


one, alone, *_ = train(jax.devices()[:1])
by_rows, everywhere, batch, rows_mesh = train(jax.devices())
in_pieces, pieces, _, mesh = train(jax.devices(), fsdp=4)

print("update  1 device    data 8      data 2, fsdp 4")
for i, row in enumerate(zip(one, by_rows, in_pieces, strict=True), 1):
    print(f"{i:6}  " + "  ".join(f"{loss:.8f}" for loss in row))
for name, losses in (("data 8", by_rows), ("data 2, fsdp 4", in_pieces)):
    print(f"{name}: at most {np.abs(losses - one).max():.1e} off")
    np.testing.assert_allclose(losses, one, rtol=0, atol=TOLERANCE)

# %% [markdown]
# The noise is the same, too: a step's key is `fold_in(key(seed), step)`, and each device computes
# its rows of what that key draws, whoever the others are.
#
# ## Pictures of it
#
# `jax.debug.visualize_array_sharding` draws an array of one or two axes as a table, with the
# devices that hold each piece (it needs `rich`, which `pip install "jaxsd[docs]"` brings). A batch
# of 16 scans, as 16 rows of 64 pixels:

# %%
pixels = jax.jit(lambda x: x.reshape(16, 64))(batch["image"])
assert len({shard.index[0].start for shard in pixels.addressable_shards}) == 8
jax.debug.visualize_array_sharding(pixels)

# %% [markdown]
# A weight of 256x256 numbers on the mesh `data 8`: all devices hold all of it.

# %%
NAME = "time_embedding.linear_2.weight"
jax.debug.visualize_array_sharding(everywhere.params[NAME])

# %% [markdown]
# The same weight on the mesh `data 2, fsdp 4`: four pieces, each on two devices. Where the weight
# is used, its pieces are gathered; where its gradient is made, the devices' shares are added up
# and each keeps the sum of its piece (ZeRO, stage 3).

# %%
jax.debug.visualize_array_sharding(pieces.params[NAME])
assert pieces.params[NAME].sharding.spec == jax.P("fsdp")

# %% [markdown]
# ## What is split, and how
#
# A parameter's *name* decides. Where no rule of `jaxsd.sharding.RULES` fits, the longest axis that
# `fsdp` divides is split, unless the array has fewer than 16,384 numbers: small ones are cheaper
# to keep than to gather. Some of them, and below what each device holds of the whole state:

# %%
print(f"{'parameter':44} {'shape':18} {'split over':12} on a device")
for name, array in pieces.params.items():
    if (
        re.match(r"(time_emb|class_emb|conv_|down_blocks.0.resnets).*weight", name)
        and array.ndim > 1
    ):
        piece = array.sharding.shard_shape(array.shape)
        over = ", ".join(axis or "–" for axis in array.sharding.spec) or "whole"
        print(f"{name:44} {array.shape!s:18} {over:12} {piece}")


def held(state):
    """MiB on the first device."""
    first = jax.devices()[0]
    shards = (s for array in jax.tree.leaves(state) for s in array.addressable_shards)
    return sum(s.data.nbytes for s in shards if s.device == first) / 2**20


sizes = {
    name: held(state)
    for name, state in (("1 device", alone), ("data 8", everywhere), ("data 2, fsdp 4", pieces))
}
for name, size in sizes.items():
    print(f"{name:15} {size:5.2f} MiB")
assert sizes["1 device"] == sizes["data 8"] and sizes["data 2, fsdp 4"] < sizes["data 8"] / 3

# %% [markdown]
# `python train.py RECIPE ... --dry-run --fsdp 4` prints the same as a table, of any training.
#
# The third axis, `tensor`, splits the *work* on each row as well: attention and feed-forward
# layers by their outputs first and by their inputs then, as in Megatron-LM. How Stable Diffusion
# 1.5 would lie on 16 chips is a question of names and shapes alone. No weights are needed for it,
# and no chips:

# %%
sd = Net(UNet(families.get_family("sd1").unet))
pod = AbstractMesh((1, 16, 1), sharding.AXES)
two_ways = AbstractMesh((1, 8, 2), sharding.AXES)
for name in (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight",
    "up_blocks.0.resnets.0.conv1.weight",
    "conv_norm_out.weight",
):
    spec, other = (sharding.spec(name, sd.shapes[name], grid) for grid in (pod, two_ways))
    print(f"{name}\n    {sd.shapes[name]}, fsdp 16: {tuple(spec)}, fsdp 8 tensor 2: {tuple(other)}")

numbers = 0
for name, shape in sd.shapes.items():
    where = NamedSharding(pod, sharding.spec(name, shape, pod))
    numbers += math.prod(where.shard_shape(shape))
state_gib = numbers * 4 * 4 / 2**30  # parameters, averages, two moments of AdamW, float32 each
print(
    f"{sd.size:,} parameters; a chip holds {numbers:,} of them, with the state {state_gib:.2f} GiB"
)

# %% [markdown]
# ## The compiler's table, read aloud
#
# libtpu compiles for TPUs that are not there, and places every buffer on the way. So what a chip
# must hold is known at compile time. From `docs/performance.md`, the training step of Stable
# Diffusion 1.5 on a v5e of 4x4 chips:

# %%
performance = Path("../performance.md")
text = performance.read_text() if performance.exists() else ""


def table(heading):
    """The rows of the table of docs/performance.md that begins so."""
    lines = text[text.find(heading) :].splitlines() if heading in text else []
    count = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return lines[:count]


display(Markdown("\n".join(table("| a chip | first |"))))

# %% [markdown]
# - **arguments**: what goes into the step and stays between steps: this chip's sixteenth of
#   parameters, averages and AdamW's two moments, and its 8 pictures as latents. The first part is
#   what was reckoned above.
# - **temporaries**: what comes and goes within a step: activations kept for the gradient, gathered
#   weights, gradients. With `--remat selective` a block keeps what was costly to compute, and
#   computes norms and activations twice; with `--remat full` it keeps its inputs alone.
# - **code**: the program itself.
# - **together**, of what a v5e leaves a program of its 16 GiB. Where it is more, the compiler
#   refuses, and the same happens on the chip.
# - **gathered**: each weight that is split, once for the pass and once for the gradient. Most of
#   them arrive while the layer before is computed.
# - **added up**: the gradients, a number for each parameter, in bfloat16; and **scattered**, where
#   each chip receives its own piece of the sum alone.
# - the last rows are an estimate, of which more below. The columns `now` and `2.1`, Stable
#   Diffusion 2.1's, are of sixteen chips. The first two are before: `in slices`, a layer was
#   computed in sixteen pieces, each while the next piece of its weights was on the way, and pieces
#   of 20 channels fill little of a matrix unit for 128.
#
# Compiling took half an hour of one core, once: with the compilation cache the next start reads it.

# %%
if text:
    cells_of = (row.split("|") for row in table("| a chip | first |")[2:])
    now = {re.match(r"\w+", cells[1].strip())[0]: cells[4] for cells in cells_of}
    gib = {name: float(now[name]) for name in ("arguments", "temporaries", "code", "together")}
    usable = 15.75
    assert math.isclose(gib["arguments"], state_gib, abs_tol=0.05)
    parts = gib["arguments"] + gib["temporaries"] + gib["code"]
    assert math.isclose(gib["together"], parts, abs_tol=0.011) and parts < usable

    pyplot.figure(figsize=(7, 1.3), layout="constrained")
    left = 0.0
    for name in ("arguments", "temporaries", "code"):
        pyplot.barh("a v5e chip", gib[name], left=left, label=name)
        left += gib[name]
    pyplot.axvline(usable, color="black", linestyle=":", label="usable")
    pyplot.xlabel("GiB")
    pyplot.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    pyplot.show()

# %% [markdown]
# And a step of *sampling* with guidance, four pictures of 512 px, on one v5e:

# %%
display(Markdown("\n".join(table("| a step, by bundles |"))))

# %% [markdown]
# Stable Diffusion 1.5 and 2.1, each compiled for one chip, now and with fewer kernels. A TPU's
# program is a list of *bundles*, instructions that are issued together, one a cycle; the compiler
# has settled all of them, so they can be counted. That is an estimate, and no clock has run.
#
# - **estimated time**: all bundles by the chip's clock.
# - **of it convolutions and products**, **kernels**, **the rest**: products go to the matrix unit;
#   attention, ResNet blocks and feed-forwards are Pallas kernels where that pays
#   (`jaxsd/kernels/`); norms and activations elsewhere are the rest.
# - **arithmetic**: multiplications and additions of all products, without what pads them to the
#   matrix unit's size. A thousand milliards of them are a TFLOP.
# - **share of the peak**: that arithmetic by the time, over the 197 TFLOP/s of bfloat16 that a v5e
#   can do. All of it would take 32 ms for 1.5, so no program could be faster than that.
# - **weights, temporaries**: what must fit in memory, in GiB.

# %%
cells_of = [[cell.strip() for cell in row.split("|")] for row in table("| a step, by bundles |")]
rows = {cells[1]: cells for cells in cells_of}
titles = cells_of[0] if cells_of else []


def numbers_in(cell):
    return [float(number) for number in re.findall(r"[\d.]*\d", cell)]


if text:
    for title in ("Stable Diffusion 1.5", "2.1"):
        ms, tflop, share = (
            numbers_in(rows[name][titles.index(title)])[0]
            for name in ("estimated time", "arithmetic", "share of the peak")
        )
        print(f"{title}: {tflop} TFLOP in {ms} ms are {tflop / ms * 1000 / 197:.0%} of 197 TFLOP/s")
        assert math.isclose(tflop / ms * 1e5 / 197, share, abs_tol=0.6)

# %% [markdown]
# Both tables come from `benchmarks/tpu.py`, on any x86 machine, with `pip install "jax[tpu]"`
# (some minutes; not run here):
#
# ```
# PYTHONPATH=. python benchmarks/tpu.py --topology v5e:4x4 --model sd1 --fsdp 16 --batch 8 \
#     --remat selective --bundles
# PYTHONPATH=. python benchmarks/tpu.py --program step --model sd1 --topology v5e:2x4 --chips 1 \
#     --batch 4 --bundles
# ```
#
# ## On a pod
#
# **The commands of this section need a pod, and are not run here.** It is the same command, on all
# workers at once. JAX finds the others by itself on a TPU; `data` is what `fsdp` leaves. The
# workdir must be on a disk that all of them see.
#
# ```
# gcloud compute tpus tpu-vm ssh my-pod --zone my-zone --worker=all --command '
#     cd jaxsd && pip install -e ".[tpu]" &&
#     python train.py text-to-image --model path/to/sd15 --data latents --workdir /shared/run \
#         --fsdp 16 --batch-size 128 --remat selective --dtype bfloat16 --learning-rate 1e-5'
# ```
#
# Under Slurm it is `srun python train.py ...`; elsewhere each process is told where the first one
# is:
#
# ```
# python train.py text-to-image ... --coordinator host0:1234 --num-processes 4 --process-id 0
# ```
#
# Stopped anywhere, the same command goes on, on any number of devices: what is split how is no
# part of a checkpoint.
