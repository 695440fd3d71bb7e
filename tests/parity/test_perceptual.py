"""LPIPS against its definition in plain torch, from files of every kind that people have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from perceptual_reference import SMALL, Reference, vgg
from torch_reference import nchw, nhwc, randomise, relative_error

from jaxsd import weights
from jaxsd.errors import JaxsdError
from jaxsd.models.perceptual import CHANNELS, LPIPS
from jaxsd.nn import Net
from jaxsd.weights.lpips import load_lpips

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return randomise(Reference(), 0, 0.2)


@pytest.fixture(scope="module")
def net():
    return Net(LPIPS(SMALL))


@pytest.fixture(scope="module")
def params(reference, net):
    return {name: jnp.array(value.numpy()) for name, value in reference.state_dict().items()}


@pytest.fixture(scope="module")
def slope(net):
    """The distances' sum and themselves, and the gradient by the second pictures."""

    def total(params, x, y):
        found = net(params, x, y)
        return found.sum(), found

    return jax.jit(jax.value_and_grad(total, 2, has_aux=True))


def pictures():
    return np.random.default_rng(0).uniform(-1, 1, (2, 3, 24, 37, 3)).astype(np.float32)


def test_the_full_size_has_torchvisions_and_lpips_names():
    net = Net(LPIPS())
    shapes = {f"features.{n}": tuple(v.shape) for n, v in vgg(CHANNELS).state_dict().items()}
    heads = {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(CHANNELS)}
    assert net.shapes == shapes | heads
    assert net.size == 14_714_688 + 1_472  # VGG16's convolutions, the heads


def test_distances_and_gradients(reference, slope, params, report):
    ours, theirs = (jnp.asarray(p) for p in pictures()), [nchw(p) for p in pictures()]
    theirs[1].requires_grad_()
    distance = reference(*theirs)
    distance.sum().backward()
    (_, found), gradient = slope(params, *ours)
    report(relative_error(found, distance), TOLERANCE)
    report(relative_error(gradient, nhwc(theirs[1].grad)), TOLERANCE)


def test_equal_pictures_and_dead_features(slope, params):
    dead = {n: jnp.zeros_like(v) if n.startswith("features") else v for n, v in params.items()}
    picture, other = map(jnp.asarray, pictures())
    assert np.all(np.abs(slope(params, picture, picture)[0][1]) < 1e-12)
    assert np.all(np.asarray(slope(dead, picture, other)[1]) == 0)  # where torch has 0/0


def sliced(state):
    """lpips' own names."""
    slices = {f"features.{n}": f"net.slice{k + 1}.{n}" for k, first in enumerate((0, 4, 9, 16, 23))
              for n in range(first, 30)}  # fmt: skip
    return {
        ".".join([slices.get(".".join(parts[:2]), ".".join(parts[:2])), *parts[2:]]): value
        for parts, value in ((name.split("."), value) for name, value in state.items())
    }


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", ["pair", "lpips", "ldm"])
def test_files(reference, net, params, kind, legacy, tmp_path):
    state = reference.state_dict()
    of = {"lin": {}, "features": {"classifier.0.weight": torch.ones(2, 2)}}
    for name, value in state.items():
        of["lin" if name.startswith("lin") else "features"][name] = value
    one = sliced(state) | {"scaling_layer.shift": torch.ones(1, 3, 1, 1)}
    if kind == "ldm":
        one = {f"loss.perceptual_loss.{name}": value for name, value in one.items()}
        one = {"state_dict": one | {"encoder.conv_in.bias": torch.ones(3)}}
    else:
        one |= {name.replace("lin", "lins."): value for name, value in of["lin"].items()}
    files = [*of.values()] if kind == "pair" else [one]
    paths = [tmp_path / f"{i}.pth" for i in range(len(files))]
    for path, held in zip(paths, files, strict=True):
        torch.save(held, path, _use_new_zipfile_serialization=not legacy)
    loaded = load_lpips(paths, net)
    assert loaded.keys() == params.keys()
    assert all(np.array_equal(loaded[name], params[name]) for name in params)


def test_files_that_do_not_do(net, params, tmp_path):
    heads = {name: value for name, value in params.items() if name.startswith("lin")}
    weights.save(heads, tmp_path / "heads.safetensors")
    weights.save({"conv_in.bias": jnp.ones(3)}, tmp_path / "vae.safetensors")
    for names, said in {
        ("heads",): "lacks VGG16",
        ("heads", "heads"): "lin0.model.1.weight again",
        ("vae",): "neither VGG16",
    }.items():
        with pytest.raises(JaxsdError, match=said):
            load_lpips([tmp_path / f"{name}.safetensors" for name in names], net)
