"""Each loss is its formula, falls when trained, and what it exports opens again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import log_softmax

import jaxsd
from jaxsd import components, training, weights
from jaxsd.components import Component
from jaxsd.diffusion.schedule import Schedule
from jaxsd.models import CLIPModel, CLIPTextConfig, CLIPVisionConfig
from jaxsd.nn import Net
from jaxsd.objectives.clip import contrastive_loss
from jaxsd.objectives.ddpm import denoising_loss
from jaxsd.objectives.vae import kl_divergence
from jaxsd.pictures import to_uint8
from jaxsd.tokenizer import Tokenizer

KEY = jax.random.key(3)
NAMES = ("ddpm", "vae", "clip", "text-to-image")


class Spy(Net):
    """Stands in for a UNet: remembers what it was asked and answers a known function of it."""

    def __init__(self):
        self.config = tiny.LATENT_UNET

    def __call__(self, params, z, t, dropout_key=None, **conditioning):
        self.z, self.t, self.conditioning = z, t, conditioning
        return jnp.tanh(z) + (t / 1000)[:, None, None, None]


class SpyVAE(Net):
    """Stands in for a VAE: four latents of each 2x2 patch, and a picture of a single colour."""

    def __init__(self):
        self.config = tiny.VAE_CONFIG

    def __call__(self, params, x, method):
        if method == "decode":
            shape = (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], 3)
            return jnp.broadcast_to(jnp.tanh(x).mean((1, 2, 3), keepdims=True), shape)
        b, h, w, c = x.shape
        patches = x.reshape(b, h // 2, 2, w // 2, 2, c).mean(-1)
        mean = patches.transpose(0, 1, 3, 2, 4).reshape(b, h // 2, w // 2, 4)
        return mean, 0.5 * mean - 1


@pytest.fixture(scope="module")
def objectives(tmp_path_factory):
    """Each objective with parameters and a batch for it."""
    words = tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    captioned = tiny.captioned_batch(words)
    made = {
        "ddpm": (tiny.ddpm(), tiny.ddpm_batch()),
        "vae": (tiny.vae(), {"image": tiny.pictures(8)}),
        "clip": (tiny.clip(words), captioned),
        "text-to-image": (tiny.text_to_image(words), captioned),
    }
    return {name: (o, tiny.parameters(o.net), arrays(batch)) for name, (o, batch) in made.items()}


@pytest.fixture(scope="module")
def trained(objectives):
    """The states before and after 30 updates on the one batch, and the step that made them."""

    @functools.cache
    def train(name):
        objective, initial, batch = objectives[name]
        options = training.Options(30, learning_rate=3e-3, warmup_steps=1, decay="constant")
        optimizer = training.make_optimizer(options)
        before = training.init_state(dataclasses.replace(objective, initial=initial), optimizer, 0)
        step = jax.jit(training.make_step(objective, optimizer, options))
        after = before
        for _ in range(options.steps):
            after, _ = step(after, objective.aux, batch)
        return before, after, step

    return train


def arrays(batch):
    return {name: jnp.asarray(value) for name, value in batch.items()}


# --- DDPM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["cosine", "scaled_linear"])
def test_denoising_loss_is_the_mean_square_error_of_the_prediction(beta_schedule, prediction_type):
    schedule = Schedule(beta_schedule=beta_schedule, prediction_type=prediction_type)
    x0 = tiny.pictures(6)
    loss, logged = denoising_loss(Spy(), {}, schedule, jnp.asarray(x0), {}, KEY, False)

    key_t, key_eps, _ = jax.random.split(KEY, 3)
    t = np.asarray(schedule.random_times(key_t, 6, False), np.float64)
    eps = np.asarray(jax.random.normal(key_eps, x0.shape), np.float64)
    if beta_schedule == "cosine":
        alpha = np.cos(np.pi / 2 * t / 1000)
    else:
        betas = np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2
        alpha = np.sqrt(np.cumprod(1 - betas))[t.astype(int)]
    alpha = alpha[:, None, None, None]
    sigma = np.sqrt(1 - alpha**2)
    z = alpha * x0 + sigma * eps
    target = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}
    answer = np.tanh(z) + (t / 1000)[:, None, None, None]
    errors = np.mean((answer - target[prediction_type]) ** 2, (1, 2, 3))
    np.testing.assert_allclose(loss, errors.mean(), rtol=1e-5)
    np.testing.assert_allclose(logged["loss_noisy"], errors[t > 500].mean(), rtol=1e-5)
    np.testing.assert_allclose(logged["loss_clean"], errors[t <= 500].mean(), rtol=1e-5)


@pytest.mark.parametrize("beta_schedule", ["cosine", "linear"])
def test_times_are_whole_or_spread_evenly_over_the_interval(beta_schedule):
    times = {}
    for continuous in (True, False):
        objective = tiny.ddpm(schedule=Schedule(beta_schedule=beta_schedule), continuous=continuous)
        objective.net = Spy()
        objective.loss({}, (), arrays(tiny.ddpm_batch(64)), KEY)
        times[continuous] = np.sort(np.asarray(objective.net.t))
    assert np.all(times[False] == np.round(times[False]))
    assert np.all(times[True] >= 0) and np.all(times[False] <= 1000)
    length = 1000 if beta_schedule == "cosine" else 999
    np.testing.assert_allclose(np.diff(times[True]), length / 64, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_classes_is_left_out(share):
    objective, count = tiny.ddpm(class_dropout=share), 4000
    objective.net = Spy()
    batch = {"image": np.zeros((count, 2, 2, 1), np.float32), "label": np.arange(count) % 10}
    objective.loss({}, (), arrays(batch), KEY)
    told = np.asarray(objective.net.conditioning["class_labels"])
    kept = told.any(1)
    np.testing.assert_array_equal(told[kept], np.eye(10)[batch["label"]][kept])
    deviation = np.sqrt(share * (1 - share) / count)
    assert abs(1 - kept.mean() - share) <= 4 * deviation


def test_a_model_without_classes_has_a_loss_and_makes_pictures():
    unet = dataclasses.replace(
        tiny.PIXEL_UNET, class_embed_type=None, projection_class_embeddings_input_dim=None
    )
    objective = tiny.ddpm(unet=unet)
    params = tiny.parameters(objective.net)
    loss, _ = jax.jit(objective.loss)(params, (), arrays({"image": tiny.pictures(4, 1)}), KEY)
    assert np.isfinite(loss)
    assert objective.preview(params).shape == (4 * 9 - 1, 4 * 9 - 1, 3)


# --- VAE -------------------------------------------------------------------------------------


def test_kl_divergence_is_the_expected_log_ratio():
    z = np.linspace(-40, 40, 400_001)
    for mean, logvar in [(0.0, 0.0), (1.5, -2.0), (-0.3, 1.2)]:
        log_q = -0.5 * (np.log(2 * np.pi) + logvar + (z - mean) ** 2 / np.exp(logvar))
        log_p = -0.5 * (np.log(2 * np.pi) + z**2)
        want = np.trapezoid(np.exp(log_q) * (log_q - log_p), z)
        got = kl_divergence(jnp.float32(mean), jnp.float32(logvar))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_vae_loss_is_reconstruction_plus_weighted_divergence(reconstruction):
    objective = tiny.vae(kl_weight=0.3, reconstruction=reconstruction)
    objective.net, image = SpyVAE(), tiny.pictures(4)
    loss, logged = objective.loss({}, (), {"image": jnp.asarray(image)}, KEY)

    mean, logvar = (np.asarray(x, np.float64) for x in SpyVAE()({}, image, "encode"))
    eps = np.asarray(jax.random.normal(KEY, mean.shape), np.float64)
    rebuilt = np.tanh(mean + np.exp(logvar / 2) * eps).mean((1, 2, 3), keepdims=True)
    difference = rebuilt - image
    kl = np.mean((mean**2 + np.exp(logvar) - 1 - logvar) / 2)
    l1, l2 = np.abs(difference).mean(), np.square(difference).mean()
    np.testing.assert_allclose(loss, (l1 if reconstruction == "l1" else l2) + 0.3 * kl, rtol=1e-5)
    np.testing.assert_allclose(logged["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(logged["l1"], l1, rtol=1e-5)
    # Decibels below the range, which is 2
    np.testing.assert_allclose(logged["psnr"], 20 * np.log10(2 / np.sqrt(l2)), rtol=1e-5)


def test_the_scaling_factor_gives_latents_unit_deviation(objectives):
    objective, params, _ = objectives["vae"]
    mean, logvar = objective._encode(params, jnp.asarray(objective.samples))
    noise = np.random.default_rng(0).standard_normal((20, *mean.shape))
    drawn = np.exp(np.asarray(logvar) / 2) * noise
    latents = np.asarray(mean) + drawn
    # Neither the means nor the variances are all there is
    assert 0.2 < np.std(mean) / np.std(latents) < 0.98
    np.testing.assert_allclose(objective.scaling_factor(params) * np.std(latents), 1, atol=0.02)


# --- CLIP ------------------------------------------------------------------------------------


def test_contrastive_loss_is_the_symmetric_cross_entropy():
    rng = np.random.default_rng(0)
    text, image = rng.normal(size=(2, 6, 5))
    text, image = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, image))
    logits = 7.5 * text @ image.T
    want = -sum(np.diag(log_softmax(logits, axis)).mean() for axis in (0, 1)) / 2
    loss, logged = contrastive_loss(jnp.float32(text), jnp.float32(image), jnp.float32(7.5))
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert logged["top1"] == pytest.approx(np.mean(logits.argmax(1) == np.arange(6)))


def test_the_temperature_stays_above_a_hundredth(objectives, tmp_path):
    objective, params, batch = objectives["clip"]
    limit = params | {"logit_scale": jnp.float32(np.log(100))}
    beyond = params | {"logit_scale": jnp.float32(6.0)}
    loss = jax.jit(objective.loss)
    assert loss(beyond, (), batch, KEY)[0] == loss(limit, (), batch, KEY)[0]
    assert loss(beyond, (), batch, KEY)[1]["temperature"] == pytest.approx(0.01)

    objective.export(beyond, tmp_path)
    exported = weights.load(tmp_path / "clip", objective.net)["logit_scale"]
    assert float(exported) == pytest.approx(np.log(100))


# --- Text to image ---------------------------------------------------------------------------


def spied(objective, batch, **changes):
    """The objective's loss as a function of its key, and the spy that sees its network's inputs."""
    spy = dataclasses.replace(objective, **changes)
    spy.net, spy.vae = Spy(), dataclasses.replace(objective.vae, net=SpyVAE())
    return spy.net, spy.loss({}, spy.aux, batch, KEY)[0]


def test_only_the_unet_is_trained(objectives, trained):
    objective, params, _ = objectives["text-to-image"]
    _, state, _ = trained("text-to-image")
    assert state.params.keys() == state.ema.keys() == objective.net.shapes.keys()
    assert not any(np.array_equal(state.params[name], params[name]) for name in params)


def test_a_dropped_caption_is_the_empty_one(objectives):
    objective, _, batch = objectives["text-to-image"]
    nothing = objective.tokenizer([""] * 4, tiny.TEXT.max_position_embeddings)
    empty = batch | {"input_ids": jnp.asarray(nothing)}
    dropped, loss = spied(objective, batch, caption_dropout=1.0)
    told, want = spied(objective, empty, caption_dropout=0.0)
    said, _ = spied(objective, batch, caption_dropout=0.0)
    assert loss == want
    states = [
        np.asarray(spy.conditioning["encoder_hidden_states"]) for spy in (dropped, told, said)
    ]
    np.testing.assert_array_equal(states[0], states[1])
    assert np.all(np.abs(states[0] - states[2]).max((1, 2)) > 1e-3)


def test_the_unet_sees_latents_times_the_scaling_factor(objectives):
    objective, _, batch = objectives["text-to-image"]
    spy, _ = spied(objective, batch)
    key_latent, _, key = jax.random.split(KEY, 3)
    mean, logvar = SpyVAE()({}, batch["image"], "encode")
    drawn = mean + np.exp(logvar / 2) * np.asarray(jax.random.normal(key_latent, mean.shape))
    eps = np.asarray(jax.random.normal(jax.random.split(key, 3)[1], mean.shape))
    alpha, sigma = (
        np.asarray(a)[:, None, None, None] for a in objective.schedule.alpha_sigma(spy.t)
    )
    want = alpha * tiny.VAE_CONFIG.scaling_factor * drawn + sigma * eps
    np.testing.assert_allclose(spy.z, want, atol=1e-5)


# --- All of them -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_on_a_fixed_batch(objectives, trained, name):
    objective, _, batch = objectives[name]
    *states, step = trained(name)
    means = []
    for state in states:
        # At the same few steps, for the same noise
        moments = [state._replace(step=jnp.int32(i)) for i in range(4)]
        metrics = [step(moment, objective.aux, batch)[1] for moment in moments]
        assert all(np.isfinite(value) for values in metrics for value in values.values())
        means.append(np.mean([values["loss"] for values in metrics]))
    assert means[1] < 0.95 * means[0]


def test_an_exported_ddpm_opens_and_makes_pictures(objectives, tmp_path):
    objective, params, _ = objectives["ddpm"]
    objective.export(params, tmp_path / "model")
    pipe = jaxsd.load(tmp_path / "model")
    assert_equal(pipe.params["unet"], params)
    assert pipe.schedule == objective.schedule
    assert [image.size for image in pipe(["3", "seven"], [0, 1], steps=2)] == [(8, 8), (8, 8)]


def test_an_exported_vae_opens_with_the_measured_scale(objectives, tmp_path):
    objective, params, _ = objectives["vae"]
    objective.export(params, tmp_path)
    vae = components.load_component(tmp_path / "vae")
    assert_equal(vae.params, params)
    assert vae.net.config.scaling_factor == pytest.approx(objective.scaling_factor(params))


def test_an_exported_clip_gives_text_tower_tokenizer_and_both_towers(objectives, tmp_path):
    objective, params, batch = objectives["clip"]
    objective.export(params, tmp_path)
    text = components.load_component(tmp_path / "text_encoder")
    words = Tokenizer(tmp_path / "tokenizer")
    assert len(words) == text.net.config.vocab_size
    assert words.eos_token_id == text.net.config.eos_token_id
    length = text.net.config.max_position_embeddings
    np.testing.assert_array_equal(words(tiny.CAPTIONS, length), batch["input_ids"])
    assert_equal(text.params, {name: params[name] for name in text.net.shapes})

    config = weights.read_json(tmp_path / "clip" / "config.json")
    towers = CLIPModel(
        CLIPTextConfig.from_json(config["text_config"]),
        CLIPVisionConfig.from_json(config["vision_config"]),
    )
    assert_equal(weights.load(tmp_path / "clip", Net(towers)), params)


def test_an_exported_latent_model_opens_and_makes_a_picture(objectives, tmp_path):
    objective, params, _ = objectives["text-to-image"]
    objective.export(params, tmp_path / "model")
    pipe = jaxsd.load(tmp_path / "model")
    assert_equal(pipe.params["unet"], params)
    assert_equal(pipe.params["vae"], objective.vae.params)
    assert_equal(pipe.params["text_encoder"], objective.text_encoder.params)
    assert pipe.vae.config.scaling_factor == tiny.VAE_CONFIG.scaling_factor
    assert [image.size for image in pipe("a red seven", 0, steps=2)] == [(8, 8)]


def test_the_preview_of_a_vae_is_pictures_above_their_reconstructions(objectives):
    objective, params, _ = objectives["vae"]
    picture = objective.preview(params)
    assert picture.shape == (2 * 9 - 1, 8 * 9 - 1, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[:8, :8], to_uint8(objective.samples[0]))


def test_the_preview_of_a_latent_model_has_four_pictures_of_each_prompt(objectives):
    objective, _, _ = objectives["text-to-image"]
    spy = dataclasses.replace(objective, preview_prompts=["nine", "a red seven"])
    spy.net = Spy()
    spy.vae = Component(SpyVAE(), {"decoder.conv_in.weight": jnp.zeros(1)})
    picture = spy.preview({"conv_in.weight": jnp.zeros(1)})
    assert picture.shape == (2 * 9 - 1, 4 * 9 - 1, 3) and picture.dtype == np.uint8


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(want[name]), name)
