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
# # Matrix multiplication from foundations
#
# From three loops in Python to a kernel, timed on the way, then random numbers from a formula to
# JAX's keys, and where all of it is in the UNet. It takes about twenty seconds on two cores.

# %% [markdown]
# A network is mostly this: $c_{ij} = \sum_k a_{ik}\, b_{kj}$. The lesson multiplies five scans of
# 28x28 = 784 pixels by weights for ten digits, 5x784 · 784x10, and then 50,000 scans. Numbers here
# are random, for the times do not depend on them.

# %%
import math
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

import jaxsd
from jaxsd.models.embeddings import timestep_embedding
from jaxsd.nn import attention

jax.config.update("jax_default_matmul_precision", "highest")  # TPUs and GPUs round to fewer bits
keys = jax.random.split(jax.random.key(0), 2)
large = jax.random.normal(keys[0], (50_000, 784))
weights = jax.random.normal(keys[1], (784, 10))
small = large[:5]
a, b, large_np = np.asarray(small), np.asarray(weights), np.asarray(large)
truth = a.astype(np.float64) @ b.astype(np.float64)

# %% [markdown]
# How do we know that two matrices are equal? By the **Frobenius norm** of their difference, the
# length of a matrix as if it were a vector, $\|M\|_F = \sqrt{\sum_{ij} m_{ij}^2}$. Each product
# below must lie within $10^{-5}$ of the one in 64 bits, as a share of its length.


# %%
def frobenius(m):
    return math.sqrt(sum(float(x) ** 2 for row in m for x in row))


assert math.isclose(frobenius(truth), np.linalg.norm(truth), rel_tol=1e-12)
times = {}  # (form, size) -> seconds


def measure(form, size, multiply, left, right, runs=5):
    """Checks a way of multiplying, and keeps the least time of some runs after the first."""
    found = np.asarray(jax.block_until_ready(multiply(left, right)))  # compiles, where it does
    right_one = np.asarray(left, np.float64) @ np.asarray(right, np.float64)
    assert found.shape == right_one.shape
    assert np.linalg.norm(found - right_one) < 1e-5 * np.linalg.norm(right_one), form
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(multiply(left, right))
        taken.append(time.perf_counter() - start)
    times[form, size] = min(taken)
    print(f"{form}, {size}: {min(taken) * 1e3:.3f} ms")


# %% [markdown]
# ## Three loops
#
# Over Python's own lists, on the small size alone: the large one is 10,000 times as much, and its
# time in the table is 10,000 times the small one's, not measured.


# %%
def loops(a, b):
    c = [[0.0] * len(b[0]) for _ in a]
    for i in range(len(a)):
        for j in range(len(b[0])):
            for k in range(len(b)):
                c[i][j] += a[i][k] * b[k][j]
    return c


measure("three loops", "small", loops, a.tolist(), b.tolist())
times["three loops", "large"] = 10_000 * times["three loops", "small"]

# %% [markdown]
# ## The inner loop as one dot product


# %%
def dots(a, b):
    return [[np.dot(row, column) for column in b.T] for row in a]


measure("dot", "small", dots, a, b)

# %% [markdown]
# ## Broadcasting
#
# Arrays of different shapes go together by two rules. Shapes are compared **from the right**. Two
# lengths fit if they are **equal, or one of them is 1** (a missing axis counts as 1); what is 1 is
# repeated, without a copy.

# %%
for one, other in [((784, 1), (784, 10)), ((10,), (784, 10)), ((5, 1, 784), (10, 784))]:
    print(one, "with", other, "gives", np.broadcast_shapes(one, other))

try:
    np.broadcast_shapes((784,), (784, 10))
except ValueError as error:
    print(error)

column = np.arange(3)[:, None]  # [3, 1]
print(column * np.arange(4))  # with [4]: every product of the two, [3, 4]

# %% [markdown]
# A row of pixels, as a column [784, 1], meets all weights [784, 10] at once; the sum over the first
# axis is a row of the result. One loop is left.


# %%
def broadcast(a, b):
    return np.stack([(row[:, None] * b).sum(0) for row in a])


