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
# # Distillation: few steps in place of fifty
#
# Teacher and students draw from the same noise in 1, 2, 4 and 8 steps, a student is trained
# before your eyes, and guidance is put into one pass. It takes about a minute on two cores.

# %% [markdown]
# A diffusion model is asked for a picture again and again: 50 steps, with guidance two passes
# each. A **student** is a network of the same shape that is taught to arrive where its teacher
# arrives, in fewer steps. It saves steps alone. The lesson's notes have it smaller and with less
# memory: it has as many weights as its teacher, and starts as a copy of it.
#
# Three ways ship with jaxsd, told in full in `docs/distillation.md`:
#
# | way | what the student learns |
# |---|---|
# | progressive | one step where its teacher takes two: 64 → 32 → … → 1 |
# | guided | in one pass what guidance says in two, at any scale |
# | consistency | from any point of the path to say where it ends |
#
# They are of [Salimans & Ho 2022](https://arxiv.org/abs/2202.00512), [Meng et al.
# 2023](https://arxiv.org/abs/2210.03142) and [Luo et al. 2023](https://arxiv.org/abs/2310.04378).

# %%
import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
from looking import show
from matplotlib import pyplot

import jaxsd
from jaxsd import data, training
from jaxsd.diffusion import jumps
from jaxsd.evaluation.judge import flatten_scans, real_scans
from jaxsd.evaluation.metrics import frechet_distance
from jaxsd.objectives.ddpm import DDPM
from jaxsd.objectives.distillation import Teacher
from jaxsd.objectives.progressive import Progressive

# Students differ in their weights alone, so they share compiled programs through this folder
folder = tempfile.TemporaryDirectory()
jaxsd.use_compilation_cache(folder.name)


def rmse(a, b):
    """The root mean square difference of two batches."""
    return float(np.sqrt(np.square(np.asarray(a) - np.asarray(b)).mean()))


# %% [markdown]
# ## The same noise, fewer steps
#
# The pixel model draws 8x8 digits. Row by row: 64 steps of the teacher, then 8, 4, 2 and 1 steps
# of it, then the students that were made for 8, 4, 2 and 1. All begin at the same ten draws of
# noise. So that the rows can be compared, the teacher steps here as students are taught: from
# pure noise (`trailing` spacing), and unclipped on the way.

# %%
STEPS = (8, 4, 2, 1)
teacher = jaxsd.load("digits-ddpm")
teacher.schedule = jumps.student_schedule(teacher.schedule)
students = {steps: jaxsd.load(f"digits-ddpm-{steps}step") for steps in STEPS}
assert all(student.unet.size == teacher.unet.size for student in students.values())
print(f"{teacher.unet.size:,} weights, teacher and students alike")


def scans(pipe, steps, count=10):
    """Pixels [count, 8, 8, 1]: the digits 0 ... 9 again and again, picture i from seed i."""
    told = pipe.encode([str(i % 10) for i in range(count)])
    noise = pipe.noise(range(count))
    return pipe.denoise(noise, told, None, steps=steps, guidance_scale=1, sampler="ddim")


path_end = scans(teacher, 64)
few = {steps: scans(teacher, steps) for steps in STEPS}
taught = {steps: scans(students[steps], steps) for steps in STEPS}

rows = [path_end, *few.values(), *taught.values()]
names = ["64", *map(str, STEPS), *(f"student {steps}" for steps in STEPS)]
titles = [name if i == 0 else "" for name in names for i in range(10)]
show([p for row in rows for p in teacher.decode_array(row)], titles, columns=10, scale=6)

# %% [markdown]
# With few steps DDIM draws means: where there is noise alone, the best guess at the picture is
# the average of all sevens, and one step takes that guess for the answer. Students draw *this*
# seven, the one to which the teacher's path leads. That is the most sensitive measure: how far
# each picture is from the 64 steps' of the same noise (pixels from −1 to 1).

# %%
print("steps   DDIM   student")
for steps in STEPS:
    undistilled, student = rmse(few[steps], path_end), rmse(taught[steps], path_end)
    print(f"{steps:5}  {undistilled:.3f}   {student:.3f}")
    assert student < undistilled

