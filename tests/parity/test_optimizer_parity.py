"""Optimizers move parameters as PyTorch's do, step by step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from transformers.optimization import Adafactor

from jaxsd import training
from jaxsd.training import Options
from jaxsd.training.step import _ema_decay

STEPS = 6
OPTIONS = Options(
    STEPS,
    learning_rate=0.02,
    warmup_steps=0,
    decay="constant",
    weight_decay=0.1,
    decayed=("*",),
    max_grad_norm=0.0,
    beta2=0.95,
)
# float32 on both sides, six steps of 0.02: rounding alone
TOLERANCE = 2e-6
SHAPES = {"tall": (160, 130), "wide": (130, 160), "small": (4, 6), "vector": (7,)}


def gradients() -> list[dict[str, np.ndarray]]:
    """The same for every step that both sides make: what they do with them is the matter."""
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.integers(-3, 2, STEPS)  # so that averages over steps count
    return [
        {n: np.float32(s * rng.normal(size=shape)) for n, shape in SHAPES.items()} for s in scale
    ]


def initial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def ours(options: Options, names=tuple(SHAPES)) -> dict[str, jax.Array]:
    """After so many updates, as `make_step` makes them."""
    optimizer = training.make_optimizer(options)
    params = {name: jnp.asarray(initial()[name]) for name in names}
    state = optimizer.init(params)
    for gradient in gradients():
        with jax.numpy_dtype_promotion("standard"):
            gradient = {name: jnp.asarray(gradient[name]) for name in names}
            updates, state = optimizer.update(gradient, state, params)
        params = {n: value + options.learning_rate * updates[n] for n, value in params.items()}
    return params


def theirs(make, names=tuple(SHAPES)) -> dict[str, np.ndarray]:
    params = {name: torch.nn.Parameter(torch.tensor(initial()[name])) for name in names}
    optimizer = make(list(params.values()))
    for gradient in gradients():
        for name, parameter in params.items():
            parameter.grad = torch.tensor(gradient[name])
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in params.items()}


def assert_close(got, want, tolerance=TOLERANCE):
    for name, value in want.items():
        assert np.abs(value - initial()[name]).max() > 1e-2
        np.testing.assert_allclose(got[name], value, atol=tolerance, err_msg=name)


def test_adamw():
    want = theirs(lambda p: torch.optim.AdamW(p, 0.02, (0.9, 0.95), 1e-8, weight_decay=0.1))
    assert_close(ours(OPTIONS), want)


def test_adafactor():
    # Matrices of less than 128 rows or columns are not factored here, but are there
    names = ("tall", "wide", "vector")
    switches = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    want = theirs(lambda p: Adafactor(p, 0.02, weight_decay=0.1, **switches), names)
    assert_close(ours(dataclasses.replace(OPTIONS, optimizer="adafactor"), names), want)


def test_muon_without_momentum(monkeypatch):
    """Orthogonalised alike for every shape, and scaled alike; PyTorch debiases no momentum."""
    # It iterates in bfloat16, which is no measure
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    names = ("tall", "wide", "small")
    want = theirs(lambda p: torch.optim.Muon(p, 0.02, 0.1, momentum=0.0), names)
    got = ours(dataclasses.replace(OPTIONS, optimizer="muon", momentum=0.0), names)
    # Five iterations in float32 multiply their rounding by (3.4445)^5 = 485 at most
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("power", [0.0, 2 / 3, 0.75])
def test_the_average_lengthens_as_in_diffusers(power):
    options = dataclasses.replace(OPTIONS, ema_decay=0.9, ema_power=power)
    model = EMAModel([], decay=0.9, use_ema_warmup=power > 0, power=power)
    steps = np.arange(1, 300)  # their first update copies; by the ratio ours takes nine tenths
    got = [float(_ema_decay(options, jnp.int32(step))) for step in steps]
    np.testing.assert_allclose(got, [model.get_decay(step + 1) for step in steps], atol=1e-6)
    assert got[0] < 0.45 and got[-1] == pytest.approx(0.9)
