"""Pictures in, pictures out, against diffusers' pipelines: every task, images within 1/255.

Both sides get the same noise. The tiny VAE's encoder is sure of itself, because diffusers draws
from its Gaussian where we take the mean.
"""

import itertools
import json

import diffusers
import jax
import numpy as np
import pytest
import tiny_torch
import torch
from diffusers.pipelines.controlnet import pipeline_controlnet, pipeline_controlnet_sd_xl
from tiny_torch import SIZE, quiet, whole
from torch_reference import nchw, randomise

import jaxsd

TOLERANCE = 1  # of 255, from rounding to whole numbers on both sides

# Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS, NEGATIVES, SEEDS = ["a red seven on white", "a blue three"], ["blue", ""], [3, 4]
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for _ in SEEDS]
MASK = np.zeros((SIZE, SIZE), np.uint8)
MASK[3:13, 6:] = 255
CALL = dict(prompts=PROMPTS, seeds=SEEDS, steps=8, negative_prompt=NEGATIVES, guidance_scale=5.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()


KINDS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "heun": (diffusers.HeunDiscreteScheduler, {"timestep_spacing": "leading"}),
}


class Both:
    """A model as a folder that diffusers wrote, opened on both sides."""

    def __init__(self, folder, pipeline, scheduler="ddim", **options):
        self.parts = tiny_torch.components(folder, drawn=False, **options)
        kind, options = KINDS[scheduler]
        self.parts["scheduler"] = kind(**tiny_torch.SD, **options)
        self.theirs = quiet(pipeline(**self.parts))
        self.theirs.save_pretrained(folder / "model", safe_serialization=True)
        self.ours = jaxsd.load(folder / "model")

    def noise(self, monkeypatch) -> torch.Tensor:
        """The noise that ours starts from, for diffusers."""
        drawn = nchw(np.array(self.ours.noise(SEEDS)))
        module = type(self.theirs).__module__
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: drawn)
        return drawn

    def their_pictures(self, monkeypatch, **options) -> np.ndarray:
        self.noise(monkeypatch)
        call = dict(
            prompt=PROMPTS,
            negative_prompt=NEGATIVES,
            num_inference_steps=CALL["steps"],
            guidance_scale=CALL["guidance_scale"],
        )
        return whole(self.theirs(**call | options).images)

    def our_pictures(self, **options) -> np.ndarray:
        return whole(self.ours(**CALL | options))


def tensor(pictures) -> torch.Tensor:
    """In [0, 1], as diffusers' preprocessing takes tensors."""
    return nchw(np.stack(pictures).astype(np.float32) / 255)


def assert_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 10  # a picture, not one grey
    worst = int(np.abs(ours - theirs).max())
    print("greatest difference", worst)
    assert worst <= TOLERANCE


def assert_differ(a: np.ndarray, b: np.ndarray) -> None:
    """That the option does something here."""
    assert np.abs(a - b).max() > 5


@pytest.mark.parametrize(
    "scheduler, strength",
    [
        ("ddim", 0.3),
        ("ddim", 1.0),
        ("euler", 0.7),
        *(pytest.param(name, 0.7, marks=pytest.mark.slow) for name in KINDS if name != "euler"),
    ],
)
def test_image_to_image(tmp_path, monkeypatch, scheduler, strength):
    both = Both(tmp_path, diffusers.StableDiffusionImg2ImgPipeline, scheduler)
    assert both.ours.default_sampler == scheduler
    theirs = both.their_pictures(monkeypatch, image=tensor(PICTURES), strength=strength)
    ours = both.our_pictures(image=PICTURES, strength=strength)
    assert_equal(ours, theirs)
    if strength < 1:
        assert_differ(ours, both.our_pictures())


