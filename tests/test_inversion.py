"""From pictures to noise and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused

import jaxsd
from jaxsd.components import Component
from jaxsd.data import digits
from jaxsd.diffusion import jumps
from jaxsd.diffusion.schedule import Schedule
from jaxsd.editing.inversion import invert, on_ladder, reconstruct
from jaxsd.editing.style import restyle, styled
from jaxsd.evaluation.judge import judges
from jaxsd.nn import Net
from jaxsd.objectives import Now
from jaxsd.objectives.distillation import Teacher
from jaxsd.objectives.progressive import Progressive
from jaxsd.pipeline import Pipeline

COSINE = jumps.student_schedule(Schedule(beta_schedule="cosine", prediction_type="v_prediction"))


@pytest.fixture(scope="module")
def made():
    base = tiny.ddpm(schedule=COSINE)
    params = tiny.parameters(base.net)
    # Mild, as a trained network is: else fifty steps lead far from a path
    params |= {name: 0.1 * params[name] for name in ("conv_out.weight", "conv_out.bias")}
    pictures = [np.uint8(127.5 * (p + 1)) for p in tiny.pictures(2, 1)]
    return base, params, Pipeline(Component(base.net, params), COSINE), pictures


def test_a_picture_comes_back_the_nearer_the_more_steps(made):
    _, _, pipe, pictures = made
    errors = []
    for steps in (4, 16, 64):
        noise = invert(pipe, pictures, "7", steps)
        cond = pipe.encode(["7"] * 2)
        back = pipe.denoise(noise, cond, None, steps=steps, sampler="ddim")
        given = np.stack(pictures) / np.float32(127.5) - 1
        errors.append(float(np.abs(np.asarray(back) - given).max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.05


def test_one_prediction_is_the_sampler_s(made):
    """Of the first step of DDIM, with guidance and without."""
    _, _, pipe, _ = made
    x, cond, uncond = pipe.noise([0, 1]), pipe.encode(["7", "3"]), pipe.encode(["", ""])
    for scale in (1.0, 3.0):
        said = pipe.predict(x, 1000.0, cond, uncond, scale)
        drawn = pipe.denoise(x, cond, uncond, steps=1, guidance_scale=scale, sampler="ddim")
        np.testing.assert_allclose(-said, drawn, atol=1e-5)  # x = alpha z - sigma v, alpha = 0


def test_an_encoder_is_taught_what_inversion_does(made):
    """In one step: two of the teacher's from the picture to noise."""
    base, params, pipe, pictures = made

    class Silent(Net):
        def __init__(self):
            self.config = base.net.config

        def __call__(self, params, z, t, dropout_key=None, **told):
            return jnp.zeros_like(z)

    quiet = dataclasses.replace(base)
    quiet.net = Silent()
    teacher = Teacher(base.net, params, COSINE)
    student = Progressive(quiet, teacher, 1, weighting="snr+1", encoder=True)
    x0 = jnp.stack([jnp.asarray(p, jnp.float32) / 127.5 - 1 for p in pictures])
    batch = {"image": x0, "label": jnp.full(2, 7)}
    loss, _ = student.loss(params, student.aux, batch, Now(jax.random.key(0)))
    # v = (cos d z - z'') / sin d with d = -pi / 2 is z''
    np.testing.assert_allclose(loss, jnp.square(invert(pipe, pictures, "7", 2)).mean(), rtol=1e-5)


def test_reconstruction_is_both_ways(made):
    _, _, pipe, pictures = made
    before = pipe.schedule
    found = [reconstruct(pipe, pictures, ["7", "3"], steps) for steps in (4, 16)]
    assert (found[0].rmse > 2 * found[1].rmse).all() and pipe.schedule is before
    np.testing.assert_array_equal(found[1].noise, invert(pipe, pictures, ["7", "3"], 16))
    given = np.stack(pictures) / np.float32(127.5) - 1
    np.testing.assert_allclose(found[1].latents, given, atol=1e-6)
    alone = [invert(pipe, p, one, 16)[0] for p, one in zip(pictures, ("7", "3"), strict=True)]
    np.testing.assert_allclose(found[1].noise, np.stack(alone), atol=1e-5)


