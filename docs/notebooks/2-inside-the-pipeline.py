# %% [markdown]
# # Looking inside the pipeline
#
# First what a pipeline can do: seeds and steps, guidance, negative prompts, starting from a
# sketch, a new word, pictures on the way. Then the same again by hand, from the prompt's tokens
# to the last pixel. It takes less than a minute on two CPU cores.
#
# The lesson's notebook does this with Stable Diffusion, on a GPU. Here it is `digits`, the same
# parts at a thousandth of the size, and the last cell takes a Stable Diffusion if you have one.

# %%
import json
import os
import sys
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from looking import show
from PIL import Image, ImageDraw
from tqdm import tqdm

import jaxsd
from jaxsd.components import load_component
from jaxsd.data import digits
from jaxsd.diffusion.schedule import Schedule, x0_and_eps
from jaxsd.hub import PRETRAINED
from jaxsd.objectives import Now
from jaxsd.objectives.text_to_image import TextToImage
from jaxsd.objectives.textual_inversion import TextualInversion
from jaxsd.tokenizer import Tokenizer
from jaxsd.towers import Towers
from jaxsd.weights import embeddings

pipe = jaxsd.load("digits")
PROMPT = "a red seven on a white background"
SEEDS = [0, 1, 2, 3]

# %% [markdown]
# ## Prompt, seed, progress
#
# One call from prompt to pictures, one for each seed. A progress bar is a callback of one line.

# %%
with tqdm(total=50, file=sys.stdout) as bar:
    images = pipe(PROMPT, SEEDS, steps=50, guidance_scale=3, callback=lambda *_: bar.update())
show(images, [f"seed {seed}" for seed in SEEDS])

again = pipe(PROMPT, [3, 2, 1, 0], steps=50, guidance_scale=3)
assert all(np.array_equal(a, b) for a, b in zip(images, again[::-1], strict=True))

# %% [markdown]
# The same seed gives the same picture, whatever stands beside it in the batch: every picture has
# its own random key.
#
# ## 3 and 16 steps

# %%
few = {steps: pipe(PROMPT, SEEDS, steps=steps, guidance_scale=3) for steps in (3, 16)}
show(
    [*few[3], *few[16], *images],
    [f"{n} steps" for n in (3, 16, 50) for _ in SEEDS],
    columns=4,
)


# %%
def apart(a, b):
    """Root mean square difference of lists of pictures, in grey levels."""
    return np.sqrt(np.square(np.float32(np.stack(a)) - np.float32(np.stack(b))).mean())


print(
    f"3 steps against 50: {apart(few[3], images):.0f}; 16 against 50: {apart(few[16], images):.0f}"
)
assert apart(few[16], images) < apart(few[3], images)

# %% [markdown]
# From the same noise, fewer steps lead to much the same picture, less exactly. How to get good
# ones in four steps or one is what notebook 4 is about.
#
# ## Guidance 1.1, 3, 7 and 14
#
# Rows are guidance scales, columns are seeds. The scale is a value like any other: nothing is
# compiled anew.

# %%
SCALES = (1.1, 3, 7, 14)
grid = [pipe(PROMPT, SEEDS, steps=50, guidance_scale=scale) for scale in SCALES]
show(
    [image for row in grid for image in row],
    [f"guidance {scale}" for scale in SCALES for _ in SEEDS],
    columns=4,
)

# %% [markdown]
# At 1.1 it is nearly the network as it was trained. The higher the scale the plainer the
# pictures; at 14 their colours are overdriven.
#
# ## What it should not be
#
# "a seven" leaves the colour free. A negative prompt takes the place of the empty one, from which
# guidance leads away.

# %%
free = pipe("a seven", SEEDS, steps=50, guidance_scale=4)
strokes = digits.recover(np.stack(free) / 255)[1]
colours, counts = np.unique(strokes, return_counts=True)
unwanted = str(colours[counts.argmax()])  # what most of them are drawn in
without = pipe("a seven", SEEDS, steps=50, guidance_scale=4, negative_prompt=unwanted)
show([*free, *without], ["a seven"] * 4 + [f"not {unwanted}"] * 4, columns=4)

