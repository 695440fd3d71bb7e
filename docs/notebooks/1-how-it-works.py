# %% [markdown]
# # How it works: the noisy seven
#
# A real scan of a seven gets noise added, a network says what the noise was, and how wrong it is
# makes it better. Then the same network draws sevens from noise alone, and every step of that is
# looked at. All of it takes about half a minute on two CPU cores.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from looking import show

import jaxsd
from jaxsd.data import digits
from jaxsd.diffusion.schedule import x0_and_eps
from jaxsd.editing.mixing import lerp

pipe = jaxsd.load("digits-ddpm")  # draws scans, from the name of a digit, without a VAE
schedule = pipe.schedule

# %% [markdown]
# ## 7 + noise = noisy 7
#
# The scans are scikit-learn's: 8x8 pixels, here in $[-1, 1]$. This one was held out: the network
# has never seen it.
#
# Noise is not just put on top. A noisy picture is a mixture,
#
# $$z_t = \alpha_t\, x + \sigma_t\, \varepsilon, \qquad \alpha_t^2 + \sigma_t^2 = 1,$$
#
# of the picture $x$ and of random numbers $\varepsilon \sim N(0, 1)$, one for each pixel. The
# time $t$ runs from 0, the picture, to 1000, noise alone, and the *schedule* says how much of
# either there is in between.

# %%
scans, labels = digits.load_scans("test")
sevens = 2 * scans[labels == 7] - 1
x = jnp.asarray(sevens[:1, :, :, None])  # [1, 8, 8, 1]
eps = jax.random.normal(jax.random.key(0), x.shape)

times = [0.0, 100.0, 250.0, 400.0, 550.0, 700.0, 850.0, 1000.0]
levels = [schedule.alpha_sigma(jnp.float32(t)) for t in times]
noisy = [alpha * x + sigma * eps for alpha, sigma in levels]
show(
    [z[0] for z in noisy],
    [f"σ = {sigma:.2f}" for _, sigma in levels],
    scale=10,
)

# %% [markdown]
# ## The network says what the noise was
#
# It is given the noisy seven, the time, and that this is a seven. A network may be trained to
# answer with the noise $\varepsilon$, with the picture $x$, or, as this one, with
# $v = \alpha \varepsilon - \sigma x$. That is no other question: $z$ is known, so any of the
# three gives the other two,
#
# $$\hat x = \alpha z - \sigma v, \qquad \hat\varepsilon = \alpha v + \sigma z.$$

# %%
told = pipe.encode(["7"])
t = 550.0
alpha, sigma = schedule.alpha_sigma(jnp.float32(t))
z = alpha * x + sigma * eps
v = pipe.predict(z, t, told)
guess_x, guess_eps = alpha * z - sigma * v, alpha * v + sigma * z

as_library = x0_and_eps(schedule.prediction_type, v, z, alpha, sigma)
assert all(
    np.allclose(a, b, atol=1e-6) for a, b in zip(as_library, (guess_x, guess_eps), strict=True)
)
show(
    [a[0] for a in (x, eps / 2, z, guess_eps / 2, guess_x)],
    ["a real seven", "+ noise", "= noisy seven", "what it takes for noise", "what is left"],
    scale=12,
)
print(f"loss: mean (noise - guess)² = {jnp.square(eps - guess_eps).mean():.4f}")

# %% [markdown]
# That number is the *loss*: the mean square of the difference between the noise that was added
# and the noise that was found. Not knowing anything and always answering 0 would cost about 1,
# the variance of the noise.

# %%
guesses = []
for t, z in zip(times[1:], noisy[1:], strict=True):
    level = schedule.alpha_sigma(jnp.float32(t))
    guesses.append(x0_and_eps(schedule.prediction_type, pipe.predict(z, t, told), z, *level))
show(
    [z[0] for z in noisy[1:]] + [guess[0] for guess, _ in guesses],
    [f"t = {t:.0f}" for t in times[1:]] + ["its guess"] * len(guesses),
    columns=len(guesses),
    scale=10,
)