measure("broadcasting", "small", broadcast, a, b)
measure("broadcasting", "large", broadcast, large_np, b, runs=1)

# %% [markdown]
# ## vmap
#
# JAX's way to drop a loop: write it for one, and map. The product of two vectors, mapped over
# columns of $b$, is that of a vector and a matrix; mapped over rows of $a$, that of two matrices.

# %%
for_columns = jax.vmap(jnp.dot, in_axes=(None, 1))
mapped = jax.vmap(for_columns, in_axes=(0, None))
measure("vmap", "small", mapped, small, weights)
measure("vmap", "large", mapped, large, weights)
print(jax.make_jaxpr(mapped)(small, weights).pretty_print(use_color=False))

# %% [markdown]
# No loop is left in what JAX hands to the compiler: one `dot_general`.
#
# ## einsum
#
# The indices of the formula as they stand: what is not in the result is summed over.


# %%
def einsum(a, b):
    return jnp.einsum("ik,kj->ij", a, b)


measure("einsum", "small", einsum, small, weights)
measure("einsum", "large", einsum, large, weights)

# %% [markdown]
# ## jit
#
# The two above are run an operation at a time, and for five rows Python's part of it is most of the
# time. `jax.jit` compiles the function into one program.

# %%
measure("jit", "small", jax.jit(einsum), small, weights)
measure("jit", "large", jax.jit(einsum), large, weights)

# %% [markdown]
# ## A Pallas kernel
#
# One level lower: *we* say what is brought near the arithmetic and when. The kernel sees a block of
# rows of $a$, all of $b$, and the block of the result that it is to fill. It adds up products of
# tiles of 128 pixels, which is what a GPU's tensor cores and a TPU's matrix unit take. Tiles have
# round sizes, so rows, pixels and digits are filled up with zeros, which add nothing.
#
# On CPU a kernel is *interpreted*, a block after the other by ordinary operations: it shows that
# the kernel is right, and its time says nothing of an accelerator. On a GPU (by Triton) or a TPU it
# is compiled.

# %%
interpret = jax.default_backend() == "cpu"
TILE = 128


def kernel(a_ref, b_ref, c_ref):
    c = jnp.zeros(c_ref.shape, jnp.float32)
    for k in range(0, a_ref.shape[1], TILE):
        c += jnp.dot(a_ref[:, k : k + TILE], b_ref[k : k + TILE, :])
    c_ref[...] = c


def filled(m, rows, columns):
    """With zeros below and on the right, up to multiples of these sizes."""
    return jnp.pad(m, ((0, -len(m) % rows), (0, -m.shape[1] % columns)))


@jax.jit
def pallas(a, b):
    rows = 8192 if interpret and len(a) > 8192 else 64  # what is interpreted costs by the block
    padded_a, padded_b = filled(a, rows, TILE), filled(b, TILE, 16)
    (m, k), n = padded_a.shape, padded_b.shape[1]
    multiply = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((m, n), jnp.float32),
        grid=(m // rows,),
        in_specs=[
            pl.BlockSpec((rows, k), lambda i: (i, 0)),
            pl.BlockSpec((k, n), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, n), lambda i: (i, 0)),
        interpret=interpret,
        compiler_params=triton.CompilerParams() if jax.default_backend() == "gpu" else None,
    )
    return multiply(padded_a, padded_b)[: a.shape[0], : b.shape[1]]


measure("Pallas", "small", pallas, small, weights)
measure("Pallas", "large", pallas, large, weights)

# %% [markdown]
# ## How much faster?
#
# How many times as long the loops take. (In the lesson, on another machine and over torch's
# tensors: loops 421 ms, dot 598 µs and broadcasting 70 µs on the small size.) Small products are
# all overhead: what wins there is what calls least.

# %%
print(f"| {jax.default_backend()} | 5x784 · 784x10 | 50000x784 · 784x10 |\n| --- | --- | --- |")
for form in dict.fromkeys(form for form, _ in times):
    cells = []
    for size in ("small", "large"):
        taken = times.get((form, size))
        cells.append("–" if taken is None else f"{times['three loops', size] / taken:,.0f}")
    note = ", interpreted" * (form == "Pallas" and interpret)
    print(f"| {form}{note} | {cells[0]} | {cells[1]} |")