# %% [markdown]
# ## From text
#
# `digits` draws 32x32 pictures from a prompt. It takes 50 steps of *two* passes, since guidance
# asks with the prompt and without. Its students take 4, 2 or 1 steps of *one*: they are told the
# guidance scale. `digits-lcm` is the consistency student, sampled with `lcm`. Below each other:
# the same prompt and the same noise.

# %%
prompts = [
    "a red seven on a white background",
    "a green three on a black background",
    "a blue five on a yellow background",
    "a purple two on a white background",
    "an orange nine on a black background",
    "a black zero on a green background",
    "a white four on a blue background",
    "a yellow eight on a purple background",
]
digits = jaxsd.load("digits")
digits.schedule = jumps.student_schedule(digits.schedule)
guided = {name: jaxsd.load(f"digits-{name}") for name in ("4step", "2step", "1step", "lcm")}


def pictures(pipe, steps, texts=prompts, scale=3.0, seeds=None):
    """Latents [n, 8, 8, 4]; pipe: the teacher, asked twice a step, or a student, asked once."""
    noise = pipe.noise(range(len(texts)) if seeds is None else seeds)
    nothing = None if pipe.guidance_embedded else pipe.encode([""] * len(texts))
    how = {"steps": steps, "guidance_scale": scale, "sampler": pipe.default_sampler}
    return pipe.denoise(noise, pipe.encode(texts), nothing, **how)


table = [("50 steps, 100 passes", pictures(digits, 50))]
table += [(f"{n} step{'s' * (n > 1)}, {2 * n} passes", pictures(digits, n)) for n in (4, 2, 1)]
table += [
    (f"student, {n} pass{'es' * (n > 1)}", pictures(guided[f"{n}step"], n)) for n in (4, 2, 1)
]
table += [(f"lcm, {n} pass{'es' * (n > 1)}", pictures(guided["lcm"], n)) for n in (4, 2, 1)]

titles = [name if i == 0 else "" for name, _ in table for i in range(len(prompts))]
show([p for _, row in table for p in digits.decode_array(row)], titles, columns=8, scale=2)

# %%
ends = digits.decode_pixels(table[0][1])
print("to the 100 passes' pictures")
for name, row in table[1:]:
    print(f"{name:20} {rmse(digits.decode_pixels(row), ends):.3f}")

# %% [markdown]
# The consistency student draws the digits asked for, though not always the teacher's pictures: with
# more than one step it adds new noise on the way.

# %% [markdown]
# ## What a student is told to say
#
# Noise levels are angles: $z = \cos\varphi\,x + \sin\varphi\,\epsilon$, from $\varphi = 0$, the
# picture, to $\pi/2$, noise. What the network predicts is $v = \cos\varphi\,\epsilon -
# \sin\varphi\,x$, and a DDIM step from $\varphi$ to $\psi$ is a turn,
#
# $$z_\psi = \cos\delta\; z_\varphi - \sin\delta\; v, \qquad \delta = \varphi - \psi.$$
#
# The teacher turns twice by half the angle and lands at $z''$. The student is to land there in
# one turn, so it has to say
#
# $$\tilde v = \frac{\cos\delta\; z - z''}{\sin\delta}, \qquad
# \tilde x = \cos\varphi\; z - \sin\varphi\;\tilde v .$$
#
# The paper writes $\tilde x = (z'' - \frac{\sigma''}{\sigma} z) / (\alpha'' -
# \frac{\sigma''}{\sigma} \alpha)$. That is the same; with angles nothing is divided by that may
# vanish.


# %%
def turn(z, v, delta):
    return np.cos(delta) * z - np.sin(delta) * v


def target(z, landed, delta):
    return (np.cos(delta) * z - landed) / np.sin(delta)


rng = np.random.default_rng(0)
z, v1, v2 = rng.standard_normal((3, 1, 8, 8, 1))
start, middle, end = 1.2, 0.9, 0.6
landed = turn(turn(z, v1, start - middle), v2, middle - end)
v = target(z, landed, start - end)
assert np.allclose(turn(z, v, start - end), landed, atol=1e-12)

x = np.cos(start) * z - np.sin(start) * v
ratio = np.sin(end) / np.sin(start)
assert np.allclose(x, (landed - ratio * z) / (np.cos(end) - ratio * np.cos(start)), atol=1e-12)

