"""The first stage of Imagic against PyTorch: the gradient of the loss with respect to what is told.

The reference is diffusers' UNet and `DDPMScheduler`: noise, velocity or the picture as its target.
"""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_torch
import torch
from tiny_torch import SD, SIZE
from torch_reference import nchw, normal, relative_error

import jaxsd
from jaxsd.objectives import Now
from jaxsd.objectives.imagic import Embedding, new_edit

TOLERANCE = 2e-5  # named before it was looked at: of the loss, and of the largest slope
KEY = jax.random.key(5)
ROWS = 4
PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}

# Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd1", "epsilon"),
        ("sd1", "v_prediction"),
        pytest.param("sdxl", "sample", marks=pytest.mark.slow),
    ],
)
def test_the_gradient_of_an_embedding(family, kind, tmp_path, report):
    theirs = PIPELINES[family](**tiny_torch.components(tmp_path / "words", family))
    theirs.save_pretrained(tmp_path / "model")
    pipe = jaxsd.load(tmp_path / "model")
    pipe.schedule = dataclasses.replace(pipe.schedule, prediction_type=kind)
    stage = Embedding(pipe, new_edit(pipe, tiny_torch.WORDS[0], (SIZE, SIZE)))
    x0 = np.repeat(normal(1, SIZE // 2, SIZE // 2, 4), ROWS, 0)

    def loss_of(params):
        return stage.loss(params, stage.aux, {"latents": jnp.asarray(x0)}, Now(KEY))[0]

    our_loss, our_slopes = jax.jit(jax.value_and_grad(loss_of))(stage.init(KEY))

    scheduler = diffusers.DDPMScheduler(**SD, prediction_type=kind)
    key_t, key_eps, _ = jax.random.split(KEY, 3)  # as our loss draws of its key
    noise = nchw(np.asarray(jax.random.normal(key_eps, x0.shape)))
    t = torch.from_numpy(np.array(pipe.schedule.random_times(key_t, ROWS, False)).astype(int))
    told = {n: torch.tensor(a, requires_grad=True) for n, a in stage.edit.target.items()}
    rows = {n: value.expand(ROWS, *value.shape[1:]) for n, value in told.items()}
    states = rows.pop("encoder_hidden_states")
    if family == "sdxl":
        sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]]).float()
        rows["time_ids"] = sizes.expand(ROWS, 6)
    latents = nchw(x0)
    said = theirs.unet(scheduler.add_noise(latents, noise, t), t, states, added_cond_kwargs=rows)
    target = {"epsilon": noise, "sample": latents}.get(kind)
    if target is None:
        target = scheduler.get_velocity(latents, noise, t)
    loss = torch.nn.functional.mse_loss(said.sample, target)
    loss.backward()

    report(abs(float(our_loss) - loss.item()) / loss.item(), TOLERANCE)
    assert our_slopes.keys() == told.keys()
    for name, value in told.items():
        assert value.grad is not None
        report(relative_error(our_slopes[name], value.grad), TOLERANCE)
