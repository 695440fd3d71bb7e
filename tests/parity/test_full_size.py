"""Stable Diffusion 1.5 at full size, random weights, float32: relative error to torch <= 1e-4.

    pytest -m full_size tests/parity/test_full_size.py -s

takes a few minutes on a CPU, and 10 GB for the UNet.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL as TorchVAE
from diffusers import UNet2DConditionModel as TorchUNet
from torch_reference import nchw, nhwc, randomise, relative_error, to_params

from jaxsd.models import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet, UNetConfig, VAEConfig
from jaxsd.nn import Net

pytestmark = pytest.mark.full_size

TOLERANCE = 1e-4


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def build(cls, config):
    """A torch model with random weights; the small noise keeps activations at a natural size."""
    torch.manual_seed(0)
    module = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    return randomise(module, scale=0.005)


@pytest.fixture
def compare(record_property):
    """Runs torch, then jax, and holds the relative error to the tolerance."""

    def run(torch_forward, net, params, *inputs, **kwargs):
        start = time.perf_counter()
        with torch.inference_mode():
            expected = torch_forward()
        torch_done = time.perf_counter()
        # Parameters are arguments of the program, not constants in it.
        program = jax.jit(lambda params, *inputs: net(params, *inputs, **kwargs))
        ours = np.asarray(program(params, *map(jnp.asarray, inputs)))
        jax_done = time.perf_counter()
        error = relative_error(ours, expected)
        seconds = f"torch {torch_done - start:.1f} s, jax {jax_done - torch_done:.1f} s (compiling)"
        print(f"worst relative error {error:.2e}; {seconds}")
        record_property("relative_error", error)
        assert np.isfinite(ours).all() and error <= TOLERANCE

    return run


def test_unet(compare):
    config = UNetConfig(sample_size=64, cross_attention_dim=768)
    module = build(TorchUNet, config.to_json())
    net = Net(UNet(config))
    params = to_params(module, net)
    x, context, t = normal(1, 64, 64, 4), normal(1, 77, 768), np.array([501.0], np.float32)

    def forward():
        return nhwc(module(nchw(x), torch.from_numpy(t), torch.from_numpy(context)).sample)

    compare(forward, net, params, x, t, context)


def test_vae_decoder(compare):
    module = build(TorchVAE, VAEConfig().to_json())
    net = Net(AutoencoderKL(VAEConfig()))
    latents = normal(1, 64, 64, 4)
    params = to_params(module, net)
    compare(
        lambda: nhwc(module.decode(nchw(latents)).sample), net, params, latents, method="decode"
    )


def test_text_tower(compare):
    config = CLIPTextConfig()
    module = build(
        transformers.CLIPTextModel, transformers.CLIPTextConfig.from_dict(config.to_json())
    )
    net = Net(CLIPTextModel(config))
    ids = np.random.default_rng(0).integers(1, 49406, (2, 77)).astype(np.int32)
    ids[0, 5:] = ids[1, 40:] = 49407
    params = to_params(module, net, "text_model.")
    compare(lambda: module(torch.from_numpy(ids).long()).last_hidden_state, net, params, ids)
