"""Whole pipelines against diffusers: its folders make the same pictures here, and ours there."""

import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_torch
import torch
from tiny_torch import SD, SIZE, quiet, whole
from torch_reference import nchw

import jaxsd
from jaxsd.components import Component
from jaxsd.diffusion.schedule import Schedule
from jaxsd.models import UNet, UNetConfig
from jaxsd.nn import Net
from jaxsd.pipeline import Pipeline

TOLERANCE = 1  # of 255, from rounding to whole numbers on both sides

# Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS, NEGATIVES = tiny_torch.WORDS[:2], ["blue", ""]
SEEDS = [3, 4]
SCHEDULERS = {
    "ddim": tiny_torch.scheduler(),
    "euler": diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SD),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def theirs(tmp_path_factory, request) -> diffusers.StableDiffusionPipeline:
    parts = tiny_torch.components(tmp_path_factory.mktemp("words"), request.param)
    return quiet(diffusers.StableDiffusionPipeline(**parts))


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def ours(folder) -> Pipeline:
    return jaxsd.load(folder)


def their_pictures(theirs, ours, scheduler=SCHEDULERS["ddim"], **options) -> np.ndarray:
    """From the latents that ours starts from, in whole numbers."""
    theirs.scheduler = scheduler
    images = theirs(
        prompt=PROMPTS,
        negative_prompt=NEGATIVES,
        num_inference_steps=10,
        latents=nchw(np.array(ours.noise(SEEDS))),
        height=SIZE,
        width=SIZE,
        **{"guidance_scale": 7.5} | options,
    ).images
    return whole(images)


def our_pictures(ours, sampler="ddim", **options) -> np.ndarray:
    images = ours(PROMPTS, SEEDS, steps=10, negative_prompt=NEGATIVES, sampler=sampler, **options)
    return whole(images)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape == (len(SEEDS), SIZE, SIZE, 3)
    assert a.std() > 10  # a picture, not one grey
    worst = int(np.abs(a - b).max())
    print("greatest difference", worst)
    return worst


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_the_same_pictures(ours, theirs, sampler):
    expected = their_pictures(theirs, ours, SCHEDULERS[sampler])
    assert difference(our_pictures(ours, sampler), expected) <= TOLERANCE
    plain = their_pictures(theirs, ours, SCHEDULERS[sampler], guidance_scale=1.0)
    assert difference(our_pictures(ours, sampler, guidance_scale=1.0), plain) <= TOLERANCE
    assert np.abs(plain - expected).max() > 10  # guidance does something here


@pytest.mark.parametrize("option", [{"guidance_rescale": 0.7}, {"clip_skip": 1}], ids=str)
def test_options(ours, theirs, option, monkeypatch):
    # transformers >= 5.6 did away with this name, which diffusers' clip_skip still looks for.
    if not hasattr(theirs.text_encoder, "text_model"):
        monkeypatch.setitem(theirs.text_encoder.__dict__, "text_model", theirs.text_encoder)
    expected = their_pictures(theirs, ours, **option)
    assert np.abs(expected - their_pictures(theirs, ours)).max() > 2  # it does something here
    assert difference(our_pictures(ours, **option), expected) <= TOLERANCE


def reopened(folder) -> diffusers.StableDiffusionPipeline:
    return quiet(diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True))


def test_what_we_save_opens_there(ours, theirs, tmp_path):
    ours.save(tmp_path / "model")
    again = reopened(tmp_path / "model")
    assert type(again.scheduler) is diffusers.DDIMScheduler
    expected = their_pictures(again, ours, again.scheduler)
    assert difference(our_pictures(ours), expected) <= TOLERANCE
    # Not a bit of the weights is lost on the way there and back.
    for name in ("unet", "vae", "text_encoder"):
        before, after = (getattr(pipe, name).state_dict() for pipe in (theirs, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_opens_there(ours, tmp_path, dtype):
    ours.save(tmp_path / "half", dtype=dtype)
    again = reopened(tmp_path / "half")
    ours_again = jaxsd.load(tmp_path / "half", dtype=jnp.float32)
    for name in ("unet", "vae", "text_encoder"):
        loaded = ours_again.params[name]
        for key, value in getattr(again, name).state_dict().items():
            key = key if key in loaded else f"text_model.{key}"
            np.testing.assert_array_equal(loaded[key], value.float().numpy())


def test_their_half_precision_folder_loads(ours, theirs, folder, tmp_path):
    theirs.save_pretrained(tmp_path / "variant", variant="fp16", safe_serialization=True)
    half = reopened(folder).to(torch.float16)
    half.save_pretrained(tmp_path / "half", safe_serialization=True)
    for name in ("half", "variant"):
        kept = jaxsd.load(tmp_path / name, dtype=None).params["unet"]["conv_in.weight"]
        assert kept.dtype == (jnp.float16 if name == "half" else jnp.float32)
        loaded = jaxsd.load(tmp_path / name).params
        for part, params in ours.params.items():
            assert loaded[part].keys() == params.keys()
            for key, value in params.items():
                assert loaded[part][key].dtype == jnp.float32
                np.testing.assert_allclose(loaded[part][key], value, rtol=1e-3, atol=1e-6)


# --- Pixel space -----------------------------------------------------------------------------

PIXELS = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    mid_block_type="UNetMidBlock2D",
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(4, 8),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=2,
    class_embed_type="simple_projection",
    projection_class_embeddings_input_dim=10,
)


def test_a_class_conditional_model_opens_there(tmp_path):
    net, rng = Net(UNet(PIXELS)), np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(0.2, 0.3, shape), jnp.float32)
        for name, shape in net.shapes.items()
    }
    schedule = Schedule(prediction_type="v_prediction")
    pipe = Pipeline(Component(net, params), schedule)
    pipe.save(tmp_path)

    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]

    classes, scale = ["seven", "3"], 3.0
    cond = torch.eye(10)[[7, 3]]
    x = nchw(np.array(pipe.noise(SEEDS)))
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            # diffusers insists on text, which a network without cross-attention does not read.
            said = [
                unet(x, t, encoder_hidden_states=torch.zeros(2, 1, 1), class_labels=labels).sample
                for labels in (torch.zeros_like(cond), cond)
            ]
            x = scheduler.step(said[0] + scale * (said[1] - said[0]), t, x).prev_sample
    expected = ((x / 2 + 0.5).clamp(0, 1) * 255).round().numpy()[:, 0].astype(int)
    images = pipe(classes, SEEDS, steps=10, guidance_scale=scale)
    ours = whole(images)
    print("greatest difference", np.abs(ours - expected).max())
    assert expected.std() > 10 and np.abs(ours - expected).max() <= TOLERANCE
