"""Both sides of benchmarks/beside.py train what they are told to."""

import importlib
import math
from pathlib import Path

import diffusers
import pytest
import tiny_torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    parts = tiny_torch.components(made / "words")
    diffusers.StableDiffusionPipeline(**parts).save_pretrained(made / "sd1")
    return made / "sd1"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["text-to-image", "progressive", "guided", "consistency"])
def test_a_step_of_each_side(folder, recipe, monkeypatch, tmp_path):
    """Finite, and an optimizer behind it: the loss is another one at the second step."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    sides, training = (importlib.import_module(name) for name in ("sides", "training_sides"))
    work = sides.Work(str(folder), "train", 1, 32, 1, "float32", "none", recipe, 1, str(tmp_path))
    ours, theirs = training.Jaxsd(work), training.Diffusers(work, compiled=False)
    for side in (ours, theirs):
        first, second = (float(side.once()) for _ in range(2))
        assert math.isfinite(first) and first > 0 and first != second
    assert ours.flops() > 1e6
