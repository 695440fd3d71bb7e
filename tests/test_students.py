"""Students of distillation as they are sampled: few steps, a scale that they are told, pictures."""

import dataclasses
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from refusals import refused
from test_pipeline import PROMPT, compilations, component, pixels
from test_tasks import MASK, PICTURE, make

import jaxsd
from jaxsd.cli import run_command
from jaxsd.denoising import told_scale
from jaxsd.diffusion.jumps import student_schedule
from jaxsd.diffusion.samplers import make_steps
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import GuidanceClipped, JaxsdError
from jaxsd.evaluation.judge import judges
from jaxsd.families import FAMILIES
from jaxsd.models import UNetConfig, guidance_scale_embedding
from jaxsd.networks import Start
from jaxsd.pipeline import Pipeline

RANGE = (2.0, 9.0)
MADE_FOR = {"default_steps": 2, "default_guidance_scale": 4.0}
TEACHER = Schedule(prediction_type="v_prediction", steps_offset=1)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Pipeline:
    """Told the guidance scale, and made for two steps of DDIM."""
    words = tiny.tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")
    pipe = make(words, time_cond_proj_dim=16, guidance_range=RANGE)
    pipe.schedule = dataclasses.replace(student_schedule(TEACHER), **MADE_FOR)
    return pipe


def drawn(student, **changes) -> np.ndarray:
    return pixels(student, **{"negative_prompt": None, "guidance_scale": 4.0} | changes)


# --- The scale that it is told ---------------------------------------------------------------


def test_scales_beyond_the_range_are_taken_as_its_ends(student):
    known = [drawn(student, guidance_scale=scale) for scale in RANGE]
    assert np.abs(known[0] - known[1]).max() > 2
    with pytest.warns(GuidanceClipped, match=r"from 2 to 9; 20 is taken") as caught:
        high = drawn(student, guidance_scale=20.0)
    assert len(caught) == 1
    np.testing.assert_array_equal(high, known[1])
    with pytest.warns(GuidanceClipped, match=r"; -3 is"):
        np.testing.assert_array_equal(drawn(student, guidance_scale=-3.0), known[0])


def test_each_image_is_told_its_own_scale_and_one_warning_is_of_all(student):
    with pytest.warns(GuidanceClipped, match="1, 12.5 is taken") as caught:
        taken = student.taught_scales(np.array([1.0, 5.0, 12.5, 1.0], np.float32))
    assert len(caught) == 1 and taken.dtype == np.float32
    np.testing.assert_array_equal(taken, [2.0, 5.0, 9.0, 2.0])
    told = told_scale(student.unet.config, {}, None, taken)["timestep_cond"]
    assert told.shape == (4, 16)
    for row, scale in zip(told, taken, strict=True):
        alone = guidance_scale_embedding(jnp.array([scale - 1]), 16)[0]
        np.testing.assert_allclose(row, alone, atol=1e-6)