# %% [markdown]
# Above the noisy sevens, below the pictures that the network believes to be behind them. From
# noise alone, at the right, it answers with the mean of all sevens: the best guess where nothing
# can be seen, and a blurred one. This is why one does not take all the noise away in one go.
#
# ## Loss against noise
#
# Now for 50 held-out scans of all digits, at 12 noise levels. Three times: told the right digit,
# told nothing, and told a wrong one.

# %%
count = 50
x0 = jnp.asarray(2 * scans[:count, :, :, None] - 1)
noise = jax.random.normal(jax.random.key(1), x0.shape)
names = [str(label) for label in labels[:count]]
wrong = [str((label + 3) % 10) for label in labels[:count]]
conditions = {"the digit": names, "nothing": [""] * count, "a wrong digit": wrong}
grid = np.linspace(20, 980, 12)

losses = {}
for name, words in conditions.items():
    rows = []
    for t in grid:
        alpha, sigma = schedule.alpha_sigma(jnp.float32(t))
        z = alpha * x0 + sigma * noise
        v = pipe.predict(z, float(t), pipe.encode(words))
        found = x0_and_eps(schedule.prediction_type, v, z, alpha, sigma)
        rows.append(
            [float(jnp.square(a - b).mean()) for a, b in zip(found, (x0, noise), strict=True)]
        )
    losses[name] = np.array(rows)

sigmas = np.asarray(schedule.alpha_sigma(jnp.asarray(grid, jnp.float32))[1])
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for axis, column, title in zip(axes, (1, 0), ("of the noise", "of the picture"), strict=True):
    for name, rows in losses.items():
        axis.plot(sigmas, rows[:, column], ".-", label=f"told {name}")
    axis.set(xlabel="σ, from picture to noise", ylabel="mean square error", title=f"Error {title}")
axes[0].legend()

means = {name: rows[:, 0].mean() for name, rows in losses.items()}
assert means["the digit"] < means["nothing"] < means["a wrong digit"]
assert (np.diff(losses["the digit"][:, 0]) > 0).mean() > 0.8  # more noise, less to be seen

# %% [markdown]
# Where there is little noise, the noise is hard to tell; where there is much, the picture is. And
# there the digit helps most: what noise has covered, the word still says. A wrong word misleads.
#
# ## How it gets better
#
# A network starts from random weights. The loss has a slope for each of them, and a step of
# training moves all of them a little downhill. Here is the whole of it for a network of four
# matrices, which sees a scan as 64 numbers: scans of the *training* split, random times, noise,
# the loss, its gradient, a step; 2000 times. The loss is that of what the network says, here of
# $v$.

# %%
train_scans, train_labels = digits.load_scans("train")
train_x = jnp.asarray(2 * train_scans.reshape(-1, 64) - 1)
train_told = jax.nn.one_hot(train_labels, 10)
WIDTHS = (64 + 10 + 16, 256, 256, 256, 64)  # in: pixels, the digit, the time; out: pixels


def network(params, z, t, told):
    waves = jnp.outer(t / 1000, 2.0 ** jnp.arange(8))
    h = jnp.concatenate([z, told, jnp.sin(waves), jnp.cos(waves)], 1)
    for matrix in params[:-1]:
        h = jax.nn.silu(h @ matrix)
    return h @ params[-1]


def loss(params, key):
    which, when, noise = jax.random.split(key, 3)
    rows = jax.random.randint(which, (128,), 0, len(train_x))
    t = jax.random.uniform(when, (128,)) * 1000
    x, eps = train_x[rows], jax.random.normal(noise, (128, 64))
    alpha, sigma = (level[:, None] for level in schedule.alpha_sigma(t))
    v = network(params, alpha * x + sigma * eps, t, train_told[rows])
    return jnp.square(v - (alpha * eps - sigma * x)).mean()


optimizer = optax.adam(1e-3)


def step(carry, key):
    params, memory = carry
    error, slopes = jax.value_and_grad(loss)(params, key)
    change, memory = optimizer.update(slopes, memory)
    return (optax.apply_updates(params, change), memory), error


@jax.jit
def train(params, key):
    (params, _), errors = jax.lax.scan(
        step, (params, optimizer.init(params)), jax.random.split(key, 2000)
    )
    return params, errors