assert unwanted not in digits.recover(np.stack(without) / 255)[1]

# %% [markdown]
# ## From a sketch
#
# Image-to-image (SDEdit) encodes a picture, adds noise as if it had been reached on the way from
# noise, and goes on from there. *Strength* says from how far: 0.8 of the steps are made.

# %%
sketch = Image.new("RGB", (32, 32), (240, 220, 60))
pen = ImageDraw.Draw(sketch)
pen.line([(8, 5), (24, 5), (15, 14), (24, 18), (22, 26), (8, 27)], fill=(30, 60, 200), width=4)

three = "a blue three on a yellow background"
drawn = pipe(three, SEEDS, steps=50, guidance_scale=3, image=sketch, strength=0.8)
show([sketch, *drawn], ["the sketch", *["strength 0.8"] * 4])

# %% [markdown]
# The lesson then feeds a result back, with another prompt and strength 1. What does that keep of
# it? Next to it the same without any picture, from the noise of the same seeds.

# %%
eight = "an orange eight on a purple background"
fed_back = pipe(eight, SEEDS, steps=50, guidance_scale=3, image=drawn[2], strength=1.0)
from_noise = pipe(eight, SEEDS, steps=50, guidance_scale=3)
show([*fed_back, *from_noise], ["strength 1"] * 4 + ["from noise"] * 4, columns=4)
steps, _ = pipe.plan_steps("ddim", 50)
print(
    f"at strength 1 the latents begin as {steps.alpha[0]:.2f} picture + {steps.sigma[0]:.3f} noise"
)
print(f"fed back against from noise: {apart(fed_back, from_noise):.0f} grey levels")
assert apart(fed_back, from_noise) < apart(fed_back, [drawn[2]] * 4) / 10

# %% [markdown]
# Next to nothing is kept: at the first step the schedule leaves 8 hundredths of the picture's
# amplitude under the noise. The pictures are nearly those that the noise alone would have given.
#
# ## A new word
#
# *Textual inversion*: the model stays as it is, and a new token gets vectors of its own, trained
# on a few pictures until the model would draw them when it hears the token. Here six training
# scans of one kind, a word of four vectors that begin as "digit", and 100 steps.

# %%
scans, labels = digits.load_scans("train")
rng = np.random.default_rng(0)
taught = [digits.colour_scan(s, rng, ("yellow", "purple"))[0] for s in scans[labels == 9][:6]]
taught = jnp.asarray(2 * np.stack(taught) - 1)  # [6, 32, 32, 3] in [-1, 1]
show(taught, ["<mine>"] * 6)

towers = Towers(pipe.components, pipe.tokenizers)
base = TextToImage(
    pipe.unet.config, pipe.schedule, towers, caption_dropout=0.0, initial=pipe.params["unet"]
)
word = TextualInversion(base, token="<mine>", initialize_from="digit", vectors=4)
captions = jnp.asarray(word.tokenize(["<mine>", "a <mine>", "the <mine>", "something <mine>"]))
optimizer = optax.adam(2e-2)


@jax.jit
def step(rows, memory, aux, key):
    which, said, noise = jax.random.split(key, 3)
    batch = {
        "image": taught[jax.random.randint(which, (8,), 0, len(taught))],
        "input_ids": captions[jax.random.randint(said, (8,), 0, len(captions))],
    }
    slopes, _ = jax.grad(word.loss, has_aux=True)(rows, aux, batch, Now(noise))
    change, memory = optimizer.update(slopes, memory)
    return optax.apply_updates(rows, change), memory


rows = word.init(jax.random.key(0))
memory = optimizer.init(rows)
for i in range(100):
    rows, memory = step(rows, memory, word.aux, jax.random.fold_in(jax.random.key(1), i))
