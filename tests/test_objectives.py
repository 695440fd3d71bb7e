"""Each loss is its formula, falls when trained, and what it exports opens again."""

import dataclasses
import functools
import logging
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxsd
from jaxsd import training
from jaxsd.objectives import Now

KEY = jax.random.key(3)
NOW = Now(KEY)
NAMES = ("ddpm", "vae", "clip")


@pytest.fixture(scope="module")
def objectives(tmp_path_factory):
    """Each objective with parameters and a batch for it."""
    words = tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    captioned = tiny.captioned_batch(words)
    made = {
        "ddpm": (tiny.ddpm(), tiny.ddpm_batch()),
        "vae": (tiny.vae(), {"image": tiny.pictures(8)}),
        "clip": (tiny.clip(words), captioned),
    }
    return {name: (o, tiny.parameters(o.net), arrays(batch)) for name, (o, batch) in made.items()}


@pytest.fixture(scope="module")
def trained(objectives):
    """Metrics for four noises before and after 30 updates on the one batch."""

    @functools.cache
    def train(name, dtype="float32"):
        objective, initial, batch = objectives[name]
        if dtype != "float32":
            denoising = dataclasses.replace(objective.denoising, dtype=dtype)
            objective = dataclasses.replace(objective, denoising=denoising)
        options = training.Options(
            30, learning_rate=3e-3, warmup_steps=1, decay="constant", dtype=dtype
        )
        optimizer = training.make_optimizer(options)
        start = dataclasses.replace(objective, initial=initial)
        before, aux = training.init_state(start, optimizer, options)
        step = jax.jit(training.make_step(objective, optimizer, options))
        after = before
        for _ in range(options.steps):
            after, _ = step(after, aux, batch)
        moments = [[s._replace(step=jnp.int32(i)) for i in range(4)] for s in (before, after)]
        return [[step(state, aux, batch)[1] for state in states] for states in moments]

    return train


def arrays(batch):
    return {name: jnp.asarray(value) for name, value in batch.items()}


# --- DDPM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_classes_is_left_out(share):
    objective, count = tiny.ddpm(class_dropout=share), 4000
    objective.net = tiny.Spy()
    batch = {"image": np.zeros((count, 2, 2, 1), np.float32), "label": np.arange(count) % 10}
    objective.loss({}, (), arrays(batch), NOW)
    told = np.asarray(objective.net.conditioning["class_labels"])
    kept = told.any(1)
    np.testing.assert_array_equal(told[kept], np.eye(10)[batch["label"]][kept])
    deviation = np.sqrt(share * (1 - share) / count)
    assert abs(1 - kept.mean() - share) <= 4 * deviation


def test_a_model_without_classes_has_a_loss_and_makes_pictures(caplog):
    unet = dataclasses.replace(
        tiny.PIXEL_UNET, class_embed_type=None, projection_class_embeddings_input_dim=None
    )
    objective = tiny.ddpm(unet=unet)
    params = tiny.parameters(objective.net)
    loss, _ = jax.jit(objective.loss)(params, (), arrays({"image": tiny.pictures(4, 1)}), NOW)
    assert np.isfinite(loss)
    make, made = objective.pipeline, []

    def pipeline(params):
        pipe = make(params)
        made.append(weakref.ref(pipe))
        return pipe

    objective.pipeline = pipeline
    picture = objective.preview(params)
    assert picture.shape == (4 * 9 - 1, 4 * 9 - 1, 3)
    # The next one takes other parameters, the same programs, and no memory in between
    assert [pipe() for pipe in made] == [None]
    others = {name: value + 0.1 for name, value in params.items()}
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        assert not np.array_equal(objective.preview(others), picture)
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]


# --- All of them -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_on_a_fixed_batch(objectives, trained, name):
    before, after = trained(name)
    assert all(np.isfinite(value) for metrics in before + after for value in metrics.values())
    assert mean(after, "loss") < 0.95 * mean(before, "loss")


def test_a_network_trains_in_bfloat16_as_in_float32(trained):
    (before, after), (half_before, half_after) = trained("ddpm"), trained("ddpm", "bfloat16")
    for one, other in zip(half_before, before, strict=True):
        assert one["loss"] != other["loss"]
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=0.02)
        np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=0.1)
    np.testing.assert_allclose(mean(half_after, "loss"), mean(after, "loss"), rtol=0.05)


def mean(metrics, name):
    return np.mean([values[name] for values in metrics])


def test_an_exported_ddpm_opens_and_makes_pictures(objectives, tmp_path):
    objective, params, _ = objectives["ddpm"]
    objective.export(params, tmp_path / "model")
    pipe = jaxsd.load(tmp_path / "model")
    assert_equal(pipe.params["unet"], params)
    assert pipe.schedule == objective.schedule
    assert [image.size for image in pipe(["3", "seven"], [0, 1], steps=2)] == [(8, 8), (8, 8)]


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(want[name]), name)