@pytest.mark.parametrize(
    "kind, scheduler, strength",
    [
        ("", "ddim", 0.6),
        ("", "euler", 1.0),
        ("inpaint", "ddim", 0.6),
        ("inpaint", "ddim", 1.0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("", "ddim", 1.0),
                ("", "euler", 0.6),
                ("", "dpmpp_2m", 0.6),
                ("inpaint", "pndm", 1.0),
            )
        ),
    ],
)
def test_inpainting(tmp_path, monkeypatch, kind, scheduler, strength):
    both = Both(tmp_path, diffusers.StableDiffusionInpaintPipeline, scheduler, kind=kind)
    mask = torch.from_numpy(MASK.astype(np.float32)[None, None] / 255).expand(2, -1, -1, -1)
    options = dict(image=tensor(PICTURES), mask_image=mask, strength=strength)
    theirs = both.their_pictures(monkeypatch, height=SIZE, width=SIZE, **options)
    ours = both.our_pictures(image=PICTURES, mask=MASK, strength=strength)
    assert_equal(ours, theirs)


def test_instruct_pix2pix(tmp_path, monkeypatch):
    both = Both(tmp_path, diffusers.StableDiffusionInstructPix2PixPipeline, kind="instruct")
    theirs = both.their_pictures(monkeypatch, image=tensor(PICTURES), image_guidance_scale=1.8)
    ours = both.our_pictures(image=PICTURES, image_guidance_scale=1.8)
    assert_equal(ours, theirs)
    assert_differ(ours, both.our_pictures(image=PICTURES, image_guidance_scale=1.0))
    # Without guidance: the prompt and the picture, once.
    for scales in ({"guidance_scale": 1.0}, {"image_guidance_scale": 0.5}):
        plain = both.their_pictures(monkeypatch, image=tensor(PICTURES), **scales)
        assert_equal(both.our_pictures(image=PICTURES, **scales), plain)


def our_noise(step: int) -> np.ndarray:
    """What a sampler here draws in a step: from each image's own key."""
    keys = [jax.random.fold_in(jax.random.key(seed), step + 1) for seed in SEEDS]
    draws = [jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 4)) for key in keys]
    return np.stack([np.array(draw) for draw in draws])


def test_lcm(tmp_path, monkeypatch):
    """The guidance scale goes into the network, which is called once."""
    parts = tiny_torch.components(tmp_path)
    parts["unet"] = tiny_torch.unet("", "sd1", time_cond_proj_dim=16)
    parts["scheduler"] = diffusers.LCMScheduler()
    theirs = quiet(diffusers.LatentConsistencyModelPipeline(**parts))
    theirs.save_pretrained(tmp_path / "model")
    ours = jaxsd.load(tmp_path / "model")
    assert ours.default_sampler == "lcm" and ours.guidance_embedded
    latents = nchw(np.array(ours.noise(SEEDS)))
    pictures = []
    for scale in (3.0, 8.0):
        steps = itertools.count()
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_lcm.randn_tensor",
            lambda *_, steps=steps, **__: nchw(our_noise(next(steps))),
        )
        call = dict(num_inference_steps=4, guidance_scale=scale)
        expected = whole(theirs(prompt=PROMPTS, latents=latents, **call).images)
        pictures.append(whole(ours(PROMPTS, SEEDS, steps=4, guidance_scale=scale)))
        assert_equal(pictures[-1], expected)
    assert_differ(*pictures)


@pytest.mark.parametrize("steps", [1, 4])
def test_turbo(tmp_path, monkeypatch, steps):
    """Guidance 0 is none, and the folder's scheduler spaces the steps from the last timestep."""
    parts = tiny_torch.components(tmp_path, "sd2")
    options = tiny_torch.SD | {"timestep_spacing": "trailing"}
    parts["scheduler"] = diffusers.EulerDiscreteScheduler(**options)
    theirs = quiet(diffusers.StableDiffusionPipeline(**parts))
    theirs.save_pretrained(tmp_path / "model")
    ours = jaxsd.load(tmp_path / "model")
    assert ours.default_sampler == "euler"
    latents = nchw(np.array(ours.noise(SEEDS)))
    call = dict(num_inference_steps=steps, guidance_scale=0.0)
    expected = whole(theirs(prompt=PROMPTS, latents=latents, **call).images)
    assert_equal(whole(ours(PROMPTS, SEEDS, steps=steps, guidance_scale=0.0)), expected)


