"""`train.py progressive`, `guided` and `consistency`, from a teacher's folder to a student's."""

import numpy as np
import pytest
import tiny

import jaxsd
from jaxsd.cli.train import main
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError

SHORT = ("--steps", "2", "--batch-size", "8", "--save-every", "1")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Folders of a pixel model with random weights that predicts v, eps, or the picture."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    for kind in ("v_prediction", "epsilon", "sample"):
        made = tiny.ddpm(schedule=Schedule(beta_schedule="cosine", prediction_type=kind))
        made.export(tiny.parameters(made.net), folder / kind)
        found[kind] = str(folder / kind)
    return found


def train(recipe, *words):
    main([recipe, *SHORT, *map(str, words)])


@pytest.mark.slow
def test_a_chain_of_stages_from_an_eps_teacher(teachers, tmp_path, capfd):
    words = ("--model", teachers["epsilon"], "--workdir", tmp_path, "--start-steps", 4)
    words += ("--convert-steps", 1, "--last-stages-steps", 3, "--default-guidance-scale", 1)
    words += ("--prediction-type", "both")
    train("progressive", *words)
    folders = [tmp_path / name / "model" for name in ("converted", "2-steps", "1-steps")]
    assert capfd.readouterr().out.splitlines() == [str(folder) for folder in folders]
    pipes = [jaxsd.load(folder) for folder in folders]
    assert [pipe.schedule.prediction_type for pipe in pipes] == ["both"] * 3
    assert [pipe.unet.config.out_channels for pipe in pipes] == [2] * 3
    assert [pipe.schedule.default_steps for pipe in pipes] == [None, 2, 1]
    assert pipes[-1].default_steps == 1 and pipes[-1].default_guidance_scale == 1
    for before, after in zip(pipes, pipes[1:], strict=False):
        change = [
            np.abs(before.params["unet"][n] - p).max() for n, p in after.params["unet"].items()
        ]
        assert 0 < max(change) < 0.01
    assert pipes[-1](["7"], [0])[0].size == (8, 8)

    # Ended stages are left as they are; one that is missing is trained again, to the same
    last = folders[-1] / "unet" / "diffusion_pytorch_model.safetensors"
    kept, before = last.read_bytes(), folders[1].stat().st_mtime_ns
    (folders[-1] / "model_index.json").unlink()
    train("progressive", *words)
    assert last.read_bytes() == kept and folders[1].stat().st_mtime_ns == before
    with pytest.raises(JaxsdError, match="other options.*learning_rate"):
        train("progressive", *words, "--learning-rate", 1e-2)


@pytest.mark.slow
def test_guided_then_progressive(teachers, tmp_path):
    first, then = tmp_path / "guided", tmp_path / "progressive"
    train(
        "guided", "--model", teachers["v_prediction"], "--workdir", first, "--guidance-range", 1, 5
    )
    student = jaxsd.load(first / "model")
    assert student.unet.config.guidance_range == (1, 5) and student.guidance_embedded
    # One stage, in the workdir itself, of the guided teacher as it is
    words = ("--model", teachers["v_prediction"], "--initial", first / "model", "--start-steps", 2)
    train("progressive", *words, "--workdir", then)
    pipe = jaxsd.load(then / "model")
    assert pipe.unet.config == student.unet.config and pipe.schedule.default_steps == 1
    with pytest.raises(JaxsdError, match="1 to 30 is beyond 1 to 5"):
        words = ("--model", first / "model", "--start-steps", 2, "--guidance-range", 1, 30)
        train("progressive", *words, "--workdir", tmp_path / "again")
    with pytest.raises(JaxsdError, match="is told the guidance scale already"):
        train("guided", "--model", first / "model", "--workdir", tmp_path / "again")


