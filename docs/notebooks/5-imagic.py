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
# # Imagic: one real picture, changed by words
#
# A held-out scan in red becomes blue by a prompt, in three stages that are shown one by one with
# their losses. It takes about half a minute on two cores.

# %% [markdown]
# A prompt alone draws *a* blue seven, but not *this* one. Imagic (Kawar et al. 2022,
# [2210.09276](https://arxiv.org/abs/2210.09276)) brings the two together:
#
# 1. **The embedding.** The prompt's embedding $e_{tgt}$ is trained, with the network frozen, until
#    the network draws something like the picture where it is told that. It becomes $e_{opt}$.
# 2. **The network.** The network is trained, with $e_{opt}$ frozen, until it draws the picture.
# 3. **The way between.** The tuned network is told $\eta\, e_{tgt} + (1 - \eta)\, e_{opt}$. At
#    $\eta = 0$ it draws the picture, at $\eta = 1$ what the prompt says, and on the way, if all
#    goes well, the picture changed by the prompt.
#
# Both trainings minimise the loss that the model itself was trained with, of one picture. In the
# lesson's notes an hour is guessed for Stable Diffusion; the paper's settings are 1000 and 1500
# steps, and `docs/performance.md` has what a step costs. `digits` takes 60 and 60.

# %%
import dataclasses
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from looking import show
from matplotlib import pyplot

import jaxsd
from jaxsd import training
from jaxsd.data import digits
from jaxsd.editing import imagic
from jaxsd.objectives.imagic import Embedding, Tuning, new_edit, on_host, with_unet
from jaxsd.pictures import to_uint8

# Two pipelines below differ in their weights alone, and share compiled programs through this folder
folder = tempfile.TemporaryDirectory()
jaxsd.use_compilation_cache(folder.name)
pipe = jaxsd.load("digits")

# %% [markdown]
# ## A picture and a prompt
#
# The picture is a seven that no model was trained on. Beside it: what the VAE keeps of it, the best
# that any edit can give back, and what the prompt draws by itself of seven draws of noise.

# %%
scans, labels = digits.load_scans("test")
drawn, *_ = digits.colour_scan(scans[labels == 7][3], np.random.default_rng(0), ("red", "white"))
picture = imagic.prepare(pipe, to_uint8(2 * drawn - 1))
latents = imagic.latents_of(pipe, picture)

prompt = "a blue seven on a white background"
how = {"steps": 20, "guidance_scale": 3.0, "sampler": "ddim"}
by_prompt = pipe.decode_array(pipe.sample(prompt, range(7), **how))
kept = pipe.decode_array(latents)[0]
show([picture, kept, *by_prompt], ["picture", "VAE", *["prompt"] * 7], scale=2)


# %% [markdown]
# ## The loop
#
# Both stages are objectives like that of any training: `loss(params, aux, batch, now)`. A batch is
# the same latents four times, each with a noise level and noise of its own.

# %%
batch = {"latents": jnp.broadcast_to(latents, (4, *latents.shape[1:]))}


def learn(stage, steps, learning_rate, train=()):
    """The parameters that a stage arrives at, and its losses; train: which ones, by patterns."""
    options = training.Options(
        steps,
        batch_size=4,
        learning_rate=learning_rate,
        warmup_steps=0,
        decay="constant",
        train=train,
    )
    optimizer = training.make_optimizer(options)
    state, aux = training.init_state(stage, optimizer, options)
    update = jax.jit(training.make_step(stage, optimizer, options), donate_argnums=0)
    losses = []
    for _ in range(steps):
        state, metrics = update(state, aux, batch)
        losses.append(float(metrics["loss"]))
    return {**aux.frozen, **state.params}, losses


def ends(losses):
    """Means of the first ten and the last ten: single losses differ by their noise levels."""
    return np.mean(losses[:10]), np.mean(losses[-10:])


# %% [markdown]
# ## Stage one: the embedding
#
# 77 tokens of 64 numbers each move; the 1.4 million weights of the UNet do not.

# %%
edit = new_edit(pipe, prompt, picture.shape[:2])
found, first = learn(Embedding(pipe, edit), 60, 3e-2)
edit = dataclasses.replace(edit, optimised=on_host(found))

told = {name: jnp.repeat(value, 7, 0) for name, value in found.items()}
plain = {"steps": 20, "guidance_scale": 1.0, "sampler": "ddim"}
noise = pipe.noise(range(7))
after_one = pipe.decode_array(pipe.denoise(noise, told, None, **plain))
show([picture, *after_one], ["picture", *["e_opt"] * 7], scale=2)

target, optimised = (told["encoder_hidden_states"] for told in (edit.target, edit.optimised))
moved = np.linalg.norm(optimised - target) / np.linalg.norm(target)
print(f"the loss fell from {ends(first)[0]:.3f} to {ends(first)[1]:.3f}")
print(f"the embedding moved by {moved:.2f} of its length")
assert ends(first)[1] < ends(first)[0] / 2

# %% [markdown]
# Told $e_{opt}$, the network draws sevens on white in other colours and shapes: one embedding
# cannot say all of a picture. The rest is for the second stage.

