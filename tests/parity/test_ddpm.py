"""Pixel models saved by diffusers: opened here, they sample the same pictures."""

import dataclasses

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_unets import DDPM
from torch_reference import nchw, nhwc, normal, randomise, relative_error

import jaxsd
from jaxsd.errors import JaxsdError

# Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Of a whole loop, as in test_schedulers. PyTorch's own rounding, against float64, is 6e-6 here: the
# first step divides what the network says by alpha, 0.06.
LOOP_TOLERANCE = 1e-4


@pytest.mark.parametrize("classes", [None, 4])
def test_a_folder_of_diffusers(classes, tmp_path, report):
    config = dataclasses.replace(DDPM, sample_size=8, num_class_embeds=classes)
    torch.manual_seed(0)
    module = randomise(diffusers.UNet2DModel.from_config(config.to_json()))
    scheduler = diffusers.DDIMScheduler()
    diffusers.DDIMPipeline(module, scheduler).save_pretrained(tmp_path / "theirs")

    pipe = jaxsd.load(tmp_path / "theirs")
    assert pipe.unet.config == config and pipe.default_size == (8, 8)
    x = normal(2, 8, 8, 3)
    conditioning = pipe.encode(["2", "three"] if classes else ["", ""])
    ours = pipe.denoise(jnp.asarray(x), conditioning, None, steps=4, sampler="ddim")

    labels, y = torch.tensor([2, 3]) if classes else None, nchw(x)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            said = module(y, t, class_labels=labels).sample
            y = scheduler.step(said, t, y).prev_sample
    report(relative_error(ours, nhwc(y)), LOOP_TOLERANCE)

    # Guidance away from no class; saved and opened again, the same.
    prompts = ["1", ""] if classes else ["", ""]
    pictures = pipe(prompts, seeds=[0, 1], steps=2)
    pipe.save(tmp_path / "ours")
    again = jaxsd.load(tmp_path / "ours")(prompts, seeds=[0, 1], steps=2)
    for one, other in zip(pictures, again, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert diffusers.DDIMPipeline.from_pretrained(tmp_path / "ours").unet.config.in_channels == 3
    with pytest.raises(JaxsdError, match="knows 0 to 3" if classes else "knows no classes"):
        pipe.encode(["7"])
