"""Tiny ControlNets with random weights against diffusers', float32; alone and on a UNet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers import UNet2DConditionModel as TorchUNet
from test_unets import LATENTS, XL, conditions, for_torch
from torch_reference import nchw, nhwc, normal, randomise, relative_error, to_params

from jaxsd.models import ControlNet, ControlNetConfig, UNet
from jaxsd.nn import Net

SMALL = {"conditioning_embedding_out_channels": (4, 6, 8, 8)}
SD = dataclasses.replace(ControlNetConfig.from_unet(LATENTS), **SMALL)
SDXL = dataclasses.replace(ControlNetConfig.from_unet(XL), **SMALL)


class Pair:
    """A ControlNet here and in torch, and inputs for it."""

    def __init__(self, config, size=(8, 8), batch=2):
        torch.manual_seed(0)
        self.module = randomise(ControlNetModel.from_config(config.to_json()))
        self.net = Net(ControlNet(config))
        self.params = to_params(self.module, self.net)
        self.x, self.t = normal(batch, *size, 4), np.linspace(0.5, 990, batch, dtype=np.float32)
        pixels = [8 * side for side in size]
        rng = np.random.default_rng(2)
        self.picture = rng.random((batch, *pixels, config.conditioning_channels), np.float32)
        self.inputs = conditions(config, batch)

    def theirs(self, **kwargs):
        with torch.no_grad():
            down, mid = self.module(
                nchw(self.x),
                torch.from_numpy(self.t),
                controlnet_cond=nchw(self.picture),
                return_dict=False,
                **for_torch(self.inputs),
                **kwargs,
            )
        return [*down, mid]

    def ours(self, **kwargs):
        inputs = {"controlnet_cond": jnp.asarray(self.picture), **self.inputs}
        static = {k: kwargs.pop(k) for k in ("guess_mode",) if k in kwargs}
        predict = jax.jit(lambda params, *a, **k: self.net(params, *a, **k, **static))
        down, mid = predict(self.params, self.x, self.t, **inputs, **kwargs)
        return [*down, mid]


def compare(pair, report, **kwargs):
    ours, theirs = pair.ours(**kwargs), pair.theirs(**kwargs)
    assert len(ours) == len(theirs)
    report(max(relative_error(a, nhwc(b)) for a, b in zip(ours, theirs, strict=True)))


@pytest.mark.parametrize("size", [(8, 8), (9, 6)])
def test_controlnet(size, report):
    compare(Pair(SD, size), report)


def test_of_xl_and_scaled(report):
    compare(Pair(SDXL), report, conditioning_scale=0.7)


@pytest.mark.parametrize(
    "change",
    [
        {"controlnet_conditioning_channel_order": "bgr", "conditioning_channels": 3},
        {"global_pool_conditions": True},
        {"mid_block_type": "UNetMidBlock2D", "conditioning_channels": 1, "num_class_embeds": 3},
    ],
)
def test_other_options(change, report):
    compare(Pair(dataclasses.replace(SD, **change)), report, conditioning_scale=1.5)


def test_guess_mode(report):
    compare(Pair(SD), report, guess_mode=True, conditioning_scale=0.5)


def test_two_controlnets_on_a_unet(report):
    """As the pipelines add them up, with scales of their own."""
    torch.manual_seed(1)
    module = randomise(TorchUNet.from_config(LATENTS.to_json()))
    net, pair = Net(UNet(LATENTS)), Pair(SD, (9, 6))
    params = to_params(module, net)
    scales, theirs, ours = (0.5, 2.0), [], []
    for scale in scales:
        theirs.append(pair.theirs(conditioning_scale=scale))
        ours.append(pair.ours(conditioning_scale=scale))
        pair.picture = 1 - pair.picture
    theirs = [a + b for a, b in zip(*theirs, strict=True)]
    ours = [a + b for a, b in zip(*ours, strict=True)]
    with torch.no_grad():
        expected = module(
            nchw(pair.x),
            torch.from_numpy(pair.t),
            **for_torch(pair.inputs),
            down_block_additional_residuals=theirs[:-1],
            mid_block_additional_residual=theirs[-1],
        ).sample
    residuals = {"down_block_residuals": tuple(ours[:-1]), "mid_block_residual": ours[-1]}
    found = jax.jit(net.__call__)(params, pair.x, pair.t, **pair.inputs, **residuals)
    report(relative_error(found, nhwc(expected)))


def test_bfloat16():
    net = Net(ControlNet(SD))
    params = {n: jnp.asarray(0.1 * normal(*s), jnp.bfloat16) for n, s in net.shapes.items()}
    x, context = (jnp.asarray(normal(*s), jnp.bfloat16) for s in ((1, 8, 8, 4), (1, 77, 8)))
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention needs it
        picture = jnp.ones((1, 64, 64, 3))
        down, mid = jax.jit(net.__call__)(params, x, jnp.ones(1), picture, 1.0, context)
    for found in (*down, mid):
        assert found.dtype == jnp.bfloat16 and np.isfinite(np.asarray(found, np.float32)).all()