print({name: value.shape for name, value in rows.items()})

# %% [markdown]
# What was learnt is a file of a kilobyte or so. It loads into a pipeline as one from the Hub's
# library of concepts would, and the word can be used like any other. (On the command line:
# `train.py textual-inversion`, `sample.py --textual-inversion`.)

# %%
with tempfile.TemporaryDirectory() as folder:
    file = embeddings.save(word.embedding(rows), folder)
    print(f"{file.name}: {file.stat().st_size} bytes")
    before = pipe("a <mine>", SEEDS, steps=30, guidance_scale=3)
    pipe.add_embedding(file)

print("tokens:", pipe.tokenizer.ids("a <mine>"), "of", len(pipe.tokenizer))
after = pipe("a <mine>", SEEDS, steps=30, guidance_scale=3)
elsewhere = pipe("a <mine> on a white background", SEEDS, steps=30, guidance_scale=3)
show(
    [*before, *after, *elsewhere],
    ["before"] * 4 + ["a <mine>"] * 4 + ["on a white background"] * 4,
    columns=4,
)
_, strokes, backgrounds = digits.recover(np.stack(after) / 255)
assert set(strokes) == {"yellow"} and set(backgrounds) == {"purple"}

# %% [markdown]
# On white its ink turns orange: the word has learnt a yellow that goes with purple.
#
# A word can only point at what the model draws already. To teach it something new, its weights
# have to move.
#
# ## DreamBooth
#
# *DreamBooth* fine-tunes the UNet on a few pictures of a thing, called by a rare word before the
# name of its kind, "a sks digit". So that not every digit becomes that thing, it is held to
# pictures of the kind which the model drew before (*prior preservation*): with $\ell$ the loss of
# notebook 1,
#
# $$
# \ell(\text{the thing},\ \text{"a sks digit"}) +
# \lambda\, \ell(\text{the model's own digits},\ \text{"a digit"}).
# $$
#
# That takes a minute or more, so there is no cell here, but one command:
#
# ```
# python train.py dreambooth --model digits --instance-data letters/ --workdir sks \
#     --instance-prompt "a sks digit" --class-prompt "a digit"
# ```
#
# The [page on editing](../editing.md) has what it and its relatives make of six pictures of a
# letter and of an ink, in figures.
#
# ## Pictures on the way, from a pipeline assembled by hand
#
# A pipeline is its components: a UNet, a VAE, a text encoder and its tokenizer, and a schedule.
# Each is a folder. Put together one by one they draw the same pictures, and `callback` sees the
# latents after every step; here every twelfth of 60 is decoded.

# %%
folder = PRETRAINED / "digits"
by_hand = jaxsd.Pipeline(
    load_component(folder / "unet", jnp.float32),  # in the files they are float16
    Schedule.from_json(json.loads((folder / "scheduler/scheduler_config.json").read_text())),
    vae=load_component(folder / "vae", jnp.float32),
    text_encoder=load_component(folder / "text_encoder", jnp.float32),
    tokenizer=Tokenizer(folder / "tokenizer"),
)
on_the_way = []


def look(i, t, latents):
    if i % 12 == 11:
        on_the_way.append((f"step {i + 1}, t = {t:.0f}", by_hand.decode(latents)[0]))


assembled = by_hand(PROMPT, SEEDS, steps=60, guidance_scale=3, callback=look)
show([image for _, image in on_the_way], [title for title, _ in on_the_way])

whole = pipe(PROMPT, SEEDS, steps=60, guidance_scale=3)
assert all(np.array_equal(a, b) for a, b in zip(assembled, whole, strict=True))

# %% [markdown]
# ## Inside: from words to numbers
#
# The tokenizer turns a prompt into 77 numbers: a start token, one for each piece of a word, an
# end token, and padding up to the length that the text encoder reads.

# %%
ids = pipe.tokenizer([PROMPT])
print(ids.shape, ids[0, :12])
print(pipe.tokenizer.tokens(PROMPT))