assert times["jit", "large"] < times["broadcasting", "large"]
assert times["jit", "large"] < times["three loops", "large"] / 10

# %% [markdown]
# ## Random numbers from a formula
#
# A generator is a state and a rule. Wichmann and Hill (1982) take three small ones, each a
# multiplication and a remainder, and add them up; the state is three integers.


# %%
class WichmannHill:
    def __init__(self, seed):
        seed, self.x = divmod(seed, 30268)
        seed, self.y = divmod(seed, 30306)
        self.x, self.y, self.z = self.x + 1, self.y + 1, seed % 30322 + 1

    def random(self):
        self.x = 171 * self.x % 30269
        self.y = 172 * self.y % 30307
        self.z = 170 * self.z % 30323
        return (self.x / 30269 + self.y / 30307 + self.z / 30323) % 1


generator = WichmannHill(457428938475)
drawn = [generator.random() for _ in range(20_000)]
mean, variance = np.mean(drawn), np.var(drawn)
print(f"mean {mean:.4f} of 1/2, variance {variance:.4f} of 1/12")
assert abs(mean - 1 / 2) < 0.01 and abs(variance - 1 / 12) < 0.005

# %% [markdown]
# ## The pitfall: a stream that is forked
#
# The state is *hidden* in the object. A process that forks, as loaders of data do, copies it, and
# from then on both draw the same "random" numbers. Here it is tried in a process of its own, with
# our generator, NumPy's, and Python's.

# %%
FORK = """
import json, os, random, numpy
STREAMS
streams = {"ours": generator.random, "NumPy's": numpy.random.random, "Python's": random.random}
numpy.random.seed(0); random.seed(0)
told, tell = os.pipe()
if os.fork() == 0:  # the child
    os.write(tell, json.dumps([draw() for draw in streams.values()]).encode())
    os._exit(0)
os.wait()
child = json.loads(os.read(told, 1000))
for (name, draw), other in zip(streams.items(), child):
    own = draw()
    print(f"{name}|{own:.6f}|{other:.6f}")
"""
OURS = """
class WichmannHill:
    x, y, z = 1, 2, 3
    def random(self):
        self.x, self.y, self.z = 171*self.x%30269, 172*self.y%30307, 170*self.z%30323
        return (self.x / 30269 + self.y / 30307 + self.z / 30323) % 1
generator = WichmannHill()
"""


def run(code):
    """What a fresh Python prints, a row for each line."""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [line.split("|") for line in told.stdout.splitlines()]


rows = run(FORK.replace("STREAMS", OURS))
for name, parent, child in rows:
    print(f"{name:9} parent {parent}, child {child}{': the same' * (parent == child)}")
assert [parent == child for _, parent, child in rows] == [True, True, False]

# %% [markdown]
# Python's own module seeds itself anew in the child, from the system: other numbers, and other ones
# in each run.
#
# ## The cure: explicit keys
#
# In JAX there is no hidden state. `jax.random` has functions of a **key**: the same key gives the
# same numbers, in any process, on any device. Who wants others makes another key: `split` makes
# several of one, `fold_in` one of a key and a number, such as a worker's.

# %%
key = jax.random.key(0)
assert jax.random.uniform(key) == jax.random.uniform(key)
assert len({float(jax.random.uniform(k)) for k in jax.random.split(key, 4)}) == 4

KEYS = """
import json, os
told, tell = os.pipe()
worker = 1 if os.fork() == 0 else 0
import jax  # after the fork: jax has threads, which a fork would leave behind
key = jax.random.key(0)
draws = [float(jax.random.uniform(k)) for k in (key, jax.random.fold_in(key, worker))]
if worker:
    os.write(tell, json.dumps(draws).encode())
    os._exit(0)
os.wait()
child = json.loads(os.read(told, 1000))
for name, own, other in zip(("the key itself", "key and worker"), draws, child):
    print(f"{name}|{own:.6f}|{other:.6f}")
"""
rows = run(KEYS)
for name, parent, child in rows:
    print(f"{name}: parent {parent}, child {child}")
