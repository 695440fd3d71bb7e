"""A model as it is served: what may be asked of it, and what it draws in company; no server yet."""

import numpy as np
import pytest
import tiny
from PIL import Image
from test_pipeline import compilations
from test_tasks import make

import jaxsd
from jaxsd.errors import JaxsdError
from jaxsd.serving.batching import Worker
from jaxsd.serving.beside import served_names, students_of
from jaxsd.serving.limits import Limits, Refused
from jaxsd.serving.models import Served

PROMPTS = ["a red seven on a white background", "a blue three on a black background", "five"]


@pytest.fixture(scope="module")
def digits():
    return Served("digits", jaxsd.load("digits"), batch_size=4)


@pytest.fixture(scope="module")
def student():
    return Served("digits-4step", jaxsd.load("digits-4step"), batch_size=4)


@pytest.fixture(scope="module")
def pixels():
    return Served("digits-ddpm", jaxsd.load("digits-ddpm"), batch_size=4)


def lone(served, prompt, seed, height=32, width=32, **asked):
    """What the pipeline's own call draws of one seed, computing as many as the server does."""
    seeds = [seed] * served.batch_size
    if "image" in asked:  # encoded as often, too
        asked["image"] = [asked["image"]] * served.batch_size
    return np.asarray(served.pipe(prompt, seeds=seeds, height=height, width=width, **asked)[0])


def scan(value=0):
    """A picture that is no square, so that it must be resized."""
    ramp = np.linspace(0, 255, 48 * 40 * 3).reshape(48, 40, 3)
    return Image.fromarray(((ramp + value) % 256).astype(np.uint8))


def mask():
    array = np.zeros((20, 20), np.uint8)
    array[:, 10:] = 255
    return Image.fromarray(array)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"negative_prompt": "blue"},
        pytest.param({"image": scan(), "strength": 0.7}, marks=pytest.mark.slow),
        {"image": scan(), "mask": mask()},
        pytest.param({"sampler": "dpmpp_2m_sde"}, marks=pytest.mark.slow),
        {"guidance_scale": 1.0},
    ],
    ids=lambda form: "-".join(form) or "plain",
)
def test_a_picture_is_the_one_that_the_pipeline_draws_alone(digits, form):
    """To the last bit where as many are computed; alone, by another program, within its rounding.

    Within 1 of 255, that is, as for files of prompts in test_many.py.
    """
    asked = dict(steps=6, guidance_scale=3.0) | form
    requests = [digits.request(PROMPTS[i % 3], seed=i, **asked) for i in range(4)]
    drawn = digits.draw(requests)
    for i, picture in enumerate(drawn):
        np.testing.assert_array_equal(picture, lone(digits, PROMPTS[i % 3], i, **asked))
        alone = digits.pipe(PROMPTS[i % 3], seeds=[i], **asked, height=32, width=32)[0]
        assert abs(picture.astype(int) - np.asarray(alone)).max() <= 1


def test_the_company_changes_no_bit(digits):
    """Neither who shares the batch nor the place in it: here in bytes, before they are rounded."""

    def latents(requests, row):
        seen = []
        digits.draw(requests, lambda i, t, x: seen.append(np.asarray(x)))
        return seen[-1][row]

    mine = digits.request(PROMPTS[0], seed=7, steps=4, guidance_scale=3.0)
    others = [digits.request(PROMPTS[1], seed=i, steps=4, guidance_scale=9.0) for i in range(3)]
    alone = latents([mine], 0)
    for row in range(4):
        company = [*others[:row], mine, *others[row:]]
        np.testing.assert_array_equal(latents(company, row), alone)
    np.testing.assert_array_equal(latents([others[0], mine], 1), alone)


def test_ten_at_once_through_the_worker(digits):
    scales = [2.0 + i for i in range(10)]
    requests = [
        digits.request(PROMPTS[i % 3], seed=i, steps=5, guidance_scale=scales[i]) for i in range(10)
    ]
    worker = Worker(waiting=64)
    jobs = [worker.submit(digits, [request])[0] for request in requests]
    pictures = [job.picture.result(120) for job in jobs]
    worker.stop()
    for i, picture in enumerate(pictures):
        alone = lone(digits, PROMPTS[i % 3], i, steps=5, guidance_scale=scales[i])
        np.testing.assert_array_equal(picture, alone)


def test_a_student_draws_with_its_own_defaults(student):
    request = student.request(PROMPTS[0], seed=3)
    assert (request.steps, request.guidance_scale) == (4, 3.0)
    np.testing.assert_array_equal(student.draw([request])[0], lone(student, PROMPTS[0], 3))


def test_a_pixel_model_starts_from_a_grey_picture(pixels):
    asked = dict(image=scan(), strength=0.5, steps=4)
    drawn = pixels.draw([pixels.request("seven", seed=1, **asked)])
    alone = lone(pixels, "seven", 1, 8, 8, **asked)
    np.testing.assert_array_equal(drawn[0][..., 0], alone)


def test_frames_are_spread_over_the_steps(digits, student):
    assert digits.frames_at(digits.request("7")) == [2, 5, 9, 12, 15, 19, 22, 25]
    assert digits.frames_at(digits.request("7", steps=1)) == []
    picture = digits.request("7", image=scan(), strength=0.5)
    assert min(digits.frames_at(picture)) >= 15 and max(digits.frames_at(picture)) < 29
    assert student.frames_at(student.request("7")) == [0, 1, 2]


