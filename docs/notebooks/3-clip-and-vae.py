# %% [markdown]
# # CLIP and the VAE
#
# The two networks beside the UNet. CLIP learns which words go with which picture: its table of
# similarities before and after training, its loss written out, and what it reads without ever
# having been told the classes. The VAE makes pictures small: what it gives back, how much it
# saves, and what lies between two of its latents. Half a minute on two CPU cores.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from looking import show

import jaxsd
from jaxsd import components, families
from jaxsd.data import digits
from jaxsd.editing.mixing import slerp
from jaxsd.evaluation.models import zero_shot
from jaxsd.evaluation.similarity import psnr
from jaxsd.hub import PRETRAINED
from jaxsd.models import AutoencoderKL
from jaxsd.nn import Net
from jaxsd.objectives.clip import contrastive_loss
from jaxsd.pictures import to_uint8

pipe = jaxsd.load("digits")
clip = components.load_clip(PRETRAINED / "digits" / "clip")  # text tower and picture tower

# %% [markdown]
# ## Pictures and captions
#
# Ten held-out scans, one of each digit, in colours, and a caption for each.

# %%
scans, labels = digits.load_scans("test")
rng = np.random.default_rng(0)
pictures, captions = [], []
for digit, word in enumerate(digits.DIGIT_WORDS):
    picture, stroke, background = digits.colour_scan(scans[labels == digit][0], rng)
    pictures.append(2 * picture - 1)
    captions.append(f"{stroke} {word} on {background}")
pictures = jnp.asarray(np.stack(pictures))  # [10, 32, 32, 3] in [-1, 1]
show(pictures, captions, columns=10)

# %% [markdown]
# ## The similarity matrix
#
# Either tower turns what it is given into 64 numbers, scaled to length 1, so that the dot product
# of two is the cosine of the angle between them. Every caption against every picture makes a
# table. Where towers are fresh, with random weights, it says nothing; after training the diagonal
# stands out.


# %%
@jax.jit
def features(params, ids, pictures):
    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    text = clip.net(params, ids, method="text_features")
    return unit(text), unit(clip.net(params, pictures, method="image_features"))


fresh = clip.net.init(jax.random.key(0))
ids = jnp.asarray(pipe.tokenizer(captions))
towers = {"before training": fresh, "after": clip.params}
said = {name: features(params, ids, pictures) for name, params in towers.items()}

figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for axis, (name, (text, image)) in zip(axes, said.items(), strict=True):
    shown = axis.imshow(text @ image.T, cmap="viridis")
    axis.set(title=name, xticks=range(10), xlabel="picture of", yticks=range(10))
    figure.colorbar(shown, ax=axis)
axes[0].set_yticklabels(captions)
axes[1].set_yticklabels([])

text, image = said["after"]
assert np.array_equal((text @ image.T).argmax(1), np.arange(10))
assert np.array_equal((text @ image.T).argmax(0), np.arange(10))

# %% [markdown]
# ## The loss
#
# The lesson's notes say that both towers are trained to give the same embedding. Not quite: that
# would be easy, both could always say the same. They are trained to tell which caption in a batch
# belongs to which picture. Similarities, times a learnt number (one over the *temperature*), are
# the logits of a choice among all pictures for each caption, and among all captions for each
# picture; the loss is the mean cross-entropy of both.


# %%
def loss(text, image, scale):
    logits = scale * text @ image.T
    for_captions = -jnp.diag(jax.nn.log_softmax(logits, axis=1)).mean()
    for_pictures = -jnp.diag(jax.nn.log_softmax(logits, axis=0)).mean()
    return (for_captions + for_pictures) / 2


for name, params in towers.items():
    scale = jnp.exp(params["logit_scale"])
    value = loss(*said[name], scale)
    assert np.allclose(value, contrastive_loss(*said[name], scale)[0], atol=1e-5)
    print(f"{name:15} loss {value:.3f}, temperature {1 / scale:.3f}")
print(f"guessing        loss {np.log(10):.3f}")