assert [parent == child for _, parent, child in rows] == [True, False]
folded = [float(jax.random.uniform(jax.random.fold_in(key, worker))) for worker in (0, 1)]
assert [f"{x:.6f}" for x in folded] == rows[1][1:]  # here, too, in a third process

# %% [markdown]
# ## Where each step is in the UNet
#
# | step | where, in `jaxsd/` |
# |---|---|
# | a product with weights | `Linear` in `nn.py`, by `linear` in `kernels/__init__.py` |
# | einsum of queries and keys | `CrossAttention` in `models/transformer.py`, by `kernels/` |
# | convolution as a product | `kernels/cpu.py`, where pixels are few |
# | broadcasting | `timestep_embedding` in `models/embeddings.py` |
# | vmap | `networks.py`: a key for each seed of a batch |
# | jit | every part of `networks.py`, and the step in `training/placement.py` |
# | a Pallas kernel | `kernels/tpu.py`: attention on TPUs |
# | `fold_in(key, step)` | `training/step.py`: resuming needs no generator's state |
#
# Three of them by hand, on the shipped model's own weights. `net.bind(params)` gives a module to
# look inside. The tolerance, as a share of the norm, is $10^{-5}$.

# %%
pipe = jaxsd.load("digits")
unet = pipe.unet.bind(pipe.params["unet"])


def same(one, other):
    assert one.shape == other.shape
    gap = float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))
    print(f"{list(one.shape)}: differ by {gap:.1e} of their length")
    assert gap < 1e-5


# %% [markdown]
# **Attention**, the UNet's own layer that reads the prompt: from pixels queries $q_{bthd}$, from
# words keys $k_{bshd}$ and values $v_{bshd}$, with $h$ for heads. Scores are
# $a_{bhts} = \sum_d q_{bthd}\,k_{bshd} / \sqrt{d}$; softmax over words $s$ makes weights of them,
# and what comes out is the values' mean by these weights.

# %%
layer = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
words = pipe.encode(["a red seven on a white background"])["encoder_hidden_states"]  # [1, 77, 64]
pixels = jax.random.normal(jax.random.key(1), (1, 16, layer.to_q.weight.shape[1]))


def by_heads(x, weight):
    """[b, t, c] to [b, t, heads, d]"""
    return jnp.einsum("btc,oc->bto", x, weight[...]).reshape(*x.shape[:2], layer.heads, -1)


q = by_heads(pixels, layer.to_q.weight)
k, v = (by_heads(words, part.weight) for part in (layer.to_k, layer.to_v))
scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v).reshape(pixels.shape)
out = layer.to_out[0]
by_hand = jnp.einsum("btc,oc->bto", mixed, out.weight[...]) + out.bias[...]
same(by_hand, layer(pixels, words))

flat_q, flat_k, flat_v = (x.reshape(1, x.shape[1], -1) for x in (q, k, v))
same(mixed, attention(flat_q, flat_k, flat_v, layer.heads))

# %% [markdown]
# **Convolution**, the UNet's first layer: for each pixel the 3x3 around it, laid side by side,
# times the kernel as a matrix.

# %%
x = pipe.noise([0])  # [1, 8, 8, 4]
around = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
patches = jnp.stack([around[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)], 3)
weight = unet.conv_in.weight[...].transpose(2, 3, 1, 0).reshape(9, 4, -1)  # of [out, in, 3, 3]
same(jnp.einsum("bhwpc,pco->bhwo", patches, weight) + unet.conv_in.bias[...], unet.conv_in(x))

# %% [markdown]
# **Time** as a vector: times as a column meet frequencies as a row, an outer product by
# broadcasting.

# %%
t, channels = jnp.array([0.0, 10.0, 500.0, 999.0]), 64
angles = t[:, None] * jnp.exp(-math.log(10_000) * jnp.arange(32) / 32)
by_hand = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
same(by_hand, timestep_embedding(t, channels, flip_sin_to_cos=True, freq_shift=0))

# %% [markdown]
# And pictures: `pipe.noise` makes a key of each seed, so a picture depends on its own seed, and not
# on what else is in the batch.

# %%
assert (pipe.noise([3, 1, 4])[1] == pipe.noise([1])[0]).all()