# jaxsd's own, of which students are made
levels = [jumps.Level(*(np.array([f], np.float32) for f in (0, np.cos(a), np.sin(a))))
          for a in (start, end)]  # fmt: skip
own, _ = jumps.explains(z.astype(np.float32), landed.astype(np.float32), *levels)
assert np.allclose(own, x, atol=1e-5)

# %% [markdown]
# ## A case with a known answer
#
# Say pictures are themselves unit Gaussian noise. Then $z$ says nothing of $v$, the best
# prediction is $v = 0$, and each of the teacher's 64 steps multiplies by $\cos\frac{\pi}{128}$. A
# student that learns its targets perfectly, and so on down to one step, must say
#
# $$x = \cos^{64}\!\left(\tfrac{\pi}{128}\right) z = .9809\, z .$$
#
# One undistilled step says $\cos\frac{\pi}{2}\, z = 0$: the mean of all pictures.

# %%
steps, said = 64, np.zeros(64)  # v = said[i] * z at the i-th level from the picture, counted from 1
while steps > 1:
    delta = np.pi / 2 / steps
    one, other = (turn(1.0, said[i::2], delta) for i in (1, 0))  # first the noisier step
    said, steps = target(1.0, one * other, 2 * delta), steps // 2

x = np.cos(np.pi / 2) - np.sin(np.pi / 2) * said[0]
print(f"the one-step student says {x:.6f} z")
assert abs(x - np.cos(np.pi / 128) ** 64) < 1e-12 and round(x, 4) == 0.9809

# %% [markdown]
# ## A student, trained now
#
# The last stage of the pixel model's chain: teacher and first weights are those of the 2-step
# student. `Progressive` is an objective like any other; the loop below is what
# `train.py progressive` does, without a workdir. The student that ships had 3000 updates of 64
# examples in this stage. This one has 60 of 16, and only its upper half moves, for which the
# compiler needs less time.

# %%
two = students[2]
schedule = dataclasses.replace(two.schedule, default_steps=1)
base = DDPM(two.unet.config, schedule, initial=two.params["unet"])
objective = Progressive(base, Teacher(two.unet, two.params["unet"], two.schedule), steps=1)

options = training.Options(
    60,
    batch_size=16,
    learning_rate=1e-3,
    warmup_steps=0,
    decay="linear",
    ema_decay=0,
    train=("up_blocks.*", "conv_norm_out.*", "conv_out.*"),
)
optimizer = training.make_optimizer(options)
state, aux = training.init_state(objective, optimizer, options)
update = jax.jit(training.make_step(objective, optimizer, options), donate_argnums=0)

losses = []
for batch in data.batches(data.elements("digit-scans", "train", 0), 16, 0, options.steps):
    state, metrics = update(state, aux, batch)
    losses.append(float(metrics["loss"]))

pyplot.figure(figsize=(6, 2.5), layout="constrained")
pyplot.semilogy(losses)
pyplot.xlabel("update")
pyplot.ylabel("loss")
pyplot.show()

# %%
trained = objective.pipeline(aux.whole(state.ema))
rows = [("2 steps", scans(two, 2)), ("1, before", scans(two, 1))]
rows += [("60 updates", scans(trained, 1)), ("3000", taught[1])]
titles = [name if i == 0 else "" for name, _ in rows for i in range(10)]
show([p for _, row in rows for p in two.decode_array(row)], titles, columns=10, scale=6)

to_two = {name: rmse(row, rows[0][1]) for name, row in rows[1:]}
print({name: round(value, 3) for name, value in to_two.items()})
assert to_two["60 updates"] < to_two["1, before"] / 2
assert np.mean(losses[-10:]) < np.mean(losses[:5]) / 2

# %% [markdown]
# ## Guidance in one pass
#
# Guidance asks the network twice, with the prompt and with nothing, and goes on beyond the first
# answer: $\hat\epsilon = \epsilon_\varnothing + s\,(\epsilon_c - \epsilon_\varnothing)$. The
# lesson's notes wonder that the UNet gives two pictures. It is one batch of two rows, combined
# linearly. They also have it the wrong way round: a *high* scale $s$ follows the prompt hard,
# $s = 1$ is the prompt alone, $s = 0$ no prompt.
#
# A guided student is told $s$ as it is told the time, and says in one pass what the teacher says
# in two. The paper's $w$ is $s - 1$. In training $s$ is drawn anew for each example, so one
# student does for all scales. Above, the teacher's 50 steps (100 passes) at $s = 1 \dots 8$;
# below, the student in 4 passes, from the same noise.