# %% [markdown]
# The diagonal need not be near 1, only higher than what stands beside it: neighbours that share a
# colour or a digit are similar, too, and a little is enough when the temperature is low.
#
# ## Reading without classes
#
# A picture is classified by the nearest of a few captions, though nobody ever trained a
# classifier: *zero-shot*. All 450 held-out scans in random colours, as `jaxsd evaluate digits`
# does it:

# %%
before = zero_shot(components.Component(clip.net, fresh), pipe.tokenizer)
after = zero_shot(clip, pipe.tokenizer)
for name, share in after.items():
    print(f"{name:11} before training {before[name]:6.1%}   after {share:6.1%}")
assert min(after.values()) > 0.95 and max(before.values()) < 0.3

# %% [markdown]
# Of the two towers the pipeline needs the text tower alone; the other was there to teach it. And
# it does not take the one vector that CLIP compares, but what the tower says at all 77 places:
# notebook 2.
#
# ## The VAE: there and back
#
# The encoder makes an 8x8x4 latent of a 32x32x3 picture, the decoder a picture of that.

# %%
latents = pipe.encode_pictures(pictures)  # [10, 8, 8, 4]
back = pipe.decode_array(latents)
original = to_uint8(np.asarray(pictures))
difference = 4 * (np.float32(back) - original) / 255
show(
    [*original, *back, *difference],
    ["original"] * 10 + ["back"] * 10 + ["difference x 4"] * 10,
    columns=10,
)
print(
    f"PSNR {psnr(original, back).mean():.1f} dB; latents {latents.shape}, std {latents.std():.2f}"
)

# %% [markdown]
# A latent is still a picture of sorts. The four channels of the first three:

# %%
lowest, highest = float(latents.min()), float(latents.max())
channels = [
    2 * (latents[i, :, :, c] - lowest) / (highest - lowest) - 1 for i in range(3) for c in range(4)
]
show(
    [channel for channel in channels],
    [f"channel {c}" for _ in range(3) for c in range(4)],
    columns=12,
    scale=8,
)

# %% [markdown]
# What it has never seen it does not give back so well. A VAE knows the pictures it was trained
# on; this one knows smooth strokes in eight colours.

