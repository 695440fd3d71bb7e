"""Textual inversion against PyTorch: gradients of the new rows, and pictures with the saved word.

The reference is what diffusers' textual_inversion.py and textual_inversion_sdxl.py compute: the
text towers with the new tokens, `add_noise`, the UNet, the mean square error; of its gradient the
rows of the new tokens.
"""

import copy

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_torch
import torch
from safetensors.torch import load_file
from tiny_torch import SD, SIZE, quiet, whole
from torch_reference import nchw, normal, relative_error

import jaxsd
from jaxsd.components import load_parts
from jaxsd.objectives import Now
from jaxsd.objectives.text_to_image import TextToImage
from jaxsd.objectives.textual_inversion import ROWS, TextualInversion
from jaxsd.towers import Towers

# Named before they were looked at
TOLERANCE = 2e-5  # of the loss, and of each tower's gradient against its largest number
PICTURES = 1  # of 255, from rounding to whole numbers on both sides

# Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}
KEY = jax.random.key(7)
CAPTIONS = ["a <cat>", "a blue <cat> on white", "<cat>", "a <cat> and a <cat>"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module", params=["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def taught(request, tmp_path_factory):
    """diffusers' pipeline with the word that our training saved, our objective, its parameters."""
    family, folder = request.param, tmp_path_factory.mktemp("models")
    parts = tiny_torch.components(tmp_path_factory.mktemp("words"), family)
    plain = quiet(PIPELINES[family](**parts))
    plain.save_pretrained(folder / "theirs")
    ours = load_parts(folder / "theirs")
    base = TextToImage(
        ours.components["unet"].net.config,
        ours.schedule,
        Towers(ours.components, ours.tokenizers),
        zero_empty_prompt=ours.index.get("force_zeros_for_empty_prompt", False),
        caption_dropout=0.0,
        initial=ours.components["unet"].params,
    )
    objective = TextualInversion(base, "<cat>", "red", vectors=2)
    start = objective.init(KEY)
    params = {n: jnp.asarray(v + 0.5 * normal(*v.shape)) for n, v in start.items()}
    objective.export(params, folder / "word")
    theirs = [copy.deepcopy(plain) for _ in range(2 if family == "sd1" else 1)]
    if family == "sd1":
        theirs[0].load_textual_inversion(str(folder / "word"))
        theirs[1].load_textual_inversion(
            str(folder / "word"), weight_name="<cat>.safetensors", token="<cat>"
        )
    else:  # diffusers takes each tower's tensor by hand
        word = load_file(folder / "word" / "<cat>.safetensors")
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            tower, words = (getattr(theirs[0], f"{n}{end}") for n in ("text_encoder", "tokenizer"))
            theirs[0].load_textual_inversion(
                word[key], token="<cat>", text_encoder=tower, tokenizer=words
            )
    return family, folder, theirs, objective, params


def test_the_loss_and_the_gradient_of_every_row(taught, report):
    family, _, [theirs, *_], objective, params = taught
    image = np.tanh(normal(len(CAPTIONS), SIZE, SIZE, 3))
    ids = objective.tokenize(CAPTIONS)
    batch = {"image": jnp.asarray(image), "input_ids": jnp.asarray(ids)}
    gradient = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (ours, _), grads = gradient(params, objective.aux, batch, Now(KEY))
    assert grads.keys() == params.keys()

    # What our loss draws of its key, in the order in which it does
    key_latent, _, key = jax.random.split(KEY, 3)
    key_t, key_eps, _ = jax.random.split(key, 3)
    shape = (len(CAPTIONS), SIZE // 2, SIZE // 2, 4)
    drawn, eps = (nchw(np.asarray(jax.random.normal(k, shape))) for k in (key_latent, key_eps))
    times = objective.base.schedule.random_times(key_t, len(CAPTIONS), False)
    t = torch.from_numpy(np.array(times).astype(int))

    with torch.no_grad():
        moments = theirs.vae.encode(nchw(image)).latent_dist
    latents = (moments.mean + moments.std * drawn) * theirs.vae.config.scaling_factor
    towers = [theirs.text_encoder] + ([theirs.text_encoder_2] if family == "sdxl" else [])
    outputs = [
        tower(torch.from_numpy(ids[:, i]).long(), output_hidden_states=True)
        for i, tower in enumerate(towers)
    ]
    told = {}
    if family == "sdxl":
        states = torch.cat([out.hidden_states[-2] for out in outputs], -1)
        sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * len(CAPTIONS)).float()
        told = {"added_cond_kwargs": {"text_embeds": outputs[-1][0], "time_ids": sizes}}
    else:
        states = outputs[0][0]
    noisy = diffusers.DDPMScheduler(**SD).add_noise(latents, eps, t)
    loss = torch.nn.functional.mse_loss(theirs.unet(noisy, t, states, **told).sample, eps)
    loss.backward()
    report(abs(float(ours) - loss.item()) / loss.item(), TOLERANCE)
    names = ["text_encoder", "text_encoder_2"][: len(towers)]
    assert grads.keys() == {name + ROWS for name in names}
    for name, tower in zip(names, towers, strict=True):
        table = tower.get_input_embeddings().weight
        assert table.grad[-2:].abs().min() > 0  # every number has a say
        report(relative_error(grads[name + ROWS], table.grad[-2:]), TOLERANCE)


def test_the_saved_word_makes_the_same_pictures_there(taught):
    """In every form, and in ours whether it is added to the model or as the training has it."""
    family, folder, theirs, objective, params = taught
    prompts, seeds = ["a <cat>", "a blue <cat> on white"], [3, 4]
    options = {"guidance_scale": 3.0, "height": SIZE, "width": SIZE}
    made = whole(objective.pipeline(params)(prompts, seeds, steps=5, **options))
    here = jaxsd.load(folder / "theirs")
    before = whole(here(prompts, seeds, steps=5, **options))
    here.add_embedding(folder / "word")
    np.testing.assert_array_equal(whole(here(prompts, seeds, steps=5, **options)), made)
    assert np.abs(made - before).max() > 10 and made.std() > 10  # it does something, and not grey
    for pipe in theirs:
        noise = nchw(np.array(here.noise(seeds)))
        images = pipe(prompt=prompts, num_inference_steps=5, latents=noise, **options).images
        print("greatest difference", np.abs(whole(images) - made).max())
        assert np.abs(whole(images) - made).max() <= PICTURES