def test_a_consistency_lora(teachers, tmp_path):
    words = ("--model", teachers["v_prediction"], "--guidance-range", 3, 3, "--lora-rank", 2)
    train("consistency", *words, "--lora-targets", "convs", "--workdir", tmp_path)
    merged = jaxsd.load(tmp_path / "model")
    assert not merged.guidance_embedded and merged.default_sampler == "lcm"
    pipe = jaxsd.load(teachers["v_prediction"])
    pipe.schedule = merged.schedule
    pipe.add_lora(tmp_path / "model")
    assert merged.default_guidance_scale == 1  # it is in the weights
    one, other = (np.asarray(p(["3"], [0], steps=4)[0]) for p in (pipe, merged))
    assert np.abs(one.astype(int) - other).max() <= 1


REFUSED = {
    "give the teacher with --model": ("progressive",),
    "no division by 2 leads to 3": ("progressive", "--model", "TEACHER", "--end-steps", "3"),
    "turn it into one that predicts v": ("progressive", "--model", "EPSILON"),
    "turn it first, with progressive's --convert-steps": (
        *("progressive", "--model", "TEACHER", "--prediction-type", "sample"),
        *("--start-steps", "2"),
    ),
    "add --told False": ("guided", "--model", "TEACHER", "--lora-rank", "2"),
    "learns one: give it twice .* such as 9 9": ("guided", "--model", "TEACHER", "--told", "False"),
    "told needs a --guidance-range": ("guided", "--model", "TEACHER", "--guidance-range", "None"),
    "would be guided again in the next stage": (
        *("progressive", "--model", "TEACHER", "--guidance-range", "3", "3", "--start-steps", "2"),
    ),
    "one that predicts it says nothing": (
        *("progressive", "--model", "SAMPLE", "--encoder", "--start-steps", "2"),
    ),
    "lora_rank: factors are not trained with --adversarial-weight": (
        *("progressive", "--model", "TEACHER", "--start-steps", "2", "--lora-rank", "2"),
        *("--adversarial-weight", "0.1"),
    ),
    "leave --weighting out": ("consistency", "--model", "TEACHER", "--weighting", "snr+1"),
    "ends in noise alone": ("consistency", "--model", "EPSILON"),
    "is for students without guidance": (
        *("consistency", "--model", "TEACHER", "--condition-dropout", "0.5"),
    ),
    "rising, not 5 to 2": ("guided", "--model", "TEACHER", "--guidance-range", "5", "2"),
    "condition_dropout must be from 0 to 1": (
        *("progressive", "--model", "TEACHER", "--condition-dropout", "2", "--start-steps", "2"),
    ),
    "is no student of .* they differ in prediction_type": (
        *("guided", "--model", "TEACHER", "--initial", "EPSILON"),
    ),
    "a plain denoising loss would undo": ("text-to-image", "--model", "digits-4step"),
    "original_steps must be at least 1": (
        *("consistency", "--model", "TEACHER", "--original-steps", "0"),
    ),
    "give --eval-samples": (
        *("progressive", "--model", "TEACHER", "--start-steps", "2", "--eval-every", "1"),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_in_a_line(message, teachers, tmp_path):
    names = {"TEACHER": "v_prediction", "EPSILON": "epsilon", "SAMPLE": "sample"}
    names = {word: teachers[kind] for word, kind in names.items()}
    words = [names.get(word, word) for word in REFUSED[message]]
    with pytest.raises(JaxsdError, match=message):
        train(*words, "--workdir", tmp_path / "run")
    assert not list((tmp_path / "run").glob("**/model"))


def test_a_dry_run_names_the_stages(teachers, tmp_path, capsys):
    words = ("--model", teachers["v_prediction"], "--workdir", tmp_path / "run")
    train("progressive", *words, "--start-steps", 8, "--dry-run")
    said = capsys.readouterr().out
    assert "4-steps, 2-steps, 1-steps; the first:" in said and "memory: together" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_students_are_measured_by_what_they_draw(teachers, tmp_path):
    words = ("--model", teachers["v_prediction"], "--start-steps", 2, "--workdir", tmp_path)
    train("progressive", *words, "--eval-every", 4, "--eval-samples", 10)
    rows = [
        line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "drawn" in line
    ]
    assert len(rows) == 1
