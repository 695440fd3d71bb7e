"""What is measured on the way: always of the same held-out examples, with the same noise."""

import logging
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.ndimage import gaussian_filter

from jaxsd import data
from jaxsd.errors import JaxsdError
from jaxsd.evaluation import (
    features,
    held_out,
    in_loop,
    metrics,
    samples,
    similarity,
    statistics,
)
from jaxsd.evaluation.drawing import Sampling
from jaxsd.objectives import denoising, text_to_image
from jaxsd.pictures import to_uint8

HOW = Sampling(count=6, steps=2, guidance_scale=1.0, sampling_seeds=(0,), batch_size=4)


def elements(count, channels=3, **extra):
    """Examples as a source has them."""
    pictures = tiny.pictures(count, channels)
    return [{"image": p, **{k: v[i] for k, v in extra.items()}} for i, p in enumerate(pictures)]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


# --- Held-out examples -----------------------------------------------------------------------


def test_the_first_examples_in_every_form(words):
    captions = ["a red seven", "a blue three", "nine", "nine", "a red seven"]
    source = elements(5, caption=captions)
    found = held_out.of_elements(source + source, 5, 2, lambda text: words([text], 16)[0])
    assert found.prompts() == captions
    batches = list(found.batches())
    assert [len(batch["image"]) for batch in batches] == [2, 2, 1]
    pictures = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(pictures, tiny.pictures(5))
    np.testing.assert_array_equal(
        np.concatenate([batch["input_ids"] for batch in batches]), words(captions, 16)
    )
    np.testing.assert_array_equal(np.concatenate(list(found.pictures())), to_uint8(pictures))


def test_digits_that_are_held_out_are_none_of_the_training_scans():
    found = held_out.of_elements(data.elements("digit-scans", "test", 0), 450, 100)
    scans = np.concatenate(list(found.pictures())).reshape(450, -1)
    train = np.uint8(np.rint(data.digits.load_scans("train")[0] * 255)).reshape(-1, 64)
    assert not {scan.tobytes() for scan in scans} & {scan.tobytes() for scan in train}
    assert len({scan.tobytes() for scan in scans}) == 450  # each of them once
    assert set(found.prompts()) == set("0123456789")


def test_fewer_prompts_than_pictures_come_again():
    assert held_out.cycled(["a", "b"], 5) == ["a", "b", "a", "b", "a"]


# --- Loss ------------------------------------------------------------------------------------


