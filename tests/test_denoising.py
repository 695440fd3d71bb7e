"""The loss of denoising is its formula, whatever is predicted and however it is weighted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxsd.cli.recipes.ddpm import DDPM
from jaxsd.diffusion.schedule import PREDICTION_TYPES, Schedule
from jaxsd.diffusion.weighting import WEIGHTINGS, loss_weight
from jaxsd.errors import JaxsdError
from jaxsd.nn import Net
from jaxsd.objectives import Now
from jaxsd.objectives.denoising import Denoising, denoising_loss, loss_by_bucket

KEY = jax.random.key(3)
NOW = Now(KEY)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["cosine", "scaled_linear"])
def test_denoising_loss_is_the_mean_square_error_of_the_prediction(beta_schedule, prediction_type):
    schedule = Schedule(beta_schedule=beta_schedule, prediction_type=prediction_type)
    x0 = tiny.pictures(6)
    loss, logged = denoising_loss(tiny.Spy(), {}, schedule, jnp.asarray(x0), {}, KEY, Denoising())

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
    quarter = (t - (beta_schedule == "cosine")) // 250  # whose times are 1 ... 1000
    for i in range(4):
        want = 4 * np.where(quarter == i, errors, 0).mean()
        np.testing.assert_allclose(logged[f"loss_t{i}"], want, rtol=1e-5)


@pytest.mark.parametrize("beta_schedule", ["cosine", "linear"])
def test_times_are_whole_or_spread_evenly_over_the_interval(beta_schedule):
    times = {}
    for continuous in (True, False):
        options = Denoising(time="continuous" if continuous else "discrete")
        objective = tiny.ddpm(schedule=Schedule(beta_schedule=beta_schedule), denoising=options)
        objective.net = tiny.Spy()
        objective.loss({}, (), jax.tree.map(jnp.asarray, tiny.ddpm_batch(64)), NOW)
        times[continuous] = np.sort(np.asarray(objective.net.t))
    assert np.all(times[False] == np.round(times[False]))
    assert np.all(times[True] >= 0) and np.all(times[False] <= 1000)
    length = 1000 if beta_schedule == "cosine" else 999
    np.testing.assert_allclose(np.diff(times[True]), length / 64, atol=1e-3)


# --- Weights ---------------------------------------------------------------------------------


def levels(snr):
    """alpha and sigma, float64."""
    return np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))


SNR = np.logspace(-8, 8, 50)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_has_the_weights_of_diffusers(gamma):
    """train_text_to_image.py divides min(SNR, gamma) by SNR for eps and by SNR + 1 for v."""
    alpha, sigma = (jnp.asarray(a, jnp.float32) for a in levels(SNR))
    least = np.minimum(SNR, gamma)
    for kind, want in {
        "epsilon": least / SNR,
        "v_prediction": least / (SNR + 1),
        "sample": least,
    }.items():
        # float32 rounds alpha and sigma, whose squares make up the SNR
        got = loss_weight("min-snr", kind, alpha, sigma, gamma)
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", WEIGHTINGS[1:])
def test_a_weighting_is_of_the_error_in_x_whatever_is_predicted(weighting, kind):
    rng = np.random.default_rng(0)
    z, truth, answer = rng.normal(size=(3, len(SNR)))
    alpha, sigma = levels(SNR)
    x, guess = (
        {"epsilon": (z - sigma * p) / alpha, "sample": p, "v_prediction": alpha * z - sigma * p}[
            kind
        ]
        for p in (truth, answer)
    )
    weight = {
        "min-snr": np.minimum(SNR, 5),
        "snr+1": SNR + 1,
        "truncated-snr": np.maximum(SNR, 1),
    }[weighting]
    got = loss_weight(weighting, kind, jnp.float32(alpha), jnp.float32(sigma), 5.0)
    np.testing.assert_allclose(got * (truth - answer) ** 2, weight * (x - guess) ** 2, rtol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_weights_are_finite_where_there_is_no_noise_or_no_signal(weighting, kind):
    alpha, sigma = jnp.array([0.0, 1e-30, 1.0]), jnp.array([1.0, 1.0, 0.0])
    weight = np.asarray(loss_weight(weighting, kind, alpha, sigma))
    assert np.isfinite(weight).all() and (weight >= 0).all()
    limits = {("min-snr", "epsilon"): [1, 1, 0], ("min-snr", "sample"): [0, 0, 5]}
    limits[("min-snr", "v_prediction")] = [0, 0, 0]
    limits[("truncated-snr", "v_prediction")] = limits[("none", kind)] = [1, 1, 1]
    if want := limits.get((weighting, kind)):
        np.testing.assert_allclose(weight, want, atol=1e-7)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_loss_is_weighted_at_each_time(weighting):
    schedule = Schedule(prediction_type="v_prediction")
    x0 = jnp.asarray(tiny.pictures(16))
    options = Denoising(weighting=weighting, snr_gamma=2.0)
    spy = tiny.Spy()
    loss, _ = denoising_loss(spy, {}, schedule, x0, {}, KEY, options)
    bar = schedule.alphas_cumprod.astype(np.float64)[np.asarray(spy.t, int)]
    snr = bar / (1 - bar)
    alpha, sigma = (a[:, None, None, None] for a in levels(snr))
    eps = (np.asarray(spy.z) - alpha * x0) / sigma
    answer = np.tanh(spy.z) + (np.asarray(spy.t) / 1000)[:, None, None, None]
    x = alpha * spy.z - sigma * answer
    error = np.square(x - x0).mean((1, 2, 3))
    weight = {
        "none": snr + 1,
        "min-snr": np.minimum(snr, 2),
        "snr+1": snr + 1,
        "truncated-snr": np.maximum(snr, 1),
    }[weighting]
    assert np.isfinite(eps).all()
    np.testing.assert_allclose(loss, (weight * error).mean(), rtol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [{"weighting": "p2"}, {"time": "now"}, {"snr_gamma": 0.0}, {"offset_noise": -0.1}],
)
def test_options_that_cannot_be_are_refused_by_name(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(JaxsdError, match=f"^{name} .*{value}"):
        Denoising(**wrong)


def test_noise_cannot_be_predicted_where_there_is_nothing_else():
    x0 = jnp.asarray(tiny.pictures(4))
    for kind in ("sample", "v_prediction"):
        schedule = Schedule(rescale_betas_zero_snr=True, prediction_type=kind)
        options = Denoising(weighting="min-snr")
        assert np.isfinite(denoising_loss(tiny.Spy(), {}, schedule, x0, {}, KEY, options)[0])
    schedule = Schedule(rescale_betas_zero_snr=True)
    with pytest.raises(JaxsdError, match="zero terminal SNR .*v_prediction") as caught:
        denoising_loss(tiny.Spy(), {}, schedule, x0, {}, KEY, Denoising())
    assert "\n" not in str(caught.value)


# --- Noise -----------------------------------------------------------------------------------


def test_offset_noise_shifts_whole_channels():
    x0, schedule = jnp.zeros((500, 8, 8, 2)), Schedule(prediction_type="epsilon")
    spies = {}
    for offset in (0.0, 0.5):
        spies[offset] = tiny.Spy()
        options = Denoising(offset_noise=offset)
        denoising_loss(spies[offset], {}, schedule, x0, {}, KEY, options)
    sigma = np.asarray(schedule.alpha_sigma(spies[0.0].t)[1])[:, None, None, None]
    shift = (np.asarray(spies[0.5].z) - np.asarray(spies[0.0].z)) / sigma
    np.testing.assert_allclose(np.ptp(shift, axis=(1, 2)), 0, atol=1e-5)
    one_each = shift[:, 0, 0]
    assert np.std(one_each) == pytest.approx(0.5, rel=4 / np.sqrt(2 * one_each.size))
    assert abs(np.corrcoef(one_each.T)[0, 1]) < 4 / np.sqrt(500)


def test_the_network_computes_in_the_dtype_asked_for_and_the_loss_in_float32():
    x0, spy, schedule = jnp.asarray(tiny.pictures(4)), tiny.Spy(), Schedule()

    class Half(tiny.Spy):
        def __call__(self, params, z, t, **kwargs):
            assert z.dtype == jnp.bfloat16 and t.dtype == jnp.float32
            return super().__call__(params, z.astype(jnp.float32), t, **kwargs).astype(z.dtype)

    want, _ = denoising_loss(spy, {}, schedule, x0, {}, KEY, Denoising())
    got, parts = denoising_loss(Half(), {}, schedule, x0, {}, KEY, Denoising(dtype="bfloat16"))
    assert got.dtype == parts["loss_t0"].dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0.01)


# --- Held out --------------------------------------------------------------------------------


class Recorder(Net):
    """Stands in for a UNet inside `lax.map`: answers with what it was asked."""

    def __init__(self):
        self.config = tiny.LATENT_UNET

    def __call__(self, params, z, t, dropout_key=None, **conditioning):
        assert dropout_key is None
        return z * params["scale"] + (t / 1000)[:, None, None, None]


@pytest.mark.parametrize("time", ["discrete", "continuous"])
@pytest.mark.parametrize("beta_schedule", ["cosine", "linear"])
def test_held_out_times_lie_in_their_buckets(beta_schedule, time):
    schedule = Schedule(beta_schedule=beta_schedule, prediction_type="sample")
    x0 = jnp.zeros((300, 2, 2, 1))
    keys = jax.random.split(KEY, 300)
    options = Denoising(time=time)
    losses = loss_by_bucket(
        Recorder(), {"scale": jnp.zeros(())}, schedule, x0, {}, keys, options, 5
    )
    t = 1000 * np.sqrt(np.asarray(losses, np.float64))  # the error is what was said
    whole = beta_schedule == "cosine" and time == "discrete"  # times 1 ... 1000
    for i, times in enumerate(t - whole):
        assert 200 * i - 0.3 * (i > 0) - 1e-3 <= times.min() < 200 * i + 10
        assert 200 * i + 190 < times.max() < 200 * (i + 1)
    if time == "discrete":
        np.testing.assert_allclose(t, np.round(t), atol=1e-3)


def test_a_held_out_picture_has_the_same_loss_in_any_batch():
    schedule, options = Schedule(), Denoising(weighting="min-snr", offset_noise=0.1)
    x0, keys = jnp.asarray(tiny.pictures(6)), jax.random.split(KEY, 6)
    params = {"scale": jnp.ones(())}
    whole = loss_by_bucket(Recorder(), params, schedule, x0, {}, keys, options)
    assert whole.shape == (4, 6) and len(np.unique(whole)) == 24
    order = np.array([4, 0])
    part = loss_by_bucket(Recorder(), params, schedule, x0[order], {}, keys[order], options)
    np.testing.assert_allclose(part, whole[:, order], rtol=1e-6)


def test_held_out_losses_estimate_the_loss():
    schedule, options = Schedule(), Denoising(weighting="truncated-snr")
    x0 = jnp.zeros((2000, 4, 4, 1))
    params = {"scale": jnp.full((), 0.5)}
    by_bucket = loss_by_bucket(
        Recorder(), params, schedule, x0, {}, jax.random.split(KEY, 2000), options
    )

    class Training(Recorder):
        def __call__(self, params, z, t, dropout_key=None):
            assert dropout_key is not None
            return super().__call__(params, z, t)

    loss, logged = denoising_loss(Training(), params, schedule, x0, {}, KEY, options)
    spread = np.std(by_bucket) / np.sqrt(2000)
    assert abs(np.mean(by_bucket) - loss) < 4 * spread * np.sqrt(2)
    for i, values in enumerate(by_bucket):
        # of a quarter of the examples, a binomial number of them
        spread = 2 * np.sqrt(np.mean(np.square(values)) / 2000)
        assert abs(values.mean() - logged[f"loss_t{i}"]) < 4 * spread * np.sqrt(1.25)


# --- The recipes' options --------------------------------------------------------------------


def test_a_recipe_hands_its_options_to_the_loss(tmp_path):
    given = {"weighting": "min-snr", "snr_gamma": 3.0, "offset_noise": 0.1}
    recipe = DDPM(workdir=tmp_path, time="discrete", dtype="bfloat16", **given)
    assert recipe.denoising() == Denoising("discrete", dtype="bfloat16", **given)
    assert DDPM(workdir=tmp_path).denoising() == Denoising("continuous")


def test_a_recipe_ends_the_schedule_in_noise_alone_where_that_can_be_learned(tmp_path):
    table, cosine = Schedule(), Schedule(beta_schedule="cosine")
    plain = DDPM(workdir=tmp_path, prediction_type="v_prediction")
    assert plain.scheduled(table) == dataclasses.replace(table, prediction_type="v_prediction")
    zero = dataclasses.replace(plain, zero_terminal_snr=True)
    ended = zero.scheduled(table)
    assert ended.alphas_cumprod[-1] == 0 and ended.timestep_spacing == "trailing"
    with pytest.raises(JaxsdError, match="zero_terminal_snr"):
        zero.scheduled(cosine)
    with pytest.raises(JaxsdError, match="zero_terminal_snr .*v_prediction"):
        DDPM(workdir=tmp_path, zero_terminal_snr=True).scheduled(table)
