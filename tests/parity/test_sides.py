"""Both sides of benchmarks/beside.py do the same work."""

import math

import diffusers
import numpy as np
import pytest
import sides
import tiny_torch
import training_sides

PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}

pytestmark = pytest.mark.slow  # a program of ours for each part


@pytest.fixture(scope="module", params=PIPELINES)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    parts = tiny_torch.components(made / "words", request.param)
    PIPELINES[request.param](**parts).save_pretrained(made / request.param)
    return made / request.param


@pytest.mark.parametrize("part", ["text", "unet", "decode"])
def test_the_same_of_the_same(folder, part, tmp_path):
    work = sides.Work(str(folder), part, 2, 32, 1, "float32", "none", None, 1, str(tmp_path))
    ours, theirs = sides.Jaxsd(work), sides.Diffusers(work, compiled=False)
    here, there = ours.once(), theirs.once()
    assert here.shape == there.shape
    assert np.abs(here - there).max() <= 1e-5 * np.abs(there).max()
    assert (ours.flops() is None) == (part == "text")


def test_pictures_are_counted_as_their_steps_and_a_decoding(folder, tmp_path):
    def flops(part: str, steps: int) -> float:
        work = sides.Work(str(folder), part, 2, 32, steps, "float32", "none", None, 1, "")
        return sides.Jaxsd(work).flops()

    assert flops("image", 3) == 3 * flops("unet", 1) + flops("decode", 1)


@pytest.mark.parametrize("folder", ["sd1"], indirect=True)
@pytest.mark.parametrize("recipe", ["text-to-image", "progressive", "guided", "consistency"])
def test_a_step_of_each_side(folder, recipe, tmp_path):
    """Finite, and an optimizer behind it: the loss is another one at the second step."""
    work = sides.Work(str(folder), "train", 1, 32, 1, "float32", "none", recipe, 1, str(tmp_path))
    ours, theirs = training_sides.Jaxsd(work), training_sides.Diffusers(work, compiled=False)
    for side in (ours, theirs):
        first, second = (float(side.once()) for _ in range(2))
        assert math.isfinite(first) and first > 0 and first != second
    assert ours.flops() > 1e6