ends = (ids == pipe.tokenizer.eos_token_id).argmax(1)
mask = (np.arange(ids.shape[1]) <= ends[:, None]).astype(int)
print("attention mask:", mask[0, :12], "...", mask.sum(), "of", mask.size)

# %% [markdown]
# The *attention mask* says which of them are the prompt. Stable Diffusion does not use it: the
# text encoder gets all 77 ids, and the UNet listens to all 77 of its answers, padding included.
# It can, because the encoder is causal: what it says at one place depends on what stands before,
# so padding changes nothing about the words.

# %%
cond, uncond = pipe.encode([PROMPT]), pipe.encode([""])
states, empty = cond["encoder_hidden_states"], uncond["encoder_hidden_states"]
print("prompt:", states.shape, " empty prompt:", empty.shape)
assert states.shape == empty.shape == (1, 77, 64)  # Stable Diffusion 1: [1, 77, 768]

figure, axes = plt.subplots(2, 1, figsize=(9, 4), layout="constrained")
for axis, values, title in zip(axes, (states, empty), (PROMPT, "the empty prompt"), strict=True):
    axis.imshow(values[0].T, aspect="auto", cmap="RdBu", vmin=-3, vmax=3)
    axis.set(title=title, ylabel="channel")
axes[1].set(xlabel="token")

same = np.isclose(states, empty, atol=1e-5).all(-1)[0]
assert same[0] and not same[1:].any()  # both begin with the start token, and then part

# %% [markdown]
# These [1, 77, 64] numbers, the *embeddings*, are all that the UNet hears of the prompt; those of
# the empty prompt are what guidance compares with.
#
# ## Inside: β and σ
#
# The schedule says how much noise each of the 1000 time steps adds, $\beta_t$. What is left of
# the picture after $t$ of them is $\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)$ in variance, and
#
# $$\sigma_t = \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}$$
#
# is the noise beside a picture of full strength, which is how LMS counts. (Elsewhere in these
# notebooks $\sigma$ is the noise where picture and noise together have variance 1.) LMS with 70
# steps visits 70 of the times, and then 0.

# %%
STEPS, SCALE = 70, 7.5
betas = pipe.schedule.betas
alphas_bar = np.cumprod(1 - betas.astype(np.float64))
table = np.sqrt((1 - alphas_bar) / alphas_bar)

times = np.arange(STEPS)[::-1] * (1000 // STEPS) + pipe.schedule.steps_offset
sigmas = np.append(table[times], 0.0)

figure, axes = plt.subplots(1, 3, figsize=(11, 2.6), layout="constrained")
axes[0].plot(betas)
axes[0].set(title="β", xlabel="t")
axes[1].plot(table)
axes[1].set(title="σ", xlabel="t")
axes[2].plot(sigmas, ".")
axes[2].set(title="σ of 70 steps", xlabel="step")

steps, _ = pipe.plan_steps("lms", STEPS)
assert np.array_equal(steps.t[:STEPS], times)
assert np.allclose(steps.sigma[:STEPS] / steps.alpha[:STEPS], sigmas[:-1], rtol=1e-5)

# %% [markdown]
# ## Inside: the loop
#
# Now the sampler by hand: *linear multistep*, LMS, of order 4, with 70 steps at guidance 7.5. In
# LMS's coordinates a noisy picture is $y = x + \sigma \varepsilon$, and it moves with the noise
# level as
#
# $$\frac{dy}{d\sigma} = \hat\varepsilon(y, \sigma).$$
#
# Each step asks the network once, with two rows, the empty prompt's and the prompt's; combines
# what it says; and goes on along the polynomial through the last four answers, whose integrals
# over the step are the weights. The network knows pictures and noise of variance 1 together, so
# it is shown $z = y / \sqrt{1 + \sigma^2}$.


# %%
def weight(sigmas, i, back, order):
    """The integral over step i of the polynomial that is 1 at step i - back, 0 at the others."""
    basis = np.poly1d([1.0])
    for other in range(order):
        if other != back:
            gap = sigmas[i - back] - sigmas[i - other]
            basis *= np.poly1d([1.0, -sigmas[i - other]]) / gap
    integral = basis.integ()
    return float(integral(sigmas[i + 1]) - integral(sigmas[i]))


def sample_by_hand(pipe, noise, cond, uncond, times, sigmas, scale):
    told = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)
    network = jax.jit(lambda params, z, t, told: pipe.unet(params, z, t, **told))
    y, answers = noise * np.sqrt(1 + sigmas[0] ** 2), []
    for i, t in enumerate(times):
        alpha = 1 / np.sqrt(1 + sigmas[i] ** 2)
        z = y * alpha
        both = network(pipe.params["unet"], jnp.concatenate([z, z]), jnp.full(2, float(t)), told)
        unguided, conditional = both[:1], both[1:]
        said = unguided + scale * (conditional - unguided)
        # digits says v, Stable Diffusion 1 says the noise itself
        kind = pipe.schedule.prediction_type
        answers.insert(0, x0_and_eps(kind, said, z, alpha, alpha * sigmas[i])[1])
        order = min(i + 1, 4)
        y += sum(weight(sigmas, i, back, order) * answers[back] for back in range(order))
    return y