def test_v_prediction(tmp_path):
    """As Stable Diffusion 2.1 at 768 px: DDIM, and a network that predicts v."""
    parts = tiny_torch.components(tmp_path, "sd2")
    options = tiny_torch.SD | {"clip_sample": False, "prediction_type": "v_prediction"}
    parts["scheduler"] = diffusers.DDIMScheduler(set_alpha_to_one=False, **options)
    theirs = quiet(diffusers.StableDiffusionPipeline(**parts))
    theirs.save_pretrained(tmp_path / "model")
    ours = jaxsd.load(tmp_path / "model")
    latents = nchw(np.array(ours.noise(SEEDS)))
    call = dict(prompt=PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=8)
    expected = whole(theirs(**call, guidance_scale=5.0, latents=latents).images)
    assert_equal(whole(ours(**CALL)), expected)


def test_xl_turbo(tmp_path, monkeypatch):
    """Euler with fresh noise after each step but the last, spaced from the last timestep."""
    parts = tiny_torch.components(tmp_path, "sdxl")
    options = tiny_torch.SD | {"timestep_spacing": "trailing"}
    parts["scheduler"] = diffusers.EulerAncestralDiscreteScheduler(**options)
    theirs = quiet(diffusers.StableDiffusionXLPipeline(**parts))
    theirs.save_pretrained(tmp_path / "model")
    ours = jaxsd.load(tmp_path / "model")
    assert ours.default_sampler == "euler_ancestral"
    steps = itertools.count()
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor",
        lambda *_, **__: nchw(our_noise(next(steps))),
    )
    latents = nchw(np.array(ours.noise(SEEDS)))
    call = dict(num_inference_steps=4, guidance_scale=0.0)
    expected = whole(theirs(prompt=PROMPTS, latents=latents, **call).images)
    assert_equal(whole(ours(PROMPTS, SEEDS, steps=4, guidance_scale=0.0)), expected)


# --- Stable Diffusion XL ----------------------------------------------------------------------


@pytest.mark.parametrize("negative", [NEGATIVES, None], ids=["negative", "none"])
def test_xl(tmp_path, monkeypatch, negative):
    both = Both(tmp_path, diffusers.StableDiffusionXLPipeline, family="sdxl")
    theirs = both.their_pictures(monkeypatch, negative_prompt=negative)
    ours = both.our_pictures(negative_prompt=negative)
    assert_equal(ours, theirs)
    empty = both.our_pictures(negative_prompt="")
    assert_differ(ours, empty)  # None is zeros, "" is text
    index = tmp_path / "model" / "model_index.json"
    values = json.loads(index.read_text())
    assert values.pop("force_zeros_for_empty_prompt")
    index.write_text(json.dumps(values))
    assert jaxsd.load(tmp_path / "model").zero_empty_prompt  # as diffusers has it where none says


def test_xl_sizes_and_clip_skip(tmp_path, monkeypatch):
    from jaxsd.conditioning import Sizes

    both = Both(tmp_path, diffusers.StableDiffusionXLPipeline, family="sdxl")
    options = dict(original_size=(30, 20), crops_coords_top_left=(5, 3), target_size=(11, 12))
    theirs = both.their_pictures(monkeypatch, clip_skip=1, **options)
    ours = both.our_pictures(clip_skip=1, sizes=Sizes((30, 20), (5, 3), (11, 12)))
    assert_equal(ours, theirs)
    assert_differ(ours, both.our_pictures(clip_skip=1))
    assert_differ(ours, both.our_pictures(sizes=Sizes((30, 20), (5, 3), (11, 12))))


