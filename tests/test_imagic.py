"""Imagic: both stages, the edit they leave, and what lies between a picture and a prompt."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from toy import assert_same_state

import jaxsd
from jaxsd.cli.recipes.imagic import Imagic
from jaxsd.cli.train import run as run_recipe
from jaxsd.weights import edits

PROMPT, OTHER = "a red seven", "a blue three"
KEY = jax.random.key(3)
QUICK = {"steps": 2, "guidance_scale": 2.0}  # of sampling
SHORT = {
    "embedding_steps": 3,
    "steps": 3,
    "batch_size": 8,
    "embedding_learning_rate": 1e-2,
    "learning_rate": 1e-3,
    "measure_every": 2,
    "save_every": 1,
    "log_every": 1,
    "strip_seeds": 1,
    "etas": (0.0, 1.0),
    "sampling_steps": 2,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def saved(words, folder, **options):
    made = tiny.text_to_image(words, **options)
    made.export(tiny.parameters(made.net), folder)
    return folder


@pytest.fixture(scope="module")
def base(words, tmp_path_factory):
    """The folder of a model that predicts v."""
    return saved(words, tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "seven.png"
    array = np.kron(np.random.default_rng(0).integers(0, 255, (2, 2, 3)), np.ones((8, 8, 1)))
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def recipe(base, picture, workdir, **options) -> Imagic:
    known = {"model": str(base), "image": picture, "prompt": PROMPT, "workdir": workdir}
    return Imagic(**SHORT | known | options)


def hashes(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(base, picture, tmp_path_factory):
    """A workdir after both stages, the UNet tuned."""
    workdir, before = tmp_path_factory.mktemp("whole"), hashes(base)
    run_recipe(recipe(base, picture, workdir))
    assert hashes(base) == before
    return workdir


@pytest.fixture(scope="module")
def factors(base, picture, tmp_path_factory):
    """The same, with low-rank factors."""
    workdir = tmp_path_factory.mktemp("factors")
    run_recipe(recipe(base, picture, workdir, lora_rank=2, learning_rate=1e-2))
    return workdir


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


# --- The stages ------------------------------------------------------------------------------


def test_both_stages_leave_an_edit_curves_and_pictures(whole):
    first, last = edits.read(whole / "embedding" / "model"), edits.read(whole / "model")
    assert first.prompt == last.prompt == PROMPT and last.base is None and first.base is not None
    for name, array in last.optimised.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, first.optimised[name])
        np.testing.assert_array_equal(last.target[name], first.target[name])
        assert 1e-3 < np.abs(array - last.target[name]).max() < 0.1  # three updates of 1e-2
    for folder in (whole / "embedding", whole):
        assert [s for s, r in rows(folder).items() if "reconstruction/loss" in r] == [2, 3]
        assert Image.open(folder / "samples" / "preview_0000003.png").size == (4 * 8 + 3, 8)
    assert Image.open(whole / "strip.png").size == (3 * 8 + 2, 8)
    tuned, plain = (jaxsd.load(f) for f in (whole / "model", first.base["model"]))
    for name in ("vae", "text_encoder"):
        assert_same_state(tuned.params[name], plain.params[name])
    pairs = [(tuned.params["unet"][n], p) for n, p in plain.params["unet"].items()]
    assert 0 < max(float(jnp.abs(a - b).max()) for a, b in pairs) < 0.01


@pytest.mark.parametrize("kept", ["embedding/model", "checkpoints"])
def test_what_is_missing_is_made_again_to_the_bit(kept, whole, base, picture, tmp_path):
    """As if killed between the stages, and after the second one's first checkpoint."""
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    if kept == "checkpoints":
        for step in (2, 3):
            shutil.rmtree(cut / "checkpoints" / str(step))
    else:
        for name in ("checkpoints", "tensorboard", "samples"):
            shutil.rmtree(cut / name)
        (cut / "metrics.jsonl").unlink()
    run_recipe(recipe(base, picture, cut))
    assert hashes(cut / "model").keys() == {
        cut / p.relative_to(whole) for p in hashes(whole / "model")
    }
    for path, data in hashes(whole / "model").items():
        assert (cut / path.relative_to(whole)).read_bytes() == data, path
    assert {s: r["loss"] for s, r in rows(cut).items()} == {
        s: r["loss"] for s, r in rows(whole).items()
    }