noise = pipe.noise([0])
latents = sample_by_hand(pipe, noise, cond, uncond, times, sigmas, SCALE)

# %% [markdown]
# Is that what the library's sampler does? Its latents should be the same up to the rounding of 70
# steps in float32. The tolerance was set before looking: $10^{-3}$, of latents whose standard
# deviation is about 1.

# %%
TOLERANCE = 1e-3
library = pipe.denoise(noise, cond, uncond, steps=STEPS, guidance_scale=SCALE, sampler="lms")
difference = float(jnp.abs(latents - library).max())
print(f"largest difference: {difference:.1e}; standard deviation: {float(library.std()):.2f}")
assert difference < TOLERANCE

# %% [markdown]
# ## Inside: the picture
#
# What is left is to undo the scale of the latents, let the VAE decode them, and bring $[-1, 1]$
# to 256 levels.

# %%
unscaled = latents / pipe.vae.config.scaling_factor
decoded = pipe.vae(pipe.params["vae"], unscaled, method="decode")
pixels = np.rint((np.asarray(decoded[0]) / 2 + 0.5).clip(0, 1) * 255).astype(np.uint8)
picture = Image.fromarray(pixels)
assert np.abs(pixels - np.float32(pipe.decode(library)[0])).max() <= 1
show([picture], ["70 steps of LMS, by hand"], scale=6)

# %% [markdown]
# ## The same with Stable Diffusion
#
# Nothing above is particular to digits. If you have a Stable Diffusion 1 or 2 as a diffusers
# folder, name it before you start Jupyter, and run this cell:
#
# ```
# export STABLE_DIFFUSION=path/to/stable-diffusion-v1-5
# ```

# %%
if found := os.environ.get("STABLE_DIFFUSION"):
    large = jaxsd.load(found)
    prompt = "a photograph of an astronaut riding a horse"
    cond, uncond = large.encode([prompt]), large.encode([""])
    print(large.tokenizer([prompt])[0, :12], {name: v.shape for name, v in cond.items()})

    steps, _ = large.plan_steps("lms", STEPS)
    sigmas = np.append(steps.sigma[:STEPS] / steps.alpha[:STEPS], 0.0).astype(np.float64)
    # Some schedules begin with a little less than all of the noise
    noise = large.noise([0]) * float(steps.init_scale)
    latents = sample_by_hand(large, noise, cond, uncond, steps.t[:STEPS], sigmas, SCALE)
    show(large.decode(latents), [prompt], scale=1)
else:
    print("STABLE_DIFFUSION is not set: there is nothing to do here.")