keys = jax.random.split(jax.random.key(2), len(WIDTHS) - 1)
fresh = [
    jax.random.normal(key, (rows, columns)) * (2 / rows) ** 0.5
    for key, rows, columns in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
]
trained, errors = train(fresh, jax.random.key(3))

figure, axis = plt.subplots(figsize=(6, 2.5), layout="constrained")
axis.plot(errors, linewidth=0.5)
axis.set(xlabel="step", ylabel="loss", ylim=(0, 1.3))
assert errors[-100:].mean() < errors[:10].mean() / 2

# %%
t = 550.0
alpha, sigma = schedule.alpha_sigma(jnp.float32(t))
z = alpha * x + sigma * eps
guesses = []
for params in (fresh, trained):
    v = network(params, z.reshape(1, 64), jnp.array([t]), told["class_labels"]).reshape(z.shape)
    guesses.append(alpha * z - sigma * v)
show(
    [a[0] for a in (z, *guesses, guess_x)],
    ["noisy seven", "guess before", "after 2000 steps", "the model that ships"],
    scale=12,
)

# %% [markdown]
# The model that ships, a UNet of convolutions and attention, saw 5000 steps (`train.py ddpm`).
#
# ## The one-hot seven
#
# How is a network told "seven"? By ten numbers, of which the eighth is 1: *one-hot*. Nothing at
# all is ten zeros.

# %%
for name in ("7", "seven", "three", ""):
    print(f"{name!r:8}", pipe.encode([name])["class_labels"][0].astype(int))

seven = pipe.encode(["seven"])["class_labels"][0]
matrix = pipe.params["unet"]["class_embedding.weight"]
assert np.array_equal(matrix @ seven, matrix[:, 7])
print("a seven inside the network:", matrix[:, 7].shape)

# %% [markdown]
# The lesson's notes call the one-hot vector the embedding of 7. To be exact, it picks one: the
# first thing that the network does is to multiply a matrix $[192, 10]$ by it, which gives the
# matrix' column for seven. Those 192 learnt numbers are the *embedding*, and they are added to
# those that say what time it is.
#
# So the network can draw any digit from the same noise, and also what it is told by five tenths
# of one digit and five of another.

# %%
noise = jnp.repeat(pipe.noise([5]), 10, 0)
every = pipe.encode([str(digit) for digit in range(10)])
drawn = pipe.denoise(noise, every, None, steps=40, sampler="euler")
show(drawn, [f"told {digit}" for digit in range(10)], scale=8)

three, eight = pipe.encode(["3"] * 10), pipe.encode(["8"] * 10)
shares = [float(share) for share in np.linspace(0, 1, 10)]
drawn = pipe.denoise(noise, lerp(three, eight, shares), None, steps=40, sampler="euler")
show(drawn, [f"{1 - share:.0%} 3, {share:.0%} 8" for share in shares], scale=8)

# %% [markdown]
# ## Guidance, written out
#
# To follow the word harder than it was trained to, the network is asked twice at each step: told
# the digit, $\hat v_c$, and told nothing, $\hat v_u$. One goes from the second to the first and
# on in the same direction,
#
# $$\hat v = \hat v_u + s\,(\hat v_c - \hat v_u).$$
#
# With $s = 1$ that is the network as trained, and *larger* $s$ follows the word harder (the
# lesson's notes have it the other way round). The notes also wonder why the network gives two
# pictures. It is one call with a batch of two rows, because that is faster than two calls; the
# line above makes one of them.
#
# Here is the whole sampler, 40 steps from noise to picture. Each step takes the guess of the
# picture and the guess of the noise, and mixes them anew with a little less noise.

# %%
SCALE, STEPS = 3.0, 40
nothing = pipe.encode([""] * 10)


@jax.jit
def ask(z, t):
    both = jnp.concatenate([z, z])
    told = jnp.concatenate([nothing["class_labels"], every["class_labels"]])
    return pipe.unet(pipe.params["unet"], both, jnp.full(len(both), t), class_labels=told)