# %%
scales = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
asked = ["a green three on a black background"] * len(scales)
by_two = pictures(digits, 50, asked, scales, [1] * len(scales))
by_one = pictures(guided["4step"], 4, asked, scales, [1] * len(scales))
titles = [f"s = {s:g}" for s in scales] + [""] * len(scales)
show([*digits.decode_array(by_two), *digits.decode_array(by_one)], titles, columns=8, scale=2)

nearest = [scales[np.argmin([rmse(one, two) for two in by_two])] for one in by_one]
print("each of the student's is nearest to the teacher's at s =", nearest)
assert nearest[:3] == scales[:3]

# %% [markdown]
# Near the scales at which one draws, up to 4, the student is where its teacher is. Beyond, it
# follows at a distance: here its pictures are like the teacher's at a lower scale. The red that
# runs over the background is guidance's own doing: the teacher shows more of it.
#
# A student has no unconditional half, so a negative prompt has nothing to replace and is refused.

# %%
try:
    guided["4step"]("a seven", negative_prompt="blue")
except jaxsd.JaxsdError as error:
    print(error)

# %% [markdown]
# ## Quality against steps
#
# On the left, measured now: 200 scans of each pixel model, and the Fréchet distance between their
# pixels and those of the 450 held-out scans, "FD pix" of `jaxsd evaluate`. It is biased upwards
# for few samples, so the teacher's in `docs/models.md`, of 2000, is lower. On the right, the models
# that read text: the share of pictures in which digit, stroke and background are all right, at
# guidance 3, as `python experiments/distillation.py` left it in `experiments/distillation.json`.
# There the teacher's 4 steps, in 8 passes, are as right as the student's in 4; below that it falls
# off, and students do not.

# %%
COUNT = 200
held_out, _ = real_scans("test")


def distance(pipe, steps):
    return frechet_distance(flatten_scans(np.asarray(scans(pipe, steps, COUNT))[..., 0]), held_out)


measured = {
    "teacher, DDIM": {steps: distance(teacher, steps) for steps in STEPS},
    "progressive students": {steps: distance(students[steps], steps) for steps in STEPS},
}
for name, row in measured.items():
    print(f"{name:21}", {steps: round(value, 2) for steps, value in row.items()})
assert all(measured["progressive students"][n] < measured["teacher, DDIM"][n] for n in (1, 2, 4))

results = Path("../../experiments/distillation.json")
known = json.loads(results.read_text()) if results.exists() else {}
models = {
    "teacher, DDIM": "digits, {} ddim step",
    "progressive students": "digits-{}step, {} ddim step",
    "consistency student": "digits-lcm, {} lcm step",
}
right = {name: {} for name in models}
for name, pattern in models.items():
    for steps in (1, 2, 4):
        row = f"text: {pattern}{'s' * (steps > 1)}, guidance 3,".replace("{}", str(steps))
        for key in known:
            if key.startswith(row):
                right[name][steps] = known[key]["figures"]["all_right"][0]

figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for axis, curves in zip(axes, (measured, right), strict=True):
    for name, row in curves.items():
        axis.plot(list(row), list(row.values()), marker="o", label=name)
    axis.set(xlabel="steps", xscale="log", xlim=(0.9, 9))
    axis.set_xticks(STEPS, STEPS)
    axis.minorticks_off()
    axis.legend(frameon=False)
axes[0].set(title="digits-ddpm, now", ylabel="FD of pixels (lower is better)")
axes[1].set(title="digits, from the file", ylabel="share all right (higher is better)")
pyplot.show()

# %% [markdown]
# The commands that trained the students are in `docs/models.md`; `python train.py
# progressive --model M` makes some of any model that jaxsd loads and that does not predict
# $\epsilon$, and `--convert-steps` turns one that does.

# %%
folder.cleanup()