def test_without_a_range_any_scale_is_told(student):
    """As in a checkpoint of LCM, which says nothing of the scales it was taught."""
    unet = dataclasses.replace(student.unet.config, guidance_range=None)
    pipe = Pipeline(
        component(unet, 0),
        student.schedule,
        **{name: student.components[name] for name in ("vae", "text_encoder")},
        tokenizer=student.tokenizer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = [drawn(pipe, guidance_scale=s) for s in (0.0, 1.0, 9.0, 20.0)]
    np.testing.assert_array_equal(pictures[2], drawn(student, guidance_scale=9.0))
    for i, picture in enumerate(pictures):
        assert all(np.abs(picture - other).max() > 1 for other in pictures[:i])


def test_there_is_no_unconditional_half(student):
    for said in (
        refused(student, PROMPT, negative_prompt="blue"),
        refused(student, PROMPT, seeds=[1, 2], negative_prompt=["", "blue"]),
        refused(student.denoise, student.noise([5]), *map(student.encode, ([PROMPT], [""]))),
    ):
        assert "negative prompt" in said and "leave it out" in said
    np.testing.assert_array_equal(drawn(student, negative_prompt=""), drawn(student))


@pytest.mark.parametrize(
    "value, said",
    [
        ([2.0], r"the least and the most scale, not \[2.0\]"),
        ([2.0, 5.0, 9.0], "the least and the most scale"),
        ([9.0, 2.0], "the least and the most scale"),
        ([0.5, 9.0], "guidance_range=0.5 is not from 1"),
        ([1.0, float("inf")], "guidance_range=inf"),
        ([1.0, float("nan")], "guidance_range="),
        ([1.0, "9"], "guidance_range="),
        (9.0, "guidance_range="),
        ([], "guidance_range"),
    ],
)
def test_ranges_that_cannot_be(value, said):
    values = dataclasses.replace(tiny.LATENT_UNET, time_cond_proj_dim=16).to_json()
    with pytest.raises(JaxsdError, match=f"^config.json: .*{said}") as error:
        UNetConfig.from_json(values | {"guidance_range": value})
    assert "\n" not in str(error.value)


def test_a_range_needs_a_network_that_is_told_the_scale():
    with pytest.raises(JaxsdError, match="guidance_range needs time_cond_proj_dim"):
        UNetConfig.from_json(tiny.LATENT_UNET.to_json() | {"guidance_range": [1, 8]})


def test_only_students_say_so_in_their_files(student):
    """And the models of small pictures their guidance scale."""
    values = student.unet.config.to_json()
    assert values["guidance_range"] == list(RANGE)
    assert UNetConfig.from_json(json.loads(json.dumps(values))) == student.unet.config
    whole = values | {"guidance_range": [2, 9]}  # whole numbers will do
    assert UNetConfig.from_json(whole) == student.unet.config
    assert "guidance_range" not in tiny.LATENT_UNET.to_json()
    for name, family in FAMILIES.items():
        assert "guidance_range" not in family.unet.to_json()
        said = {*MADE_FOR} & {*family.schedule.to_json()}
        small = name in ("digits", "digits-ddpm")
        assert said == ({"default_guidance_scale"} if small else set())
    for name, scale in (("digits", 3.0), ("digits-ddpm", 1.0)):
        assert FAMILIES[name].schedule.default_guidance_scale == scale  # of what is trained anew
        assert jaxsd.load(name).default_guidance_scale == scale


# --- What it is made for ---------------------------------------------------------------------


def test_a_student_is_sampled_as_it_was_made_for(student):
    seen = []
    plain = student(PROMPT, 5, callback=lambda i, t, x: seen.append((i, t)))
    assert seen == [(0, 999.0), (1, 499.0)]
    np.testing.assert_array_equal(np.asarray(plain[0]), drawn(student, steps=2)[0])
    latents = student.denoise(student.noise([5]), student.encode([PROMPT]), None, seeds=[5])
    np.testing.assert_array_equal(np.asarray(plain[0]), student.decode_array(latents)[0])


def test_other_models_take_thirty_steps():
    pipe = Pipeline(component(tiny.PIXEL_UNET, 3), Schedule(beta_schedule="cosine"))
    assert (pipe.default_steps, pipe.default_guidance_scale) == (30, 7.5)
    seen = []
    pipe("7", callback=lambda i, t, x: seen.append(i))
    assert seen == [*range(30)]


def test_the_pixel_model_draws_what_it_is_asked_for_by_its_defaults():
    """Guidance with the noise kept and the picture cut, as DDIM does, would draw other digits."""
    pipe = jaxsd.load("digits-ddpm")
    asked = np.arange(40) % 10
    drawn = np.stack(pipe([str(digit) for digit in asked], seeds=range(40)))
    seen = judges().predict(drawn.reshape(-1, 8, 8) / np.float32(127.5) - 1)
    assert (seen == asked).mean() > 0.9


def test_what_it_is_made_for_goes_with_it(student, tmp_path):
    student.save(tmp_path / "model")
    again = jaxsd.load(tmp_path / "model")
    assert again.schedule == student.schedule and again.unet.config == student.unet.config
    assert (again.default_steps, again.default_guidance_scale) == (2, 4.0)


@pytest.mark.parametrize("name, value", [("default_steps", n) for n in (0, -1, 1001, 2.5, "4")])
def test_defaults_that_cannot_be(name, value):
    with pytest.raises(JaxsdError, match=f"{name}="):
        Schedule.from_json({name: value})
    for scale in (-1.0, float("inf"), float("nan"), "3"):
        with pytest.raises(JaxsdError, match="default_guidance_scale="):
            Schedule.from_json({"default_guidance_scale": scale})


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "cosine"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_steps_of_a_student_begin_at_noise_and_end_at_the_picture(count, beta_schedule):
    schedule = student_schedule(dataclasses.replace(TEACHER, beta_schedule=beta_schedule))
    steps = make_steps(schedule, "ddim", count)
    first = 1000 if beta_schedule == "cosine" else 999
    assert steps.count == count and steps.t[0] == first
    np.testing.assert_array_equal(steps.t[:count], first - 1000 / count * np.arange(count))
    assert steps.next_sigma[count - 1] == 0 and steps.next_alpha[count - 1] == 1
    for end, start in ((steps.next_alpha, steps.alpha), (steps.next_sigma, steps.sigma)):
        np.testing.assert_array_equal(end[: count - 1], start[1:count])


def test_the_command(student, tmp_path, capsys):
    """One line of warning, however many batches there are; the notes say what was taken."""
    student.save(tmp_path / "model")
    arguments = ["a red seven", "--model", tmp_path / "model", "--json", "--out", tmp_path / "out"]

    def sample(*more) -> tuple[list, str]:
        run_command("sample", [str(argument) for argument in (*arguments, *more)])
        said = capsys.readouterr()
        return json.loads(said.out)["images"], said.err

    (path,), err = sample()
    assert not err
    with Image.open(path) as image:
        notes = {name: json.loads(image.text[name]) for name in ("steps", "guidance_scale")}
        assert notes == {"steps": 2, "guidance_scale": 4.0}
        np.testing.assert_array_equal(np.asarray(image), np.asarray(student(PROMPT)[0]))
    paths, err = sample("--guidance-scale", 20, "-n", 3, "--batch-size", 1)
    assert len(paths) == 4
    assert err.count("\n") == 1 and err.startswith("warning: ") and "from 2 to 9" in err
    with Image.open(paths[0]) as image:
        assert json.loads(image.text["guidance_scale"]) == 9
    with pytest.raises(SystemExit):
        run_command("sample", [*map(str, arguments), "--negative-prompt", "blue"])
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "negative prompt" in err and err.count("\n") == 1


# --- Pictures to start from ------------------------------------------------------------------


@pytest.mark.parametrize("strength, taken", [(1.0, 4), (0.75, 3), (0.5, 2), (0.25, 1)])
def test_strength_decides_which_steps_are_taken(student, strength, taken):
    """DDIM's last ones; with LCM all of them, of that part of the schedule, as in diffusers."""
    call = {"image": PICTURE, "strength": strength, "steps": 4}
    for sampler, count, most in (("ddim", taken, 999), ("lcm", 4, 1000 * strength)):
        seen = []
        student(PROMPT, **call, sampler=sampler, callback=lambda i, t, x, seen=seen: seen.append(t))
        assert len(seen) == count and most - 20 <= seen[0] <= most or sampler == "ddim"
        if sampler == "ddim":
            assert seen == [999 - 250 * i for i in range(4 - taken, 4)]


@pytest.mark.parametrize("sampler", ["ddim", "lcm"])
def test_a_student_starts_from_a_picture(student, sampler, untraced):
    clean = student.encode_pictures(PICTURE[None] / np.float32(127.5) - 1)
    if sampler == "ddim":  # LCM leaves it at once, in its first jump
        cond, distances = student.encode([PROMPT]), []
        for strength in (0.25, 1.0):
            start = Start(clean, strength)
            out = student.denoise(student.noise([5]), cond, None, steps=4, start=start)
            distances.append(float(jnp.abs(out - clean).mean()))
        assert distances[0] < distances[1]
    call = {"image": PICTURE, "strength": 0.75, "steps": 4, "sampler": sampler}
    one = drawn(student, **call)
    np.testing.assert_array_equal(one, drawn(student, **call))
    assert np.abs(one - drawn(student, **call, guidance_scale=9.0)).max() > 1
    assert np.abs(one - drawn(student, **call, seeds=6)).max() > 2
    with compilations() as count:
        drawn(student, **call | {"strength": 0.5, "guidance_scale": [8.0]})
        assert not count


@pytest.mark.parametrize("sampler", ["ddim", "lcm"])
def test_a_student_paints_only_where_the_mask_is(student, sampler):
    clean = student.encode_pictures(PICTURE[None] / np.float32(127.5) - 1)
    mask = jnp.zeros((1, 4, 4, 1)).at[:, :, 2:].set(1)
    for steps, strength in ((1, 1.0), (4, 1.0), (4, 0.5)):
        out = student.denoise(
            student.noise([5]),
            student.encode([PROMPT]),
            None,
            steps=steps,
            sampler=sampler,
            start=Start(clean, strength, mask),
        )
        np.testing.assert_array_equal(out[:, :, :2], clean[:, :, :2])
        assert np.abs(out[:, :, 2:] - clean[:, :, 2:]).max() > 0.1
    call = {"image": PICTURE, "mask": MASK, "steps": 4, "sampler": sampler}
    np.testing.assert_array_equal(drawn(student, **call), drawn(student, **call))
    assert np.abs(drawn(student, **call) - drawn(student, **call, seeds=6)).max() > 2