def test_values_compile_nothing_new(digits, untraced):
    """What `kind` lets share a batch, and steps and strength besides, is one program."""
    digits.warm_up()
    forms = [
        {"steps": 3},
        {"steps": 9, "guidance_scale": 2.0, "negative_prompt": "red"},
        {"image": scan(), "strength": 0.4},
        {"image": scan(), "mask": mask()},
    ]
    with compilations() as count:
        for asked in forms:
            digits.draw([digits.request("7", seed=5, **asked)])
            assert not count, (asked, count)


@pytest.mark.parametrize(
    "asked, param, said",
    [
        ({"prompt": " "}, "prompt", "give a prompt"),
        ({"prompt": "a " * 501}, "prompt", "has 1002 characters; 1000 are the most"),
        ({"prompt": "seven " * 90}, "prompt", "longer than the model's text tower reads"),
        ({"seed": -1}, "seed", "seed must be from 0 to 4294967295"),
        ({"seed": 2**32}, "seed", "seed must be from 0 to 4294967295"),
        ({"steps": 0}, "steps", "steps must be from 1 to 100, not 0"),
        ({"steps": 101}, "steps", "steps must be from 1 to 100, not 101"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "from 0 to 100, not nan"),
        ({"guidance_scale": -1.0}, "guidance_scale", "from 0 to 100, not -1"),
        ({"sampler": "magic"}, "sampler", "unknown sampler 'magic'; there are ddim"),
        ({"size": (64, 64)}, "size", "digits draws 32x32 here, not 64x64"),
        ({"mask": mask()}, "image", "give the picture, too"),
        ({"strength": 0.5}, "image", "a picture that sampling starts from"),
        ({"image": scan(), "strength": 0.0}, "image", "above 0 and at most 1"),
        ({"image": scan(), "strength": 0.01}, "steps", "less than one step"),
    ],
)
def test_what_cannot_be_is_refused_before_it_waits(digits, asked, param, said):
    with pytest.raises(Refused, match=said) as caught:
        digits.request(**{"prompt": "seven"} | asked)
    assert caught.value.param == param


def test_a_student_refuses_what_it_cannot_do(student):
    with pytest.raises(Refused, match="distilled from guidance.*negative prompt") as caught:
        student.request("seven", negative_prompt="blue")
    assert caught.value.param == "negative_prompt"
    with pytest.raises(Refused, match="digits-4step was distilled for guidance scales from 1 to 9"):
        student.request("seven", guidance_scale=12.0)


def test_models_that_edit_are_served_with_what_they_want(tmp_path):
    words = tiny.tokenizer(tmp_path / "tokenizer")
    instruct = Served("instruct", make(words, in_channels=8), batch_size=2)
    inpaint = Served("inpaint", make(words, in_channels=9), batch_size=2)
    for served, form in (
        (instruct, {"image": scan()}),
        (inpaint, {"image": scan(), "mask": mask()}),
    ):
        served.warm_up()
        request = served.request("red", seed=1, steps=4, guidance_scale=3.0, **form)
        height, width = served.pipe.default_size
        asked = dict(steps=4, guidance_scale=3.0, **form)
        alone = lone(served, "red", 1, height, width, **asked)
        np.testing.assert_array_equal(served.draw([request])[0], alone)
        with pytest.raises(Refused, match="this model edits pictures: give it a picture") as caught:
            served.request("red")
        assert caught.value.param == "image"
    assert not instruct.takes_strength and inpaint.takes_strength


def test_classes_are_checked_before_they_wait(pixels):
    with pytest.raises(Refused, match="no class 'eleven'") as caught:
        pixels.request("eleven")
    assert caught.value.param == "prompt"


def test_a_size_that_cannot_be_is_refused_at_the_start():
    with pytest.raises(JaxsdError, match="must be multiples of"):
        Served("digits", jaxsd.load("digits"), sizes=[(33, 32)])


def test_students_of_a_model_that_ships():
    assert students_of("digits") == ["digits-1step", "digits-2step", "digits-4step", "digits-lcm"]
    assert len(students_of("digits-ddpm")) == 4 and not students_of("somebody/else")


def test_models_that_trainings_left_have_names_that_tell_them_apart(tmp_path, monkeypatch):
    for run in ("a/teacher", "b/teacher", "student"):
        (tmp_path / run / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert served_names(["student/model", "digits"]) == {"student/model": "model",
                                                         "digits": "digits"}  # fmt: skip
    models = ["a/teacher/model", str(tmp_path / "b/teacher/model"), "student/model/"]
    names = ["a/teacher/model", "b/teacher/model", "student/model"]
    assert [*served_names(models).values()] == names
    (tmp_path / "digits").mkdir()
    models = ["digits-1step", str(tmp_path / "digits"), "owner/digits"]
    assert [*served_names(models).values()] == ["digits-1step", "digits", "owner/digits"]
    monkeypatch.chdir(tmp_path / "student" / "model")
    models = ["digits", str(tmp_path / "digits")]
    assert [*served_names(models).values()] == ["digits", f"{tmp_path.name}/digits"]
    assert served_names(["."]) == {".": "model"}
    for twice in (["digits", "digits"], [".", str(tmp_path / "student" / "model")]):
        with pytest.raises(JaxsdError, match="is served already: name it once"):
            served_names(twice)


def test_limits_say_how_large_a_body_may_be():
    assert Limits(upload_bytes=300).body_bytes == 2 * 404 + 65536