z = noise
for i in range(STEPS, 0, -1):
    unguided, conditional = jnp.split(ask(z, 1000.0 * i / STEPS), 2)
    v = unguided + SCALE * (conditional - unguided)
    alpha, sigma = schedule.alpha_sigma(jnp.float32(1000 * i / STEPS))
    next_alpha, next_sigma = schedule.alpha_sigma(jnp.float32(1000 * (i - 1) / STEPS))
    guess_x = jnp.clip(alpha * z - sigma * v, -1, 1)  # pixels have no other values
    guess_eps = (z - alpha * guess_x) / sigma  # the noise that goes with it
    z = next_alpha * guess_x + next_sigma * guess_eps

by_library = pipe.denoise(noise, every, nothing, steps=STEPS, guidance_scale=SCALE, sampler="euler")
difference = float(jnp.abs(z - by_library).max())
print(f"largest difference to pipe.denoise: {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# The same by the library, with guidance 1, 2, 4 and 8 from the top, from the same noise. Strokes
# get plainer and harder.

# %%
rows = [
    pipe.denoise(noise, every, nothing, steps=STEPS, guidance_scale=scale, sampler="euler")
    for scale in (1.0, 2.0, 4.0, 8.0)
]
show(jnp.concatenate(rows), columns=10, scale=8)

# %% [markdown]
# The line with `guess_eps` is easily got wrong. Guidance leads beyond $[-1, 1]$, the picture is
# cut there, and the noise must be worked out anew from what was cut. `ddim` keeps the noise as it
# was predicted, as diffusers' `DDIMScheduler` does unless told `use_clipped_model_output`. That
# noise goes with a picture of far more contrast, and what is too much of it in there counts
# against the digit: the same at guidance 3.

# %%
cut = pipe.denoise(noise, every, nothing, steps=STEPS, guidance_scale=SCALE, sampler="ddim")
show(jnp.concatenate([by_library, cut]), columns=10, scale=8)

# %% [markdown]
# ## Pictures on the way
#
# A `callback` sees the latents after each step; of this model those are pixels, so they can be
# shown as they are. (`latents_callback` in the lesson's notebook.)

# %%
on_the_way = []


def look(i, t, latents):
    if i % 5 == 4:
        on_the_way.append((i + 1, latents[7]))


pipe.denoise(
    noise, every, nothing, steps=STEPS, guidance_scale=SCALE, sampler="euler", callback=look
)
show([z for _, z in on_the_way], [f"after {i}" for i, _ in on_the_way], scale=10)

# %% [markdown]
# ## From step 36 to step 54
#
# The lesson draws two diagrams: a strip of pictures over the steps of a run, and the same with
# steps 36 and 54 marked: eighteen steps, and one sees hardly any difference. Why does that take
# as long as the first eighteen, which make a picture from nothing?
#
# Here they are from real runs: four prompts, 60 steps, with `digits`, which has prompts and a VAE
# like Stable Diffusion, and Stable Diffusion's schedule. Beside the latents $z_i$ after each step
# we keep what the network took for the picture in that step. From one DDIM step both guesses
# follow: $z_i = \alpha_i \hat x + \sigma_i \hat\varepsilon$ and
# $z_{i+1} = \alpha_{i+1} \hat x + \sigma_{i+1} \hat\varepsilon$ are two equations with two
# unknowns.

# %%
latent_pipe = jaxsd.load("digits")
prompts = [
    "a red seven on a white background",
    "a blue three on a yellow background",
    "a green one on a black background",
    "an orange eight on a purple background",
]
start = latent_pipe.noise(range(4))
path = [np.asarray(start)]
latent_pipe.denoise(
    start,
    latent_pipe.encode(prompts),
    latent_pipe.encode([""] * 4),
    steps=60,
    guidance_scale=3,
    sampler="ddim",
    callback=lambda i, t, latents: path.append(np.asarray(latents)),
)
path = np.stack(path)  # [61, 4, 8, 8, 4]

steps, _ = latent_pipe.plan_steps("ddim", 60)
names = ("alpha", "sigma", "next_alpha", "next_sigma")
levels = [np.asarray(getattr(steps, name)[:60]) for name in names]
alpha, sigma, next_alpha, next_sigma = (level[:, None, None, None, None] for level in levels)
guesses = next_sigma * path[:-1] - sigma * path[1:]
guesses /= next_sigma * alpha - sigma * next_alpha

seen = np.stack([latent_pipe.decode_pixels(z) for z in path]).clip(-1, 1)
guessed = np.stack([latent_pipe.decode_pixels(x) for x in guesses]).clip(-1, 1)
every_six = range(0, 61, 6)
show(
    [seen[i, 0] for i in every_six] + [guessed[min(i, 59), 0] for i in every_six],
    [f"step {i}" for i in every_six] + ["its guess"] * 11,
    columns=11,
    scale=3,
)

# %% [markdown]
# Above, what the VAE makes of the noisy latents; below, the picture that the network believed in
# at that step. The second diagram, with the distance (root mean square, of values in $[-1, 1]$)
# between the two ends:


# %%
def distance(a, b):
    return np.sqrt(np.square(a - b).mean(axis=(-3, -2, -1))).mean(-1)  # over four pictures


stops = [0, 18, 36, 54]
show(
    [each[i, row] for row in range(4) for each in (seen, guessed) for i in stops],
    [f"{what}, step {i}" for what in ("seen", "its guess") for i in stops] + [""] * 24,
    columns=8,
    scale=3,
)
kinds = {"latents": path, "seen": seen, "its guess": guessed}
for name, values in kinds.items():
    early, late = (distance(values[a], values[b]) for a, b in ((0, 18), (36, 54)))
    print(f"{name:10} step 0 to 18: {early:.2f}   step 36 to 54: {late:.2f}")
assert distance(guessed[36], guessed[54]) < distance(guessed[0], guessed[18]) / 4
assert distance(path[36], path[54]) > distance(path[0], path[18])

# %% [markdown]
# The note is right about what the picture will be: between steps 36 and 54 it changes a small
# fraction of what it changes between 0 and 18. But the latents do not stand still. They go
# *farther* than in the first eighteen steps. The curves, step by step:

# %%
angle = np.arctan2(levels[1], levels[0]) - np.arctan2(levels[3], levels[2])
figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
axes[0].plot(distance(path[1:], path[:-1]), label="latents")
axes[0].plot(distance(guessed[1:], guessed[:-1]), label="its guess")
axes[0].plot(angle, "k:", label="angle of the step")
axes[0].set(title="Change per step", xlabel="step", ylim=(0, 0.1))
axes[1].plot(levels[1], label="σ")
axes[1].plot(levels[0], label="α")
axes[1].set(title="Noise and picture in the latents", xlabel="step")
axes[2].plot(levels[1], distance(guessed, seen[-1]))
axes[2].set(title="From the guess to the end", xlabel="σ", xlim=(1, 0))
for axis in axes[:2]:
    axis.axvspan(36, 54, color="0.9")
    axis.legend()

later = distance(path[1:], path[:-1])[20:57] / angle[20:57]
assert abs(later - 1).max() < 0.15
left = distance(guessed[36], seen[-1])
print(f"from the guess at step 36 to the last picture: {left:.2f}")

# %% [markdown]
# What the lesson calls a side effect of the original mathematics is this. With
# $\alpha = \cos\varphi$ and $\sigma = \sin\varphi$ the latents turn from noise,
# $\varphi = \pi/2$, to picture, $\varphi = 0$, and a step through the angle $\Delta\varphi$ moves
# them by about $\Delta\varphi$, whatever there is to see. That is the dotted line, which the
# latents follow as soon as the first steps, where guidance pulls hard, are over. The schedule
# spreads its steps over the noise level. But what the picture will be is decided where there is
# much noise (the third plot): at step 36 there is still as much noise as picture in the latents,
# and the network sees through it well enough to know all but the details. The steps after it
# mostly take out noise that it has recognised long before.
#
# They are needed all the same. The guess of step 36 is not yet the last picture, and to jump to
# it leaves the distance printed above. To learn that jump is what progressive distillation does:
# notebook 4.
