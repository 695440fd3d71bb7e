"""Between prompts and between draws of noise: closed forms, and plain pictures at the ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused

from jaxsd.components import Component
from jaxsd.diffusion.schedule import Schedule
from jaxsd.editing.mixing import grid, lerp, slerp
from jaxsd.pipeline import Pipeline

SHAPE = (3, 4, 4, 2)
HOW = {"steps": 3, "guidance_scale": 4.0}


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "xl"])
def pipe(request, tmp_path_factory) -> Pipeline:
    words = tiny.tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")
    return tiny.pipeline(words, request.param)


def rows(x) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(len(x), -1)


def angles(a, b) -> np.ndarray:
    a, b = rows(a), rows(b)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return np.arccos(np.clip(cosine, -1, 1))


# --- Noise -----------------------------------------------------------------------------------


def test_the_arc_keeps_the_length_and_shares_the_angle():
    a, b = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    b = b * jnp.asarray(np.linalg.norm(rows(a), axis=1) / np.linalg.norm(rows(b), axis=1))[
        :, None, None, None
    ].astype(jnp.float32)
    whole = angles(a, b)
    for share in (0.25, 0.5, 0.9):
        found = slerp(a, b, share)
        lengths = np.linalg.norm(rows(found), axis=1)
        np.testing.assert_allclose(lengths, np.linalg.norm(rows(a), axis=1), rtol=1e-6)
        np.testing.assert_allclose(angles(a, found), share * whole, rtol=1e-5)
        np.testing.assert_allclose(angles(found, b), (1 - share) * whole, rtol=1e-5)


def test_of_two_at_right_angles_the_weights_are_sine_and_cosine():
    a = jnp.zeros((1, 1, 1, 2)).at[..., 0].set(3.0)
    b = jnp.zeros((1, 1, 1, 2)).at[..., 1].set(2.0)
    found = np.asarray(slerp(a, b, 1 / 3)).ravel()
    np.testing.assert_allclose(found, [3 * np.cos(np.pi / 6), 2 * np.sin(np.pi / 6)], rtol=1e-6)


def test_the_ends_are_exact_and_each_picture_has_its_share():
    a, b = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    np.testing.assert_array_equal(slerp(a, b, 0.0), a)
    np.testing.assert_array_equal(slerp(a, b, 1.0), b)
    each = slerp(a, b, [0.0, 0.3, 1.0])
    np.testing.assert_array_equal(each[0], a[0])
    np.testing.assert_array_equal(each[2], b[2])
    np.testing.assert_allclose(each[1], slerp(a, b, 0.3)[1], rtol=1e-6)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 3e-4, 1e-3])
def test_nearly_parallel_draws(gap):
    """There arc and chord are the same; a plain arc cosine would be off, or divide by zero."""
    a, other = jax.random.normal(jax.random.key(2), (2, *SHAPE))
    b = a + gap * other
    for share in (0.0, 0.3, 1.0):
        chord = (1 - share) * rows(a) + share * rows(b)
        np.testing.assert_allclose(rows(slerp(a, b, share)), chord, atol=1e-6, rtol=1e-6)


def test_opposite_draws_and_none():
    a = jax.random.normal(jax.random.key(3), SHAPE)
    np.testing.assert_array_equal(slerp(a, -a, 1.0), -a)
    np.testing.assert_allclose(slerp(a, -a, 0.25), 0.5 * a, atol=1e-5)
    nothing = jnp.zeros(SHAPE)
    np.testing.assert_array_equal(slerp(nothing, nothing, 0.5), nothing)
    np.testing.assert_array_equal(slerp(nothing, a, 1.0), a)


# --- Prompts ---------------------------------------------------------------------------------


def test_between_prompts_everything_is_told_in_between(pipe):
    a, b = (pipe.encode([text] * 2) for text in ("a red seven", "a blue three"))
    found = lerp(a, b, [0.25, 1.0])
    assert found.keys() == a.keys() and ("text_embeds" in found) == pipe.xl
    for name, value in found.items():
        mean = 0.75 * np.asarray(a[name][0]) + 0.25 * np.asarray(b[name][0])
        np.testing.assert_allclose(value[0], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(value[1], b[name][1])


def test_classes(tmp_path):
    base = tiny.ddpm()
    pixel = Pipeline(Component(base.net, tiny.parameters(base.net)), Schedule())
    told = lerp(pixel.encode(["7"]), pixel.encode(["3"]), 0.25)["class_labels"]
    assert told[0, 7] == 0.75 and told[0, 3] == 0.25
    numbers = {"class_labels": jnp.asarray([7])}
    assert "none in between" in refused(lerp, numbers, numbers, 0.5)


# --- Both ------------------------------------------------------------------------------------


def test_the_stops_of_a_grid_are_plain_pictures(pipe):
    prompts, seeds = ["a red seven", "a blue three", "nine"], [3, 8]
    found = grid(pipe, prompts, seeds, columns=5, rows=3, negative_prompt="red", **HOW)
    assert found.shape[:2] == (3, 5)
    for row, seed in ((0, 3), (2, 8)):
        for column, prompt in zip((0, 2, 4), prompts, strict=True):
            plain = pipe.sample([prompt] * 5, [seed] * 5, negative_prompt="red", **HOW)
            np.testing.assert_array_equal(found[row, column], plain[column])
    flat = np.asarray(found).reshape(15, -1)
    assert len(np.unique(flat.round(3), axis=0)) == 15  # and what lies between is none of them
    between = slerp(pipe.noise([3]), pipe.noise([8]), 0.5)
    cond = lerp(pipe.encode(prompts[:1] * 5), pipe.encode(prompts[1:2] * 5), 0.5)
    middle = pipe.denoise(jnp.repeat(between, 5, 0), cond, pipe.encode(["red"] * 5), **HOW)
    np.testing.assert_allclose(found[1, 1], middle[1], atol=1e-5)


def test_one_for_each_stop_and_other_sizes(pipe):
    found = grid(pipe, ["nine"], [1, 2], height=16, steps=1)
    assert found.shape == (2, 1, 8, 4, 4)
    assert "list" in refused(grid, pipe, "nine", [1])
    assert "list" in refused(grid, pipe, ["nine"], [])
    assert "columns must be at least 1, not 0" in refused(grid, pipe, ["nine"], [1], columns=0)
