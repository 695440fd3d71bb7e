"""Recipes measure what they hold out, and `jaxsd evaluate` any model against pictures."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from jaxsd import data, training
from jaxsd.cli import run_command
from jaxsd.cli.recipes.common import Common
from jaxsd.cli.recipes.ddpm import DDPM
from jaxsd.cli.recipes.evaluation import DenoisingEvaluation, VAEEvaluation
from jaxsd.cli.recipes.pictures import PictureData
from jaxsd.errors import JaxsdError
from jaxsd.evaluation import (
    features,
    metrics,
    real,
    statistics,
)
from jaxsd.hub import PRETRAINED
from jaxsd.weights import write_json

# --- Recipes ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Common, PictureData, VAEEvaluation, DenoisingEvaluation):
    """Any recipe that trains on pictures."""


@pytest.mark.slow
def test_a_training_is_evaluated_on_its_way(tmp_path):
    objective = tiny.ddpm()
    recipe = DDPM(
        workdir=tmp_path,
        steps=3,
        batch_size=8,
        warmup_steps=1,
        sample_every=100,
        eval_every=2,
        eval_count=40,
        eval_samples=20,
        eval_steps=2,
        eval_guidance_scale=1.0,
        eval_batch_size=20,
    )
    dataset = data.elements("digit-scans", "train", 0)

    def batches(start, stop):
        return data.batches(dataset, 8, start, stop)

    evaluators = recipe.denoising_evaluators(objective)
    state = training.train(objective, batches, recipe, tmp_path, {}, evaluators=evaluators)
    logged = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, logged) if "eval/loss" in row]
    assert [row["step"] for row in rows] == [2, 3]
    quarters = [rows[0][f"eval/loss_t{i}"] for i in range(4)]
    assert rows[0]["eval/loss"] == pytest.approx(np.mean(quarters))
    assert {"drawn/fd", "drawn/kd", "drawn/kd_spread", "drawn/kd_all"} <= rows[0].keys()
    assert rows[0]["drawn/fd"] != rows[1]["drawn/fd"]
    # What is measured depends on the parameters alone: not on what was measured before.
    for evaluator in recipe.denoising_evaluators(objective):
        found = evaluator.measure({n: jnp.asarray(np.asarray(v)) for n, v in state.ema.items()}, 0)
        found.pop("grid", None)
        assert {n: rows[1][f"{evaluator.name}/{n}"] for n in found} == found


def test_nothing_is_opened_without_evaluation(tmp_path):
    recipe = Recipe(workdir=tmp_path, data="no such folder", inception=tmp_path / "none.pth")
    assert recipe.vae_evaluators(tiny.vae()) == []


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"eval_every": -1}, "eval_every"),
        ({"eval_samples": 1}, "eval_samples must be at least 2"),
        ({"eval_count": 1}, "eval_count must be at least 2"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
        ({"eval_samples": 4, "eval_steps": 0}, "eval_steps"),
        ({"eval_samples": 4, "clip_score": "none"}, "none"),
        ({"data": "nothing here"}, "nothing here"),
        ({"inception": "none.pth"}, "none.pth does not exist"),
        ({"data": "{folder}"}, "holdout"),
        ({"data": "{folder}", "eval_data": "{folder}/"}, "no pictures of .* are held out"),
    ],
)
def test_options_that_cannot_be(tmp_path, wrong, message):
    fill(tmp_path / "pictures", 4)
    wrong = {
        name: value.format(folder=tmp_path / "pictures") if isinstance(value, str) else value
        for name, value in wrong.items()
    }
    for name in {"inception", "clip_score"} & wrong.keys():
        wrong[name] = Path(wrong[name])
    recipe = Recipe(**{"workdir": tmp_path, "eval_every": 1, "resolution": 8} | wrong)
    with pytest.raises(JaxsdError, match=message):
        recipe.vae_evaluators(tiny.vae())
        recipe.denoising_evaluators(tiny.ddpm())


def fill(folder: Path, count: int) -> None:
    """Pictures of a colour each."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 3 * i, 200 - i)).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"colour {i}")


def test_a_test_split_beside_what_is_trained_on_is_held_out(tmp_path):
    fill(tmp_path / "data" / "train", 12)
    fill(tmp_path / "data" / "test", 3)
    folder = str(tmp_path / "data")
    for changes in ({"data": folder, "eval_data": f"{folder}/."}, {"data": "digits"}):
        recipe = Recipe(**{"workdir": tmp_path, "resolution": 8, "eval_data": folder} | changes)
        assert sorted(recipe.held_out().prompts()) == [f"colour {i}" for i in range(3)]
    assert len(real.open_real(folder, (8, 8))) == 3
    assert (tmp_path / "held_out" / "sizes.npz").exists()