def loss_by_bucket(params, aux, batch, keys):
    """Depends on everything that it is given: [3, b]."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    own = batch["image"].mean((1, 2, 3)) * params["w"] + aux
    return own[None, :] + noise.T


def test_held_out_loss_is_the_mean_over_examples_and_buckets():
    source = elements(7)
    params, aux = {"w": jnp.float32(3)}, jnp.float32(0.5)
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(7)]
    noise = np.stack([jax.random.normal(key, (3,)) for key in keys])
    own = tiny.pictures(7).mean((1, 2, 3)) * 3 + 0.5
    expected = (own[:, None] + noise).mean(0)
    for batch_size in (2, 4, 7):  # eight devices: the batches are filled up to that
        found = held_out.of_elements(source + source, 7, batch_size)
        measure = in_loop.denoising_loss(loss_by_bucket, aux, found)
        result = measure(params, 100)
        assert list(result) == ["loss", "loss_t0", "loss_t1", "loss_t2"]
        np.testing.assert_allclose(list(result.values())[1:], expected, rtol=1e-5)
        assert result["loss"] == pytest.approx(expected.mean(), rel=1e-5)
        assert measure(params, 200) == result  # whatever the step


def test_parameters_may_lie_on_one_device_or_on_the_host():
    found = held_out.of_elements(elements(4), 4, 4)
    measure = in_loop.denoising_loss(loss_by_bucket, jnp.float32(0), found)
    here = measure({"w": np.float32(2)}, 0)
    assert measure({"w": jax.device_put(jnp.float32(2), jax.devices()[1])}, 0) == here


def test_no_held_out_examples():
    found = held_out.of_elements(elements(1), 0, 4)
    with pytest.raises(JaxsdError, match="no held-out examples"):
        in_loop.denoising_loss(loss_by_bucket, jnp.float32(0), found)({"w": jnp.float32(0)}, 0)


# --- Drawn pictures --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scans():
    return held_out.of_elements(elements(24, 1, label=np.arange(24) % 10), 20, 8)


def test_drawn_pictures_are_measured_against_held_out_ones(scans, caplog, untraced):
    objective = tiny.ddpm()
    params = tiny.parameters(objective.net)
    made, judge = [], features.digit_judge()

    def make_pipeline(params):
        pipe = objective.pipeline(params)
        made.append(weakref.ref(pipe))
        return pipe

    def measures():
        return samples.Measures(judge, samples.reference(scans.pictures, judge))

    measure = in_loop.drawn(make_pipeline, scans, HOW, measures)
    found = measure(params, 1)
    pipe = objective.pipeline(params)
    pictures = []
    for chosen in (["0", "1", "2", "3"], ["4", "5", "4", "4"]):
        seeds = [4 * len(pictures) + i for i in range(4)]
        latents = pipe.denoise(
            pipe.noise(seeds), pipe.encode(chosen), None, steps=2, sampler="ddim", seeds=seeds
        )
        pictures.append(pipe.decode_array(latents))
    drawn = np.concatenate(pictures)[:6]
    shown = np.concatenate(list(scans.pictures()))
    expected = metrics.frechet_distance(judge(drawn), judge(shown))
    assert found["fd"] == pytest.approx(expected, rel=1e-6)
    assert found["kd_all"] == pytest.approx(
        metrics.squared_mmd(judge(drawn), judge(shown)), rel=1e-4
    )
    assert found["grid"].dtype == np.uint8 and found["grid"].shape[-1] == 3
    # The same parameters give the same numbers, others others; and nothing is compiled anew.
    assert {k: v for k, v in measure(params, 2).items() if k != "grid"} == {
        k: v for k, v in found.items() if k != "grid"
    }
    others = {name: 0.5 * value for name, value in params.items()}
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        assert measure(others, 3)["fd"] != found["fd"]
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
    assert [pipe() for pipe in made] == [None] * 3  # no copies are kept meanwhile


def test_pictures_that_diverged_are_no_numbers(scans):
    objective = tiny.ddpm()
    params = {name: value * jnp.nan for name, value in tiny.parameters(objective.net).items()}
    known = samples.Measures(features.digit_judge(), rows := statistics.gather([np.eye(3)]))
    found = in_loop.drawn(objective.pipeline, scans, HOW, lambda: known)(params, 0)
    assert found.keys() == {*statistics.distances(rows, rows)}
    assert np.isnan([*found.values()]).all()  # and training goes on


def test_reference_statistics_are_read_if_they_are_there(tmp_path, scans):
    judge, file = features.digit_judge(), tmp_path / "real.npz"
    first = samples.reference(scans.pictures, judge, file)

    def none():
        raise AssertionError("not read again")
        yield

    again = samples.reference(none, judge, file)
    np.testing.assert_array_equal(again.covariance, first.covariance)
    assert statistics.load(file).count == 20
    with pytest.raises(JaxsdError, match="is of 20 pictures, hence of others"):
        samples.reference(none, judge, file, counts=(19,))


# --- VAE and CLIP ----------------------------------------------------------------------------


def test_reconstruction():
    objective = tiny.vae()
    params = tiny.parameters(objective.net)
    pictures = tiny.pictures(12)[:10]
    first = features.Features(lambda p: p[:, :2, :2, 0].reshape(len(p), -1).astype(np.float64))
    measure = in_loop.reconstruction(
        objective.net, held_out.of_elements(elements(12), 10, 4), first
    )
    found = measure(params, 0)
    mean, _ = objective.net(params, jnp.asarray(pictures), method="encode")
    again = np.asarray(objective.net(params, mean, method="decode"))
    a, b = to_uint8(pictures).astype(float), to_uint8(again).astype(float)
    error = ((a - b) ** 2).mean((1, 2, 3))
    assert found["psnr"] == pytest.approx((10 * np.log10(255**2 / error)).mean(), rel=1e-4)
    l1 = np.abs(np.clip(again, -1, 1) - pictures).mean()
    assert found["l1"] == pytest.approx(l1, rel=1e-4)
    distance = metrics.frechet_distance(first(to_uint8(again)), first(to_uint8(pictures)))
    assert found["fd"] == pytest.approx(distance, rel=1e-3)
    assert "ssim" not in found  # these are smaller than its window
    assert found["grid"].shape == (2 * 9 - 1, 4 * 9 - 1, 3)


def test_retrieval(words):
    """Pictures 0 and 3 share a caption; picture 2 is mistaken for 1."""
    captions = ["a red seven", "a blue three", "nine", "a red seven"]
    known, marks = jnp.asarray(words(captions[:3], 16)), jnp.eye(3)

    def towers(params, ids, pictures):
        number = jnp.argmax((ids[:, None] == known[None]).all(-1), axis=1)
        return marks[number], pictures[:, 0, 0], jnp.float32(1)

    seen = np.eye(3, dtype=np.float32)[[0, 1, 1, 0]]
    source = [
        {"image": np.broadcast_to(row, (2, 2, 3)), "caption": text}
        for row, text in zip(seen, captions, strict=True)
    ]
    tokenize = lambda text: words([text], 16)[0]  # noqa: E731
    found = in_loop.retrieval(towers, held_out.of_elements(source + source, 4, 3, tokenize))({}, 0)
    # The caption "nine" has no picture like it: the first of them is taken, which is a seven.
    assert found == {"text_top1": 3 / 4, "image_top1": 3 / 4, "chance": (4 + 1 + 1) / 16}


# --- Similarity ------------------------------------------------------------------------------


def test_psnr():
    a = np.zeros((3, 4, 4, 3), np.uint8)
    b = a + np.array([0, 1, 255], np.uint8)[:, None, None, None]
    np.testing.assert_allclose(similarity.psnr(a, b), [np.inf, 20 * np.log10(255), 0])


def test_ssim_is_its_formula():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 20, 15, 3), np.uint8)
    b = np.uint8(np.clip(a + rng.normal(0, 20, a.shape), 0, 255))

    def mean(x):
        return gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    for n in range(2):
        values = []
        for c in range(3):
            x, y = a[n, ..., c].astype(float), b[n, ..., c].astype(float)
            mx, my = mean(x), mean(y)
            vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
            c1, c2 = 2.55**2, 7.65**2
            values.append(
                (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            )
        assert similarity.ssim(a, b)[n] == pytest.approx(np.mean(values), rel=1e-9)
    np.testing.assert_allclose(similarity.ssim(a, a), 1)


def test_ssim_of_a_picture_smaller_than_its_window():
    with pytest.raises(JaxsdError, match="11x11"):
        similarity.ssim(*np.zeros((2, 1, 32, 10, 3), np.uint8))


# --- The objectives' loss of held-out pictures -----------------------------------------------


def test_text_to_image_measures_latents_with_their_captions(words, monkeypatch):
    given = []
    monkeypatch.setattr(text_to_image, "loss_by_bucket", lambda *a: given.extend(a) or jnp.zeros(4))
    objective = tiny.text_to_image(words, caption_dropout=1.0)
    ids = jnp.asarray(objective.towers.tokenize(tiny.CAPTIONS))
    batch = {"image": jnp.asarray(tiny.pictures(4)), "input_ids": ids}
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    objective.loss_by_bucket({}, objective.aux, batch, keys)
    net, _, schedule, latents, told, own, options = given
    assert (net, schedule, options) == (objective.net, objective.schedule, objective.denoising)
    assert (own == keys).all()
    mean, logvar = objective.towers.moments(objective.aux["vae"], batch["image"])
    noise = [jax.random.normal(jax.random.fold_in(key, 1 << 16), mean.shape[1:]) for key in keys]
    expected = objective.towers.scaling_factor * (mean + jnp.exp(logvar / 2) * jnp.stack(noise))
    np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-6)
    states = objective.towers.states(objective.aux, ids)  # none of them dropped
    np.testing.assert_allclose(told["encoder_hidden_states"], states["encoder_hidden_states"])


def test_ddpm_measures_with_its_labels():
    objective = tiny.ddpm(class_dropout=1.0)
    params = tiny.parameters(objective.net)
    batch = {name: jnp.asarray(value) for name, value in tiny.ddpm_batch().items()}
    keys = jax.vmap(jax.random.key)(jnp.arange(8))
    measure = jax.jit(lambda batch: objective.loss_by_bucket(params, (), batch, keys))
    found = measure(batch)
    assert found.shape == (denoising.BUCKETS, 8)
    other = measure(batch | {"label": (batch["label"] + 1) % 10})
    assert (found != other).all()
