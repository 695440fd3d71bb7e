"""What low-rank training leaves opens in diffusers: the file on the base makes the same picture."""

import diffusers
import jax
import numpy as np
import pytest
import tiny_torch
import torch
from tiny_torch import SIZE, quiet, whole
from torch_reference import nchw

import jaxsd
from jaxsd.objectives.low_rank import LowRank
from jaxsd.objectives.text_to_image import TextToImage
from jaxsd.towers import Towers
from jaxsd.weights import lora_files
from jaxsd.weights.lora import Layer, LoRA

TOLERANCE = 1  # of 255, from rounding to whole numbers on both sides
# Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS, SEEDS = tiny_torch.WORDS[:2], [3, 4]
TARGETS = ("attention", "feed-forward", "convs", "projections", "text-encoders")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> diffusers.StableDiffusionPipeline:
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    parts = tiny_torch.components(tmp_path_factory.mktemp("words"))
    return quiet(diffusers.StableDiffusionPipeline(**parts))


@pytest.fixture(scope="module")
def trained(theirs, tmp_path_factory):
    """The base as ours, and the folder that a low-rank training of it left."""
    folder = tmp_path_factory.mktemp("trained")
    theirs.save_pretrained(folder / "base", safe_serialization=True)
    ours = jaxsd.load(folder / "base")
    towers = Towers(ours.components, ours.tokenizers)
    inner = TextToImage(
        ours.unet.config, ours.schedule, towers, train_text=True, initial=ours.params["unet"]
    )
    key = jax.random.key(0)
    objective = LowRank(inner, inner.init(key), 3, 2.0, TARGETS)
    rng = np.random.default_rng(0)
    start = objective.init(key)
    params = {
        n: start[n] + 0.2 * rng.standard_normal(v.shape, np.float32) for n, v in start.items()
    }
    objective.export(params, folder / "model")
    return ours, folder / "model"


def their_pictures(pipe, ours) -> np.ndarray:
    noise = nchw(np.array(ours.noise(SEEDS)))
    asked = {"prompt": PROMPTS, "num_inference_steps": 10, "guidance_scale": 3.0}
    return whole(pipe(latents=noise, height=SIZE, width=SIZE, **asked).images)


@pytest.mark.parametrize("form", ["peft", pytest.param("kohya", marks=pytest.mark.slow)])
def test_the_file_on_the_base_makes_the_same_picture(theirs, trained, tmp_path, form):
    """Convolutions, linear layers and text encoder, with an alpha that is not the rank."""
    ours, folder = trained
    nets = {name: component.net for name, component in ours.components.items()}
    lora = lora_files.read(folder, nets)
    assert {layer.down.ndim for layer in lora.layers["unet"].values()} == {2, 4}
    assert all(layer.alpha == 2.0 and layer.rank == 3 for layer in lora.layers["unet"].values())
    file = folder if form == "peft" else lora_files.save(lora, tmp_path, form)

    made = jaxsd.load(folder)  # the merged weights
    expected = whole(made(PROMPTS, SEEDS, steps=10, guidance_scale=3.0, sampler="ddim"))
    plain = their_pictures(theirs, ours)
    theirs.load_lora_weights(str(file))
    added = their_pictures(theirs, ours)
    theirs.unload_lora_weights()
    print("greatest difference", np.abs(added - expected).max())
    assert np.abs(added - expected).max() <= TOLERANCE
    assert np.abs(added - plain).max() > 10 and added.std() > 10  # it does something, and not grey
    np.testing.assert_array_equal(their_pictures(theirs, ours), plain)


def test_the_merged_folder_opens_there(trained):
    ours, folder = trained
    pipe = quiet(diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True))
    expected = jaxsd.load(folder)(PROMPTS, SEEDS, steps=10, guidance_scale=3.0, sampler="ddim")
    assert np.abs(their_pictures(pipe, ours) - whole(expected)).max() <= TOLERANCE


def test_a_lora_of_a_vae_loads_there(theirs, tmp_path):
    """Into the VAE alone, as no pipeline of diffusers looks for one; untold it reads no header."""
    vae = theirs.vae
    shapes = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    rng = np.random.default_rng(0)
    layers = {}
    for name in ("decoder.conv_in.weight", "encoder.mid_block.attentions.0.to_q.weight"):
        out, *inside = shapes[name]
        down, up = rng.normal(size=(3, *inside)), rng.normal(size=(out, 3))
        layers[name] = Layer(down.astype(np.float32), up.astype(np.float32), 2.0)
    made = LoRA({"vae": layers})
    file = lora_files.save(made, tmp_path)
    before = {name: vae.state_dict()[name].clone() for name in layers}
    vae.load_lora_adapter(str(file), prefix="vae", use_safetensors=True)
    vae.fuse_lora()
    for name, layer in layers.items():
        base = before[name].numpy()
        change = 2 / 3 * (layer.up @ layer.down.reshape(3, -1)).reshape(base.shape)
        module = name.removesuffix(".weight")
        fused = vae.get_submodule(module).base_layer.weight.detach().numpy()
        np.testing.assert_allclose(fused, base + change, rtol=1e-5, atol=1e-5)
        assert np.abs(change).max() > 0.1