def test_inversions_that_cannot_be(made, tmp_path):
    base, params, pipe, pictures = made
    assert "3 prompts for 2 pictures" in refused(invert, pipe, pictures, ["7"] * 3)
    assert "at least one picture" in refused(invert, pipe, [])
    assert "multiples of" in refused(invert, pipe, pictures, height=-8)
    assert "cannot read the picture" in refused(invert, pipe, tmp_path / "none.png")
    says = dataclasses.replace(COSINE, prediction_type="sample")
    blind = Pipeline(Component(base.net, params), says)
    assert "says nothing of the noise" in refused(invert, blind, pictures)


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "xl"])
def latent(request, tmp_path_factory):
    words = tiny.tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")
    return tiny.pipeline(words, request.param)


def test_latents_of_another_size(latent):
    """What goes to noise by hand, for a text model and for XL, whose size ids say the size."""
    picture = np.uint8(np.random.default_rng(0).integers(0, 256, (8, 16, 3)))
    found = invert(latent, picture, "nine", 2, height=8, width=16)
    z = latent.encode_pictures(picture[None] / np.float32(127.5) - 1)
    assert found.shape == z.shape == (1, 4, 8, 4)
    cond = latent.encode(["nine"], size_ids=latent.size_ids((8, 16)))
    rungs = jumps.reverse(jumps.ladder(latent.schedule, 2))
    for i in range(2):
        said = latent.predict(z, float(rungs.t[i]), cond, None, 1.0)
        here, there = (rungs.at(jnp.full(1, k)) for k in (i, i + 1))
        z = jumps.jump("v_prediction", said, z, here, there)
    np.testing.assert_allclose(found, z, atol=1e-5)


# --- Style -----------------------------------------------------------------------------------


def test_a_style_is_a_gradient_beside_the_prompt(latent):
    """One step: the prompt's prediction, and so many times what the style says beyond nothing."""
    noise = latent.noise([0, 1])
    told = {text: latent.encode([text] * 2) for text in ("nine", "a red seven")}
    told[None] = latent.encode([None] * 2, size_ids=latent.size_ids((8, 8), negative=True))
    rungs = jumps.ladder(latent.schedule, 1)
    t = float(rungs.t[0])
    content, style, nothing = (
        np.asarray(latent.predict(noise, t, told[text])) for text in ("nine", "a red seven", None)
    )
    alpha, sigma = rungs.alpha[0], rungs.sigma[0]
    for scale in (0.0, 1.5):
        said = content + scale * (style - nothing)
        found = styled(latent, noise, "nine", "a red seven", scale, 1)
        np.testing.assert_allclose(found, alpha * noise - sigma * said, atol=1e-5)
    # Of a number that divides the schedule: then the sampler's steps are the ladder's
    plain = on_ladder(latent).denoise(noise, told["nine"], None, steps=4, sampler="ddim")
    found = styled(latent, noise, "nine", "x", 0.0, 4)
    np.testing.assert_allclose(found, plain, atol=1e-4)


def test_no_style_without_words():
    net = tiny.ddpm(unet=dataclasses.replace(tiny.PIXEL_UNET, class_embed_type=None,
                    projection_class_embeddings_input_dim=None)).net  # fmt: skip
    pipe = Pipeline(Component(net, tiny.parameters(net)), COSINE)
    assert "no such difference" in refused(styled, pipe, pipe.noise([0]), "", "red")


@pytest.mark.slow
def test_a_style_recolours_digits_and_leaves_them_be():
    """The shipped model, of scans it was trained on: red strokes become blue."""
    pipe = jaxsd.load("digits")
    scans, labels = digits.load_scans("train")
    rng, words = np.random.default_rng(0), [digits.DIGIT_WORDS[label] for label in labels[:10]]
    drawn = [digits.colour_scan(scan, rng, ("red", "white"))[0] for scan in scans[:10]]
    pictures = [np.uint8(np.rint(picture * 255)) for picture in drawn]
    source, keep = (
        [f"a {colour}{word} on a white background" for word in words] for colour in ("red ", "")
    )
    shares = {}
    for scale in (0.0, 1.0):
        latents = restyle(pipe, pictures, "something blue", source, keep, scale, 20)
        found, strokes, paper = digits.recover(pipe.decode_array(latents) / np.float64(255))
        same = judges().predict(2 * found - 1) == labels[:10]
        shares[scale] = (strokes == "blue").mean(), (paper == "white").mean(), same.mean()
    assert shares[0.0][0] <= 0.4 and min(shares[1.0]) >= 0.8