@pytest.mark.parametrize("scheduler", ["euler", pytest.param("ddim", marks=pytest.mark.slow)])
def test_xl_base_then_refiner(tmp_path, monkeypatch, scheduler):
    xl, fine = diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLImg2ImgPipeline
    base = Both(tmp_path / "base", xl, scheduler, family="sdxl")
    refiner = Both(tmp_path / "fine", fine, scheduler, family="refiner")
    base.noise(monkeypatch)
    call = dict(prompt=PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=8)
    call |= dict(guidance_scale=CALL["guidance_scale"])
    latents = base.theirs(**call, denoising_end=0.6, output_type="latent").images
    theirs = whole(refiner.theirs(**call, image=latents, denoising_start=0.6).images)
    ours = whole(base.ours(**CALL, refiner=refiner.ours, refiner_start=0.6))
    assert_equal(ours, theirs)
    assert_differ(ours, whole(base.ours(**CALL)))


@pytest.mark.slow
def test_xl_image_to_image_and_inpainting(tmp_path, monkeypatch):
    both = Both(tmp_path / "a", diffusers.StableDiffusionXLImg2ImgPipeline, family="sdxl")
    theirs = both.their_pictures(monkeypatch, image=tensor(PICTURES), strength=0.6)
    assert_equal(both.our_pictures(image=PICTURES, strength=0.6), theirs)
    for kind in ("", "inpaint"):
        both = Both(
            tmp_path / f"b{kind}",
            diffusers.StableDiffusionXLInpaintPipeline,
            family="sdxl",
            kind=kind,
        )
        mask = torch.from_numpy(MASK.astype(np.float32)[None, None] / 255).expand(2, -1, -1, -1)
        theirs = both.their_pictures(
            monkeypatch, image=tensor(PICTURES), mask_image=mask, strength=0.7
        )
        assert_equal(both.our_pictures(image=PICTURES, mask=MASK, strength=0.7), theirs)


# --- ControlNet -------------------------------------------------------------------------------


def controlnet(unet, seed: int):
    torch.manual_seed(seed)
    net = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(4, 8), load_weights_from_unet=False
    )
    return randomise(net, seed, 0.3)


@pytest.mark.parametrize(
    "family, count",
    [
        ("sd1", 2),
        pytest.param("sd1", 1, marks=pytest.mark.slow),
        pytest.param("sdxl", 2, marks=pytest.mark.slow),
    ],
)
def test_controlnet(tmp_path, monkeypatch, family, count):
    parts = tiny_torch.components(tmp_path, family)
    nets = [controlnet(parts["unet"], 10 + i) for i in range(count)]
    xl = family == "sdxl"
    module = pipeline_controlnet_sd_xl if xl else pipeline_controlnet
    kind = (
        diffusers.StableDiffusionXLControlNetPipeline
        if xl
        else diffusers.StableDiffusionControlNetPipeline
    )
    theirs = quiet(kind(**parts, controlnet=nets if count > 1 else nets[0]))
    base = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    base(**parts).save_pretrained(tmp_path / "model")
    folders = []
    for i, net in enumerate(nets):
        folders.append(tmp_path / f"control-{i}")
        net.save_pretrained(folders[-1])
    ours = jaxsd.load(tmp_path / "model", controlnets=folders)

    drawn = nchw(np.array(ours.noise(SEEDS)))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: drawn)
    pictures, scales = [tensor([p]) for p in PICTURES[:count]], [0.7, 1.3][:count]
    expected = whole(
        theirs(
            prompt=PROMPTS,
            negative_prompt=NEGATIVES,
            num_inference_steps=8,
            guidance_scale=5.0,
            image=pictures if count > 1 else pictures[0],
            controlnet_conditioning_scale=scales if count > 1 else scales[0],
        ).images
    )
    call = CALL | {"control_images": PICTURES[:count]}
    assert_equal(whole(ours(**call, control_scales=scales)), expected)
    assert_differ(whole(ours(**call, control_scales=0.0)), expected)
