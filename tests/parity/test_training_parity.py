"""Fine-tuning against PyTorch: the loss, every gradient, and what is exported, for SD and for XL.

The reference is what diffusers' train_text_to_image.py and train_text_to_image_sdxl.py compute:
`add_noise`, the UNet, the noise or `get_velocity` as its target, the mean square error.
"""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_torch
import torch
from tiny_torch import SD, SIZE, quiet, whole
from torch_reference import nchw, normal, relative_error

import jaxsd
from jaxsd.components import load_parts
from jaxsd.objectives import Now
from jaxsd.objectives.text_to_image import TextToImage
from jaxsd.towers import Towers

# Named before they were looked at: of the loss, and of gradients against the largest of them all.
TOLERANCE = 1e-5
PICTURES = 1  # of 255, from rounding to whole numbers on both sides

# Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}
# What the networks predict, and how the noise ends
SCHEDULES = {
    "sd1": {"prediction_type": "epsilon"},
    "sdxl": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}
KEY = jax.random.key(5)
ROWS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def both(request, tmp_path_factory):
    """A pipeline of diffusers, and our objective made of the folder that it saved."""
    family = request.param
    parts = tiny_torch.components(tmp_path_factory.mktemp("words"), family)
    theirs = quiet(PIPELINES[family](**parts))
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    parts = load_parts(folder)
    objective = TextToImage(
        parts.components["unet"].net.config,
        dataclasses.replace(parts.schedule, **SCHEDULES[family]),
        Towers(parts.components, parts.tokenizers),
        zero_empty_prompt=parts.index.get("force_zeros_for_empty_prompt", False),
        cached=True,
        caption_dropout=0.0,
        initial=parts.components["unet"].params,
    )
    return family, theirs, objective


def their_states(theirs, family: str) -> dict[str, torch.Tensor]:
    """The embeddings of the captions, as the training scripts make them."""
    states, pooled = [], None
    towers = [(theirs.tokenizer, theirs.text_encoder)]
    if family == "sdxl":
        towers.append((theirs.tokenizer_2, theirs.text_encoder_2))
    for words, tower in towers:
        ids = words(
            tiny_torch.WORDS,
            padding="max_length",
            max_length=words.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            out = tower(ids, output_hidden_states=True)
        states.append(out.hidden_states[-2] if family == "sdxl" else out[0])
        pooled = out[0]
    told = {"encoder_hidden_states": torch.cat(states, -1)}
    return told | {"text_embeds": pooled} if family == "sdxl" else told


@pytest.fixture(scope="module")
def batch(both):
    """Cached latents of four captions, as arrays."""
    family, theirs, _ = both
    shape = ROWS, SIZE // 2, SIZE // 2, 4
    made = {name: value.numpy() for name, value in their_states(theirs, family).items()}
    made |= {"mean": normal(*shape), "logvar": normal(*shape) - 2}
    if family == "sdxl":
        made |= {
            "original_size": np.array([[64, 48], [16, 16], [20, 40], [99, 7]], np.int32),
            "crop": np.array([[0, 3], [0, 0], [5, 0], [1, 2]], np.int32),
            "target_size": np.full((ROWS, 2), SIZE, np.int32),
        }
    return made


@pytest.fixture(scope="module")
def ours(both, batch):
    """Our loss and its gradients."""
    _, _, objective = both
    gradient = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    (loss, _), grads = gradient(objective.initial, objective.aux, arrays, Now(KEY))
    return float(loss), grads


def test_captions_are_read_as_the_scripts_read_them(both, report):
    family, theirs, objective = both
    towers = objective.towers
    ours = towers.states(towers.params, jnp.asarray(towers.tokenize(tiny_torch.WORDS)))
    wanted = their_states(theirs, family)
    assert ours.keys() == wanted.keys()
    for name in wanted:
        report(relative_error(ours[name], wanted[name]), TOLERANCE)


def test_the_loss_and_every_gradient(both, batch, ours, report):
    family, theirs, objective = both
    scheduler = diffusers.DDPMScheduler(**SD | SCHEDULES[family])
    # What our loss draws of its key, in the order in which it does
    key_latent, _, key = jax.random.split(KEY, 3)
    key_t, key_eps, _ = jax.random.split(key, 3)
    drawn = np.asarray(jax.random.normal(key_latent, batch["mean"].shape))
    noise = nchw(np.asarray(jax.random.normal(key_eps, batch["mean"].shape)))
    times = np.array(objective.schedule.random_times(key_t, ROWS, False)).astype(int)
    t = torch.from_numpy(times)
    latents = nchw(batch["mean"] + np.exp(batch["logvar"] / 2) * drawn)
    latents = latents * theirs.vae.config.scaling_factor

    unet = theirs.unet.train()
    unet.zero_grad()
    told = {name: torch.from_numpy(batch[name]) for name in objective.aux["empty"]}
    states = told.pop("encoder_hidden_states")
    if family == "sdxl":
        sizes = [batch[name] for name in ("original_size", "crop", "target_size")]
        told["time_ids"] = torch.from_numpy(np.concatenate(sizes, 1)).float()
    noisy = scheduler.add_noise(latents, noise, t)
    said = unet(noisy, t, states, added_cond_kwargs=told).sample
    predicts_noise = scheduler.config.prediction_type == "epsilon"
    target = noise if predicts_noise else scheduler.get_velocity(latents, noise, t)
    loss = torch.nn.functional.mse_loss(said.float(), target.float(), reduction="mean")
    loss.backward()

    our_loss, our_grads = ours
    report(abs(our_loss - loss.item()) / loss.item(), TOLERANCE)
    grads = {name: p.grad.numpy() for name, p in unet.named_parameters()}
    assert our_grads.keys() == grads.keys()
    largest = max(np.abs(g).max() for g in grads.values())
    errors = {n: np.abs(np.asarray(our_grads[n]) - grads[n]).max() / largest for n in grads}
    worst = max(errors, key=lambda name: errors[name])
    print(len(grads), "gradients, the worst that of", worst)
    report(float(errors[worst]), TOLERANCE)


def test_a_fine_tuned_model_makes_the_same_pictures_there(both, ours, tmp_path):
    family, theirs, objective = both
    _, grads = ours
    tuned = {n: p - 0.02 * grads[n] for n, p in objective.initial.items()}
    objective.export(tuned, tmp_path / "model")
    here = jaxsd.load(tmp_path / "model")
    there = quiet(PIPELINES[family].from_pretrained(tmp_path / "model", local_files_only=True))
    for name, value in SCHEDULES[family].items():
        assert there.scheduler.config[name] == value
    weights = dict(there.unet.named_parameters())
    for name, value in tuned.items():
        np.testing.assert_array_equal(weights[name].detach().numpy(), value, name)

    prompts, seeds = tiny_torch.WORDS[:2], [3, 4]
    options = {"height": SIZE, "width": SIZE, "guidance_scale": 3.0}
    images = there(
        prompt=prompts, num_inference_steps=5, latents=nchw(np.array(here.noise(seeds))), **options
    ).images
    expected = whole(images)
    assert expected.std() > 10  # a picture, not one grey
    got = whole(here(prompts, seeds, steps=5, **options))
    assert np.abs(got - expected).max() <= PICTURES
