"""The single files that we write, opened by diffusers; diffusers' folders, converted by us."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from test_single import make

from jaxsd import conversion
from jaxsd.components import load_parts, save_parts


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def model(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    parts = make(request.param, tiny.tokenizer(place / "tokenizer"))
    save_parts(parts, place / "folder")
    conversion.convert(place / "folder", place / "model.safetensors")
    return parts, place / "folder", place / "model.safetensors"


def test_diffusers_opens_the_file(model):
    parts, folder, file = model
    xl = "text_encoder_2" in parts.components
    kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    pipe = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    for name, component in parts.components.items():
        theirs = getattr(pipe, name).state_dict()
        theirs = {key.removeprefix("text_model."): value for key, value in theirs.items()}
        ours = {key.removeprefix("text_model."): v for key, v in component.params.items()}
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            np.testing.assert_array_equal(np.asarray(ours[key]), value.numpy(), err_msg=key)


def test_a_pickle_of_training(model, tmp_path):
    """A .ckpt as Lightning leaves it: half precision under "state_dict", averages, states."""
    parts, folder, file = model
    weights = {name: value.half() for name, value in load_file(file).items()}
    averages = {
        average_name(name): value + 1
        for name, value in weights.items()
        if name.startswith("model.diffusion_model.")
    }
    tables = {"betas": torch.linspace(0, 1, 10), "model_ema.decay": torch.tensor(0.5)}
    states = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}},
        "param_groups": [],
    }
    checkpoint = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": weights | averages | tables,
        "loops": None,
        "callbacks": {},
        "optimizer_states": [states],
        "lr_schedulers": [
            {"base_lrs": [1.0], "last_epoch": 3, "_last_lr": (1e-4,), "seen": {1, 2}}
        ],
    }
    torch.save(checkpoint, tmp_path / "a.ckpt")
    for use_ema in (False, True):
        read = load_parts(tmp_path / "a.ckpt", config=folder, use_ema=use_ema)
        for name, component in read.components.items():
            added = 1 if use_ema and name == "unet" else 0
            for key, value in component.params.items():
                expected = parts.components[name].params[key].astype(jnp.float16) + added
                np.testing.assert_array_equal(np.asarray(value), np.asarray(expected))


def average_name(name: str) -> str:
    """As diffusers' converter looks for a moving average."""
    return "model_ema." + "".join(name.split(".")[1:])
