"""Students as we save them, opened and sampled by diffusers: the same pictures, within 1/255."""

import dataclasses
import itertools

import diffusers
import numpy as np
import pytest
import tiny_torch
import torch
from test_task_pipelines import (
    MASK,
    PICTURES,
    PROMPTS,
    SEEDS,
    SIZE,
    assert_differ,
    assert_equal,
    our_noise,
    tensor,
)
from tiny_torch import quiet, whole
from torch_reference import nchw

import jaxsd
from jaxsd.compare.model import compare
from jaxsd.compare.trajectory import Sampled
from jaxsd.components import Component, make_net
from jaxsd.diffusion.jumps import student_schedule
from jaxsd.errors import GuidanceClipped

# Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
# diffusers wants steps_offset=1, which means nothing to trailing steps.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

SCHEDULERS = {"ddim": "DDIMScheduler", "lcm": "LCMScheduler"}
LCM, LCM_PICTURES = (
    diffusers.LatentConsistencyModelPipeline,
    diffusers.LatentConsistencyModelImg2ImgPipeline,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student that predicts v and is told the guidance scale, with each scheduler, by name."""
    place = tmp_path_factory.mktemp("students")
    parts = tiny_torch.components(place, drawn=False)
    parts["unet"] = tiny_torch.unet("", "sd1", time_cond_proj_dim=16)
    diffusers.StableDiffusionPipeline(**parts).save_pretrained(place / "teacher")
    pipe = jaxsd.load(place / "teacher")
    unet, schedule = pipe.components["unet"], pipe.schedule
    config = dataclasses.replace(unet.net.config, guidance_range=(1.0, 9.0))
    pipe.components["unet"] = Component(make_net(config), unet.params)
    for name, kind in SCHEDULERS.items():
        own = student_schedule(schedule, "v_prediction", kind)
        pipe.schedule = dataclasses.replace(own, default_steps=4, default_guidance_scale=3.0)
        pipe.save(place / name)
    return place


@pytest.fixture(scope="module", params=SCHEDULERS)
def student(request, folder):
    """(the sampler's name, its folder, our pipeline)"""
    return request.param, folder / request.param, jaxsd.load(folder / request.param)


def opened(kind, folder, ours, monkeypatch):
    """diffusers' pipeline, which draws the noise that ours draws."""
    theirs = quiet(kind.from_pretrained(folder, local_files_only=True))
    assert type(theirs.scheduler).__name__ == SCHEDULERS[folder.name]
    drawn, steps = nchw(np.array(ours.noise(SEEDS))), itertools.count()
    monkeypatch.setattr(f"{kind.__module__}.randn_tensor", lambda *_, **__: drawn)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor",
        lambda *_, **__: nchw(our_noise(next(steps))),
    )
    return theirs


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_pictures_from_prompts(student, steps, monkeypatch):
    name, folder, ours = student
    assert ours.default_sampler == name and ours.guidance_embedded
    kinds = [diffusers.StableDiffusionPipeline, *([LCM] if name == "lcm" else [])]
    call = dict(prompt=PROMPTS, num_inference_steps=steps, guidance_scale=3.0)
    pictures = whole(ours(PROMPTS, SEEDS, steps=steps))  # 3 is what it is made for
    for kind in kinds:
        assert_equal(pictures, whole(opened(kind, folder, ours, monkeypatch)(**call).images))
    assert_differ(pictures, whole(ours(PROMPTS, SEEDS, steps=steps, guidance_scale=8.0)))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(student, strength, monkeypatch):
    name, folder, ours = student
    kind = LCM_PICTURES if name == "lcm" else diffusers.StableDiffusionImg2ImgPipeline
    theirs = opened(kind, folder, ours, monkeypatch)
    call = dict(prompt=PROMPTS, num_inference_steps=4, guidance_scale=3.0)
    expected = whole(theirs(**call, image=tensor(PICTURES), strength=strength).images)
    pictures = whole(ours(PROMPTS, SEEDS, image=PICTURES, strength=strength))
    assert_equal(pictures, expected)
    if strength < 1:
        assert_differ(pictures, whole(ours(PROMPTS, SEEDS)))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting(folder, strength, monkeypatch):
    ours = jaxsd.load(folder / "ddim")
    theirs = opened(diffusers.StableDiffusionInpaintPipeline, folder / "ddim", ours, monkeypatch)
    mask = torch.from_numpy(MASK.astype(np.float32)[None, None] / 255).expand(2, -1, -1, -1)
    call = dict(prompt=PROMPTS, num_inference_steps=4, guidance_scale=3.0, strength=strength)
    pictures = dict(image=tensor(PICTURES), mask_image=mask, height=SIZE, width=SIZE)
    expected = whole(theirs(**call, **pictures).images)
    assert_equal(
        whole(ours(PROMPTS, SEEDS, image=PICTURES, mask=MASK, strength=strength)), expected
    )


def test_compare_asks_a_student_for_a_scale_that_it_was_taught(folder):
    how = Sampled(2, guidance_scale=20.0)
    with pytest.warns(GuidanceClipped, match="20 is taken"):
        report = compare(folder / "ddim", components=[], dtypes=["float32"], sampled=how)
    (trajectory,) = report.sections
    assert report.agrees and len(trajectory.rows["float32"]) == 2
    assert "guidance 9;" in trajectory.about


def test_weights_in_eight_bits_are_ordinary_ones_when_they_are_saved(folder, tmp_path, monkeypatch):
    jaxsd.load(folder / "ddim").save(tmp_path / "int8", "int8")
    ours = jaxsd.load(tmp_path / "int8")
    with pytest.raises(OSError, match="no file named"):  # rather than take int8 for weights
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "int8" / "unet")
    ours.save(tmp_path / "ddim")
    theirs = opened(diffusers.StableDiffusionPipeline, tmp_path / "ddim", ours, monkeypatch)
    expected = whole(theirs(prompt=PROMPTS, num_inference_steps=4, guidance_scale=3.0).images)
    assert_equal(whole(ours(PROMPTS, SEEDS)), expected)
