"""What a row of the report says of a student: how far from its teacher, and at what cost."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxsd
from jaxsd.cli import run_command
from jaxsd.components import Component
from jaxsd.diffusion.jumps import student_schedule
from jaxsd.diffusion.samplers import SAMPLERS
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError
from jaxsd.evaluation import drawing, models, report, same_noise
from jaxsd.evaluation.drawing import Drawn, Sampling
from jaxsd.evaluation.same_noise import Observer, Teacher, load_teacher
from jaxsd.nn import Net
from jaxsd.pictures import to_uint8
from jaxsd.pipeline import Pipeline

SCANS = [str(i) for i in range(6)]
HOW = Sampling(count=6, steps=8, sampling_seeds=(0,), batch_size=4)


@pytest.fixture(scope="module")
def ddpm():
    return jaxsd.load("digits-ddpm")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def rmse(pipe, how, teacher, prompts=SCANS, seed=0):
    seen = Observer(pipe, how, teacher)
    pictures = np.concatenate([*seen.pictures(prompts, seed)])
    assert len(pictures) == len(prompts) and pictures.dtype == np.uint8
    return seen.rmse()


# --- The distance to the teacher -------------------------------------------------------------


def test_a_model_is_at_no_distance_from_itself_and_nearer_the_more_steps(ddpm, tmp_path):
    teacher = Teacher(ddpm, tmp_path, steps=16)
    distances = []
    for steps in (1, 2, 4, 16):
        found = rmse(ddpm, dataclasses.replace(HOW, steps=steps), teacher)
        assert set(found) == {"rmse_to_teacher"}  # pixels have no latents
        distances.append(found["rmse_to_teacher"])
    assert distances[-1] == 0 and distances == sorted(distances, reverse=True)
    assert 0.2 < distances[0] < 0.6 and distances[2] < distances[0] / 2


def test_it_is_numpys_of_the_pictures_before_they_are_rounded(ddpm, tmp_path):
    """Of all pictures at once, drawn without batches."""

    def pictures(steps, seed):
        seeds = [1_000_000 * seed + i for i in range(6)]
        cond = ddpm.encode(SCANS)
        x = ddpm.denoise(ddpm.noise(seeds), cond, None, steps=steps, sampler="ddim", seeds=seeds)
        return np.clip(ddpm.decode_pixels(x), -1, 1)

    for seed in (0, 3):
        expected = np.sqrt(np.mean((pictures(2, seed) - pictures(5, seed)) ** 2, dtype=np.float64))
        how = dataclasses.replace(HOW, steps=2)
        found = rmse(ddpm, how, Teacher(ddpm, tmp_path, steps=5), seed=seed)
        assert found["rmse_to_teacher"] == pytest.approx(expected, rel=1e-5)


def test_latents_are_compared_beside_decoded_pictures(words, tmp_path):
    objective = tiny.text_to_image(words)
    pipe = objective.pipeline(tiny.parameters(objective.net))
    how = Sampling(count=4, steps=2, guidance_scale=2.0, sampling_seeds=(0,), batch_size=4)
    teacher = Teacher(pipe, tmp_path, steps=5, guidance_scale=3.0)
    found = rmse(pipe, how, teacher, tiny.CAPTIONS)
    a, b = (
        pipe.sample(tiny.CAPTIONS, range(4), steps, scale, sampler="ddim")
        for steps, scale in ((2, 2.0), (5, 3.0))
    )
    x, y = (np.clip(pipe.decode_pixels(latents), -1, 1) for latents in (a, b))
    assert set(found) == {"rmse_to_teacher", "rmse_latents"}
    for name, difference in (("rmse_latents", a - b), ("rmse_to_teacher", x - y)):
        expected = np.sqrt(np.square(np.asarray(difference, np.float64)).mean())
        assert found[name] == pytest.approx(expected, rel=1e-4) and expected > 0.01


def test_the_teacher_draws_once_for_each_seed_and_scale(monkeypatch, ddpm, tmp_path):
    drawn = []

    def note(pipe, prompts, how, seed, start, *rest):
        drawn.append((how.steps, how.guidance_scale, seed, start))
        picture = np.full((len(prompts[start : start + 4]), 8, 8, 1), seed / 10, np.float32)
        return Drawn(picture, picture, 0.0)

    for module in (same_noise, drawing):
        monkeypatch.setattr(module, "draw_batch", note)
    teacher = Teacher(ddpm, tmp_path, steps=9)
    scaled = dataclasses.replace(HOW, guidance_scale=2.0)
    for how in (HOW, scaled, dataclasses.replace(HOW, steps=2)):
        for seed in (0, 1):
            assert rmse(ddpm, how, teacher, seed=seed) == {"rmse_to_teacher": 0}
    by_teacher = [row for row in drawn if row[0] == 9]
    assert len(drawn) == 3 * 2 * 2 + len(by_teacher)
    assert sorted(by_teacher) == [(9, g, s, i) for g in (1, 2) for s in (0, 1) for i in (0, 4)]


def test_a_teacher_takes_steps_that_meet_and_does_not_clip(ddpm, tmp_path):
    digits = jaxsd.load("digits")
    for student, steps in ((ddpm, 256), (digits, 250)):  # at every time; of 1000 timesteps
        name = "digits" if student is digits else "digits-ddpm"
        teacher = load_teacher(name, student, tmp_path)
        assert teacher.steps == steps and teacher.pipe.schedule == student_schedule(
            student.schedule
        )
        grid, _ = teacher.pipe.plan_steps("ddim", steps)
        np.testing.assert_array_equal(grid.next_alpha[: steps - 1], grid.alpha[1:steps])
    assert ddpm.schedule.clip_sample and not teacher.pipe.schedule.clip_sample
    with pytest.raises(JaxsdError, match="digits draws 32x32 .* 8x8x4 .* 8x8x1 .* same kind"):
        load_teacher("digits", ddpm, tmp_path)
    with pytest.raises(JaxsdError, match="steps must be"):
        load_teacher("digits-ddpm", ddpm, tmp_path, steps=0)


# --- What it costs ---------------------------------------------------------------------------


class Counting(Net):
    """Counts how many pictures are put through it."""

    def __init__(self, config=tiny.PIXEL_UNET):
        self.config, self.rows = config, []

    def __call__(self, params, z, t, dropout_key=None, **conditioning):
        jax.debug.callback(lambda rows: self.rows.append(int(rows)), len(z))
        return jnp.tanh(z)


def counting(schedule=None, **changes):
    net = Counting(dataclasses.replace(tiny.PIXEL_UNET, **changes))
    unet = Component(net, {"conv_in.weight": jnp.zeros(1)})
    return Pipeline(unet, schedule or Schedule(class_name="DDIMScheduler")), net


def counted(pipe, net, how):
    """(what is said, what is counted) for one picture."""
    net.rows.clear()
    batch = drawing.draw_batch(pipe, ["3", "4"], how, 0, 0)
    jax.effects_barrier()
    return drawing.passes(pipe, how), sum(net.rows) / len(batch.pixels)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_passes_are_those_that_the_network_counts(sampler):
    how = Sampling(steps=4, sampler=sampler, batch_size=2)
    said, found = counted(*counting(), how)
    assert said == found
    twice = {"heun": 7, "dpm2": 7, "dpm2_ancestral": 7}  # at the picture there is nothing to see
    assert said == {"pndm": 5, **twice}.get(sampler, 4)


def test_from_pure_noise_there_is_one_look_less():
    cosine = Schedule(beta_schedule="cosine", prediction_type="v_prediction")
    how = Sampling(steps=4, sampler="heun", batch_size=2)
    assert counted(*counting(cosine), how) == (6, 6)


@pytest.mark.parametrize("scale, expected", [(0.5, 3), (1.0, 3), (2.0, 6)])
def test_guidance_is_two_passes(scale, expected):
    how = Sampling(steps=3, guidance_scale=scale, batch_size=2)
    assert counted(*counting(), how) == (expected, expected)
    assert counted(*counting(time_cond_proj_dim=8), how) == (3, 3)  # which is told the scale


def test_the_first_batch_is_not_timed():
    pipe, _ = counting()
    assert drawing.costs(pipe, HOW, [9.0, 0.002, 0.004, 0.001])["ms_per_image"] == 2
    assert np.isnan(drawing.costs(pipe, HOW, [9.0])["ms_per_image"])


def test_students_are_drawn_as_they_were_taught():
    pipe, _ = counting()
    assert (drawing.usual_sampler(pipe), drawing.usual_steps(pipe)) == ("ddim", 50)
    pipe, _ = counting(Schedule(class_name="LCMScheduler"))
    assert (drawing.usual_sampler(pipe), drawing.usual_steps(pipe)) == ("lcm", 4)


def test_a_student_without_an_unconditional_half_takes_no_negative_prompts():
    pipe, _ = counting(time_cond_proj_dim=8)
    with pytest.raises(JaxsdError, match="no unconditional half"):
        models.negative_prompt_shares(pipe, HOW)


# --- jaxsd evaluate --------------------------------------------------------------------------


def test_rounded_pictures_are_the_pipelines(ddpm):
    latents = 3 * ddpm.noise([0, 1])
    drawn = Drawn(np.asarray(latents), np.clip(ddpm.decode_pixels(latents), -1, 1), 0.0)
    np.testing.assert_array_equal(drawn.rounded, ddpm.decode_array(latents))
    np.testing.assert_array_equal(drawn.rounded, to_uint8(ddpm.decode_pixels(latents)))


def test_each_combination_is_a_row(capsys):
    arguments = "digits-ddpm --steps 2 1 --sampler ddim dpmpp_2m --teacher digits-ddpm "
    arguments += "--teacher-steps 2 --count 20 --batch-size 4 --sampling-seeds 2 --no-controls"
    run_command("evaluate", [*arguments.split(), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["sampling"]["steps"] == [2, 1] and found["sampling"]["guidance_scale"] == 1
    assert found["teacher"] == {"model": "digits-ddpm", "steps": 2, "guidance_scale": None}
    assert [*found["rows"]] == [
        f"digits-ddpm, guidance 1, {steps}"
        for steps in ("2 ddim steps", "1 ddim step", "2 dpmpp_2m steps", "1 dpmpp_2m step")
    ]
    two, one, *_ = found["rows"].values()
    assert 0 < two["rmse_to_teacher"][0] < 0.05  # which was clipped on the way
    assert one["rmse_to_teacher"][0] > 0.1
    assert (two["passes"], one["passes"]) == (2, 1) and two["ms_per_image"] > 0


def test_the_table():
    rows = {
        "a, 2 ddim steps": {"rmse_to_teacher": (0.12346, 1e-3), "passes": 4.0, "ms_per_image": 5.0},
        "a, 1 ddim steps": {"rmse_to_teacher": (0.5, np.nan), "ms_per_image": np.nan},
        "real": {},
    }
    assert report.format_table(rows).splitlines() == [
        "|                 | RMSE to teacher | passes | ms/image |",
        "| --------------- | --------------- | ------ | -------- |",
        "| a, 2 ddim steps | 0.1235 ± 0.0010 | 4      | 5.00     |",
        "| a, 1 ddim steps | 0.5000          | –      | –        |",
        "| real            | –               | –      | –        |",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--teacher digits", "the teacher digits draws 32x32"),
        ("--teacher-steps 8", "--teacher-steps needs --teacher"),
        ("--teacher-guidance 2", "--teacher-guidance needs --teacher"),
        ("--steps 4 0", "steps must be"),
        ("--sampler ddim unheard-of", "unknown sampler 'unheard-of'"),
    ],
)
def test_what_evaluate_refuses_of_students(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run_command("evaluate", ["digits-ddpm", *arguments.split()])
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