# %%
strange = np.random.default_rng(1).uniform(-1, 1, (10, 32, 32, 3)).astype(np.float32)
strange[:5] = np.asarray(pictures[:5, ::-1])  # on their heads
strange[5:8] = np.where((np.indices((32, 32)).sum(0) // 2 % 2)[None, :, :, None], 1, -1)
strange[5:8] *= np.array([[1, 1, 1], [1, -1, 1], [-1, 1, 1]], np.float32)[:, None, None]
strange_back = pipe.decode_array(pipe.encode_pictures(strange))
show([*to_uint8(strange), *strange_back], ["given"] * 10 + ["back"] * 10, columns=10)
each = psnr(to_uint8(strange), strange_back)
print("PSNR", [f"{value:.0f}" for value in each])
assert each[:5].mean() > each[5:].mean() + 5

# %% [markdown]
# ## How much smaller?
#
# The lesson's notes count 48-fold, and they are right about that number and wrong about how it
# comes about. For Stable Diffusion at 512 pixels:
#
# - A picture has 512 · 512 · 3 = 786,432 *numbers*; its pixels are 262,144.
# - Its latent is 64x64x4, not 64x64x24: 16,384 numbers. 786,432 / 16,384 = 48.
# - It is not made by two convolutions. Each side shrinks to an eighth in three steps of a half,
#   among many more layers, counted below.
# - 48-fold of numbers is not 48-fold of bits: a pixel's number has 8, a latent's 16 or 32.
#
# `digits` halves each side twice: 48 numbers, a 4x4 patch in three colours, become 4.

# %%
sd = families.get_family("sd1").vae
models = {"Stable Diffusion": (sd, 512, sd.downscale), "digits": (pipe.vae.config, 32, 4)}
for name, (config, side, downscale) in models.items():
    small = side // downscale
    numbers, kept = side * side * 3, small * small * config.latent_channels
    shapes = Net(AutoencoderKL(config)).shapes
    encoder = {n: shape for n, shape in shapes.items() if n.startswith("encoder.")}
    convolutions = sum(len(shape) == 4 for shape in encoder.values())
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    fold = numbers / kept
    print(f"{name}: {side}x{side}x3 = {numbers:,}")
    print(f"    latent {small}x{small}x{config.latent_channels} = {kept:,}")
    print(f"    {fold:.0f}-fold fewer numbers, {fold / 2:.0f}-fold fewer bits with 16 for each")
    print(f"    {convolutions} convolutions in the encoder, {size:,} parameters in all")
    if name == "digits":
        assert fold == 12 and latents[0].size == kept
    else:
        assert fold == 48 and size == 83_653_863

# %% [markdown]
# What is saved is work: the UNet sees a 48th of the numbers at every step, and the VAE is asked
# once.
#
# ## Walks between pictures
#
# What lies between two pictures? On the straight way between their *pixels* one fades into the
# other. On the way between their *latents* the decoder makes a picture of every point.

# %%
shares = np.linspace(0, 1, 10)
part = jnp.asarray(shares, jnp.float32)[:, None, None, None]


def straight(a, b):
    return (1 - part) * a + part * b


def arc(a, b):
    return slerp(jnp.repeat(a, 10, 0), jnp.repeat(b, 10, 0), [float(s) for s in shares])


one, other = latents[3:4], latents[8:9]
fade = to_uint8(np.asarray(straight(pictures[3:4], pictures[8:9])))
walks = [pipe.decode_array(walk(one, other)) for walk in (straight, arc)]
show(
    [*fade, *walks[0], *walks[1]],
    ["pixels"] * 10 + ["latents, straight"] * 10 + ["latents, arc"] * 10,
    columns=10,
)

# %% [markdown]
# In between there are two digits at once, in colours that neither has, whichever way one goes. A
# VAE's latents are made to be decoded, not to be walked through.
#
# ## Walks between noises
#
# It is the UNet that knows what pictures look like. So one walks where it begins: from one noise
# to another, and has each drawn.
#
# Here the way matters to the numbers. $n$ random numbers make a vector of a length near
# $\sqrt n$: noises lie on a sphere, near enough. The chord between two of them leads through its
# inside, to noise that is too weak, half way by a factor of about $1/\sqrt 2$. The arc (*slerp*)
# stays outside.

# %%
a, b = pipe.noise([0]), pipe.noise([3])
noises = {"straight": straight(a, b), "arc": arc(a, b)}

figure, axis = plt.subplots(figsize=(5, 2.5), layout="constrained")
strength = {name: np.asarray(z.std((1, 2, 3))) for name, z in noises.items()}
for name, values in strength.items():
    axis.plot(shares, values, ".-", label=name)
axis.set(xlabel="share of the way", ylabel="std of the noise", ylim=(0, 1.2))
axis.legend()
weakest = min(strength["arc"][0], strength["arc"][-1])
assert strength["straight"].min() < 0.8 * weakest and strength["arc"].min() > 0.95 * weakest

# %% [markdown]
# First the pictures of a model that is told nothing, then those of a full prompt at guidance 3.

# %%
prompt = "a red seven on a white background"
cond, uncond = pipe.encode([prompt] * 10), pipe.encode([""] * 10)
told = {"nothing": (uncond, None), "prompt": (cond, uncond)}
drawn = {
    f"{what}, {name}": pipe.decode_array(pipe.denoise(z, *pair, steps=30, guidance_scale=3))
    for what, pair in told.items()
    for name, z in noises.items()
}
show(
    [picture for row in drawn.values() for picture in row],
    [name for name in drawn for _ in range(10)],
    columns=10,
)

# %% [markdown]
# Nearly every picture is one digit now, also in between: this is a walk through what the model
# can draw. No model was trained on noise that is too weak, and in the first row some pictures
# near the middle are faint or hold no digit, where the arc has one. Other seeds show less of it,
# and with a prompt that names everything `digits` forgives it.