def test_pictures_that_a_cache_was_made_of_are_held_out_as_they_were(tmp_path):
    fill(tmp_path / "pictures", 60)
    folder, cache = str(tmp_path / "pictures"), tmp_path / "latents"
    made_of = {"data": folder + "/", "holdout": 0.3, "resolution": 8}
    write_json(cache / "cache.json", {"made_of": made_of})
    recipe = Recipe(workdir=tmp_path, data=str(cache), eval_data=folder, holdout=0.3)
    pictures = next(recipe.held_out().pictures())
    assert pictures.shape[1:] == (8, 8, 3)  # as the latents' are, not 512
    with pytest.raises(JaxsdError, match="with --holdout 0.3: give the same, not 0"):
        dataclasses.replace(recipe, holdout=0.0).held_out()


@pytest.mark.parametrize("other", [False, True])
def test_pictures_that_are_held_out_are_not_trained_on(tmp_path, other):
    """Where latents are trained on, eval_data are the pictures that they were made of."""
    fill(tmp_path / "pictures", 60)
    folder = str(tmp_path / "pictures")
    places = {"data": "latents", "eval_data": folder} if other else {"data": folder}
    recipe = Recipe(workdir=tmp_path, resolution=8, holdout=0.3, flip=True, eval_count=50, **places)
    held = recipe.held_out()
    seen = {int(prompt.split()[1]) for prompt in held.prompts()}
    trained = dataclasses.replace(recipe, data=folder).open_data(0, 1)
    names = {trained[i]["caption"] for i in range(len(trained.members[0]))}
    assert names.isdisjoint(held.prompts()) and len(names) + len(seen) == 60
    assert len(held.prompts()) == len(seen) == held.count < 50  # no more than there are, each once
    pictures = np.concatenate(list(held.pictures()))
    assert {int(picture[0, 0, 0]) for picture in pictures} == seen
    assert sum(len(batch["image"]) for batch in held.batches()) == held.count


def test_a_folder_of_test_pictures_is_used_whole(tmp_path):
    fill(tmp_path / "test pictures", 5)
    eval_data = str(tmp_path / "test pictures")
    recipe = Recipe(workdir=tmp_path, data="digits", resolution=8, eval_data=eval_data)
    assert sorted(recipe.held_out().prompts()) == [f"colour {i}" for i in range(5)]


# --- jaxsd evaluate --data -------------------------------------------------------------------


def test_any_model_is_measured_against_a_folder(tmp_path, capsys, monkeypatch):
    fill(tmp_path / "real", 12)
    (tmp_path / "real" / "broken.png").write_bytes(b"\x89PNG and no more")
    seen = []

    def mean_colours(pictures):
        seen.append(pictures.reshape(len(pictures), -1, 3).mean(1))
        return seen[-1]

    opened = []
    colours = features.Features(mean_colours, "fid", "kid")
    monkeypatch.setattr(features, "inception", lambda file: opened.append(file) or colours)
    arguments = ["digits", "--data", tmp_path / "real", "--inception", "weights.pth"]
    arguments += ["--clip", PRETRAINED / "digits" / "clip", "--statistics", tmp_path / "real.npz"]
    arguments += ["--count", 10, "--steps", 2, "--batch-size", 5, "--guidance-scale", 1]
    run_command("evaluate", [str(argument) for argument in arguments])
    table = capsys.readouterr().out
    assert "against 13 real pictures, 1 of which cannot be read" in table
    assert "real pictures" in table and "KID" in table and "CLIP score" in table
    pictures, *drawn = seen
    expected = [np.array([i, 3 * i, 200 - i]) for i in range(12)]
    np.testing.assert_array_equal(pictures, expected)
    assert [len(batch) for batch in drawn] == [5, 5] and opened == [Path("weights.pth")]
    distance = metrics.frechet_distance(np.concatenate(drawn), pictures)
    assert f"| {distance:.2f} " in table
    assert statistics.load(tmp_path / "real.npz").count == 12
    chosen = real.open_real(str(tmp_path / "real"), (32, 32))
    assert len(set(chosen.captions(13))) == 13 and chosen.captions(26)[13:] == chosen.captions(13)
    (tmp_path / "real" / "broken.png").unlink()  # what cannot be read has no caption
    assert sorted(chosen.captions(12)) == sorted(f"colour {i}" for i in range(12))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--inception", "x.pth"], "--inception needs --data"),
        (["--caption-column", "text"], "--caption-column needs --data"),
        (["--data", "somewhere"], "--data needs --inception"),
        (["--data", "x", "--clip", "y", "--statistics", "z.npz"], "give --inception"),
        (["--count", "0"], "count must be at least 1"),
    ],
)
def test_what_evaluate_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run_command("evaluate", ["digits-ddpm", *arguments])
    assert message in capsys.readouterr().err
