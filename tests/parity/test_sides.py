"""Both sides of benchmarks/beside.py do the same work."""

import itertools
import json
import math

import devices
import diffusers
import numpy as np
import pytest
import sides
import tiny_torch
import torch
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


def test_prompts_are_counted_by_hand(folder):
    """Of each layer four products of its width, two of its scores, two of the middle's width."""
    work = sides.Work(str(folder), "text", 3, 32, 1, "float32", "none", None, 1, "")
    total, xl = 0, (folder / "text_encoder_2").exists()
    for name in ("text_encoder", "text_encoder_2")[: 1 + xl]:
        config = json.loads((folder / name / "config.json").read_text())
        width, middle = config["hidden_size"], config["intermediate_size"]
        tokens, layers = config["max_position_embeddings"], config["num_hidden_layers"]
        if xl and name == "text_encoder":
            layers -= 1  # XL reads the states before the last one, and of this tower nothing else
        else:
            total += 3 * 2 * width * config["projection_dim"] * xl
        total += 3 * layers * tokens * 2 * (4 * width**2 + 2 * tokens * width + 2 * width * middle)
    assert sides.Jaxsd(work).flops() == total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_is_as_fast_as_its_fastest_product(dtype, monkeypatch):
    """Which is counted as two operations for each of the side's cubes, and timed alone."""
    monkeypatch.setattr(devices, "SIDE", 100)
    clock = itertools.count(0.0, 0.5)  # half a second for each look
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    side = devices.OnTorch(torch, 1, dtype)
    assert side.fastest() == 2 * 100**3 / 0.5


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