# %% [markdown]
# ## Stage two: the network
#
# Now the embedding stays and the network moves. The paper tunes all of it; here only the weights of
# its transformers, which compiles in half the time. (`--lora-rank 8` trains factors of them, and
# leaves a file of 0.2 MB.) The model itself is not touched: the tuned weights are another dict.

# %%
tuned, second = learn(Tuning(pipe, edit), 60, 5e-4, ("*attn*", "*ff*", "*proj*"))
edited = imagic.Edited(with_unet(pipe, tuned), edit)

after_two = edited.pipe.decode_array(edited.pipe.denoise(noise, told, None, **plain))
show([picture, *after_two], ["picture", *["e_opt"] * 7], scale=2)
print(f"the loss fell from {ends(second)[0]:.3f} to {ends(second)[1]:.3f}")
assert ends(second)[1] < ends(second)[0]


# %%
def rmse(pictures):
    """To the picture, of values from 0 to 1."""
    return float(np.sqrt(np.square((pictures.astype(float) - picture) / 255).mean()))


for name, row in [("prompt", by_prompt), ("stage one", after_one), ("stage two", after_two)]:
    print(f"{name:10} {rmse(row):.3f} from the picture")
assert rmse(by_prompt) > rmse(after_one) > rmse(after_two)

# %% [markdown]
# ## The losses
#
# Dots are single updates, whose noise levels differ; the lines are means of ten.

# %%
figure, axes = pyplot.subplots(1, 2, figsize=(9, 2.8), layout="constrained", sharey=True)
for axis, title, losses in zip(axes, ("embedding", "network"), (first, second), strict=True):
    axis.semilogy(losses, ".", color="0.7")
    axis.semilogy(np.arange(9, len(losses)), np.convolve(losses, np.ones(10) / 10, "valid"))
    axis.set(title=title, xlabel="update")
axes[0].set_ylabel("loss")
pyplot.show()

# %% [markdown]
# ## Stage three: the strip over η
#
# A row for each draw of noise, with guidance 3. On the left the picture; then from $\eta = 0$,
# where the tuned network is told $e_{opt}$ and gives the picture back, to $\eta = 1$, where it is
# told the prompt's own embedding: a blue seven, and still *this* seven, since the network was tuned
# to draw it. The paper recommends .6 to .8. Half of a change of colour is another colour, so here
# the way leads through dark strokes and purple ones.

# %%
ETAS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 1.0)
rows = [
    edited.pipe.decode_array(imagic.sample(edited, ETAS, [seed] * len(ETAS), **how))
    for seed in range(3)
]
titles = ["picture", *(f"η = {eta:g}" for eta in ETAS)] + [""] * 16
show([p for row in rows for p in (picture, *row)], titles, columns=8, scale=2)

strokes = np.array([digits.recover(row / 255)[1] for row in rows])
for eta, colours, column in zip(ETAS, strokes.T, zip(*rows, strict=True), strict=True):
    print(f"η = {eta:g}: {' '.join(colours):18} {rmse(np.stack(column)):.3f} from the picture")
assert set(strokes[:, 0]) == {"red"} and set(strokes[:, -1]) == {"blue"}

# %% [markdown]
# ## What each stage is for
#
# The same strip by the network *before* stage two, told the same mixtures: each draw of noise is
# another seven, and at $\eta = 1$ a blue one, as the prompt alone draws it. Below, how far the
# *shape* has gone: the distance between the ink of the two, which a change of colour leaves alone.

# %%
untuned = imagic.Edited(pipe, edit)
others = [
    pipe.decode_array(imagic.sample(untuned, ETAS, [seed] * len(ETAS), **how)) for seed in range(3)
]
show([p for row in others for p in (picture, *row)], titles, columns=8, scale=2)


def from_shape(pictures):
    own, theirs = (digits.recover(p / 255)[0] for p in (picture[None], pictures))
    return float(np.sqrt(np.square(theirs - own).mean()))


shapes = {
    name: [from_shape(np.stack(column)) for column in zip(*strips, strict=True)]
    for name, strips in (("tuned", rows), ("not tuned", others))
}
pyplot.figure(figsize=(6, 2.8), layout="constrained")
for name, row in shapes.items():
    pyplot.plot(ETAS, row, marker="o", label=name)
pyplot.xlabel("η")
pyplot.ylabel("RMSE of ink")
pyplot.legend(frameon=False)
pyplot.show()
assert shapes["tuned"][-1] < shapes["not tuned"][-1]

# %% [markdown]
# ## The same by commands
#
# With a picture and a model of your own; both stages resume, and `wings/strip.png` is the strip.
# The last line takes another $\eta$ without training anew. On Stable Diffusion the default number
# of steps wants a GPU or a TPU.
#
# ```
# python train.py imagic --model path/to/sd15 --image bird.png \
#     --prompt "a bird spreading its wings" --workdir wings --lora-rank 8
# python sample.py --model wings --imagic-eta 0.7
# ```
#
# `docs/editing.md` measures 300 edits beside SDEdit and DDIM inversion.

# %%
folder.cleanup()
