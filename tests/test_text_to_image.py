"""The loss of a latent model: from pictures and from a cache, for one text encoder and for two."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxsd
from jaxsd import training
from jaxsd.data.latents import SIZES
from jaxsd.errors import JaxsdError
from jaxsd.objectives import Now

KEY = jax.random.key(3)
NOW = Now(KEY)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["sd", "xl"])
def made(request, words):
    """The objective, parameters and a batch for it."""
    return make(words, request.param == "xl")


@pytest.fixture(scope="module")
def sd(words):
    return make(words, xl=False)


def make(words, xl):
    objective = tiny.text_to_image(words, xl)
    batch = {"image": tiny.pictures(4), "input_ids": objective.towers.tokenize(tiny.CAPTIONS)}
    if xl:
        sizes = np.arange(24, dtype=np.int32).reshape(4, 3, 2)
        batch |= {name: sizes[:, i] for i, name in enumerate(SIZES)}
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    return objective, tiny.parameters(objective.net), batch


def spied(objective, batch, **changes):
    """The objective's loss, and the spy that saw its network's inputs."""
    spy = dataclasses.replace(objective, **changes)
    spy.net = tiny.Spy()
    return spy.net, spy.loss({}, spy.aux, batch, NOW)[0]


def encoded(objective, batch):
    """What a cache would hold of the batch."""
    towers = objective.towers
    mean, logvar = towers.moments(towers.params["vae"], batch["image"])
    kept = {name: batch[name] for name in batch if name in SIZES}
    states = towers.states(towers.params, batch["input_ids"])
    return {"mean": mean, "logvar": logvar, **states, **kept}


def test_only_the_unet_is_trained_and_its_loss_falls(sd):
    objective, params, batch = sd
    options = training.Options(30, learning_rate=3e-3, warmup_steps=1, decay="constant")
    optimizer = training.make_optimizer(options)
    start = dataclasses.replace(objective, initial=params)
    state, aux = training.init_state(start, optimizer, options)
    step = jax.jit(training.make_step(objective, optimizer, options))

    def mean_loss(state):
        # At the same few steps, for the same noise
        moments = [state._replace(step=jnp.int32(i)) for i in range(4)]
        return np.mean([step(moment, aux, batch)[1]["loss"] for moment in moments])

    before = mean_loss(state)
    for _ in range(options.steps):
        state, _ = step(state, aux, batch)
    assert mean_loss(state) < 0.95 * before
    assert state.params.keys() == state.ema.keys() == objective.net.shapes.keys()
    assert not any(np.array_equal(state.params[name], params[name]) for name in params)


def test_a_network_sees_the_same_of_pictures_and_of_what_was_cached_of_them(made):
    objective, _, batch = made
    from_pictures, want = spied(objective, batch)
    from_cache, loss = spied(objective, encoded(objective, batch), cached=True)
    assert loss == want
    np.testing.assert_array_equal(from_cache.z, from_pictures.z)
    assert from_cache.conditioning.keys() == from_pictures.conditioning.keys()
    for name, told in from_pictures.conditioning.items():
        np.testing.assert_array_equal(from_cache.conditioning[name], told)
    # Nothing of the frozen networks takes room on the devices
    assert dataclasses.replace(objective, cached=True).aux.keys() == {"empty"}


def test_a_fresh_latent_is_drawn_from_the_moments_at_each_step(sd):
    objective, _, batch = sd
    batch = encoded(objective, batch)
    batch["mean"], batch["logvar"] = jnp.full_like(batch["mean"], 3), jnp.zeros_like(batch["mean"])
    cached = dataclasses.replace(objective, cached=True)
    cached.net, seen = tiny.Spy(), []
    for key in jax.random.split(KEY, 2):
        cached.loss({}, cached.aux, batch, Now(key))
        key_latent = jax.random.split(key, 3)[0]
        noise = np.asarray(jax.random.normal(key_latent, batch["mean"].shape))
        eps = jax.random.normal(jax.random.split(jax.random.split(key, 3)[2], 3)[1], noise.shape)
        alpha, sigma = (
            np.asarray(a)[:, None, None, None] for a in objective.schedule.alpha_sigma(cached.net.t)
        )
        seen.append((np.asarray(cached.net.z) - sigma * np.asarray(eps)) / alpha)
        want = tiny.VAE_CONFIG.scaling_factor * (3 + noise)
        np.testing.assert_allclose(seen[-1] * alpha, want * alpha, atol=1e-5)
    assert np.abs(seen[0] - seen[1]).max() > 0.1


def test_a_dropped_caption_is_the_empty_one(made):
    objective, _, batch = made
    objective = dataclasses.replace(objective, zero_empty_prompt=False)
    empty = batch | {"input_ids": jnp.asarray(objective.towers.tokenize([""] * 4))}
    dropped, loss = spied(objective, batch, caption_dropout=1.0)
    told, want = spied(objective, empty, caption_dropout=0.0)
    said, _ = spied(objective, batch, caption_dropout=0.0)
    assert loss == want
    for name in objective.aux["empty"]:
        states = [np.asarray(spy.conditioning[name]) for spy in (dropped, told, said)]
        # The empty caption was read in a batch of its own.
        np.testing.assert_allclose(states[0], states[1], atol=1e-6 * np.abs(states[1]).max())
        different = np.abs(states[0] - states[2]).reshape(4, -1).max(1)
        assert np.all(different > 1e-3)


def test_zeros_take_the_place_of_a_dropped_caption_where_the_model_says_so(words):
    objective, _, batch = make(words, xl=True)
    assert objective.zero_empty_prompt
    spy, _ = spied(objective, batch, caption_dropout=1.0)
    assert not np.any(spy.conditioning["encoder_hidden_states"])
    assert not np.any(spy.conditioning["text_embeds"])
    want = np.arange(24).reshape(4, 6)  # original size, crop, target size
    np.testing.assert_array_equal(spy.conditioning["time_ids"], want)
    whole = {name: value for name, value in batch.items() if name not in SIZES}
    spy, _ = spied(objective, whole)
    np.testing.assert_array_equal(spy.conditioning["time_ids"], [[8, 8, 0, 0, 8, 8]] * 4)


def test_the_unet_sees_latents_times_the_scaling_factor(sd):
    objective, _, batch = sd
    spy, _ = spied(objective, batch)
    key_latent, _, key = jax.random.split(KEY, 3)
    mean, logvar = objective.towers.moments(objective.towers.params["vae"], batch["image"])
    drawn = mean + np.exp(logvar / 2) * np.asarray(jax.random.normal(key_latent, mean.shape))
    eps = np.asarray(jax.random.normal(jax.random.split(key, 3)[1], mean.shape))
    alpha, sigma = (
        np.asarray(a)[:, None, None, None] for a in objective.schedule.alpha_sigma(spy.t)
    )
    want = alpha * tiny.VAE_CONFIG.scaling_factor * drawn + sigma * eps
    np.testing.assert_allclose(spy.z, want, atol=1e-5)


def test_text_encoders_can_be_trained_too(words):
    objective, params, batch = make(words, xl=True)
    start = dataclasses.replace(objective, train_text=True, initial=params, caption_dropout=0.0)
    both = start.init(KEY)
    towers = objective.towers.params
    names = {f"{tower}.{n}" for tower in objective.towers.text for n in towers[tower]}
    assert both.keys() == {*params, *names} and start.aux.keys() == {"vae", "empty_ids"}
    start.net = tiny.Spy()

    def told(both):
        start.loss(both, start.aux, batch, NOW)
        return start.net.conditioning

    plain, _ = spied(objective, batch, caption_dropout=0.0)
    before = told(both)
    for name, states in before.items():
        np.testing.assert_array_equal(states, plain.conditioning[name])
    name = "text_encoder_2.text_projection.weight"  # in which the pooled text is linear
    after = told(both | {name: 2 * both[name]})
    np.testing.assert_array_equal(after["text_embeds"], 2 * before["text_embeds"])

    half = {n: v / 2 if n in names else v for n, v in both.items()}
    pipe = dataclasses.replace(objective, train_text=True).pipeline(half)
    for tower in objective.towers.text:
        for n, value in towers[tower].items():
            np.testing.assert_array_equal(pipe.params[tower][n], value / 2)
    assert pipe.params["unet"].keys() == params.keys()
    with pytest.raises(JaxsdError, match="no gradient leads through a cache"):
        dataclasses.replace(objective, train_text=True, cached=True)


REFUSED = {
    "9 channels where the latents have 4: it is of an inpainting": {"in_channels": 9},
    "of an InstructPix2Pix model": {"in_channels": 8},
    "told classes": {"num_class_embeds": 4},
    "reads no text": {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    },
    "this UNet takes two, and there is one": tiny.XL_CHANGES,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_needs_another_loss_is_refused(message, words):
    with pytest.raises(JaxsdError, match=message):
        tiny.text_to_image(words, unet=dataclasses.replace(tiny.LATENT_UNET, **REFUSED[message]))


def test_a_refiner_is_refused(words):
    changes = tiny.XL_CHANGES | {"projection_class_embeddings_input_dim": 6 + 5 * 4}
    unet = dataclasses.replace(tiny.LATENT_UNET, **changes)
    with pytest.raises(JaxsdError, match="aesthetic score"):
        tiny.text_to_image(words, xl=True, unet=unet)


def test_an_exported_model_opens_and_makes_a_picture(made, tmp_path):
    objective, params, _ = made
    schedule = dataclasses.replace(
        objective.schedule, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    dataclasses.replace(objective, schedule=schedule).export(params, tmp_path / "model")
    pipe = jaxsd.load(tmp_path / "model")
    assert pipe.schedule == schedule and pipe.zero_empty_prompt == objective.zero_empty_prompt
    for name, want in {"unet": params, **objective.towers.params}.items():
        assert pipe.params[name].keys() == want.keys()
        for key in want:
            np.testing.assert_array_equal(pipe.params[name][key], want[key], key)
    assert pipe.vae.config.scaling_factor == tiny.VAE_CONFIG.scaling_factor
    assert [image.size for image in pipe("a red seven", 0, steps=2)] == [(8, 8)]


def test_the_preview_has_four_pictures_of_each_prompt(made):
    objective, _, _ = made
    spy = dataclasses.replace(objective, preview_prompts=["nine", "a red seven"])
    spy.net = tiny.Spy()
    spy.net.config = objective.unet
    picture = spy.preview({"conv_in.weight": jnp.zeros(1)})
    assert picture.shape == (2 * 9 - 1, 4 * 9 - 1, 3) and picture.dtype == np.uint8
