"""Files that torch.save wrote, read without torch."""

import collections
import contextlib
import os

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxsd import weights
from jaxsd.errors import JaxsdError


def state_dict() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=rng)
    module = torch.nn.Linear(3, 2)
    return {
        "plain": torch.randn(4, 3, 2, 2, generator=rng),
        "half": torch.randn(5, generator=rng).half(),
        "bfloat16": torch.randn(2, 3, generator=rng).bfloat16(),
        "transposed": base.T,
        "part": base[2:4, 1:7:2],
        "shared": base,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": module.weight,
    }


SHAPES = {name: tuple(value.shape) for name, value in state_dict().items()}


def assert_same(params, expected):
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        assert params[name].dtype == jnp.dtype(str(value.dtype).removeprefix("torch."))
        np.testing.assert_array_equal(
            np.asarray(params[name], np.float64), value.detach().double().numpy()
        )


@pytest.mark.parametrize("protocol", [2, 4])
def test_views_of_every_kind(tmp_path, protocol):
    expected = state_dict()
    torch.save(expected, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    assert_same(weights.load(tmp_path, SHAPES), expected)


def test_a_module_and_a_training_checkpoint(tmp_path):
    module = torch.nn.Conv2d(3, 4, 3)
    shapes = {"weight": (4, 3, 3, 3), "bias": (4,)}
    torch.save(module.state_dict(), tmp_path / "module.bin")  # an OrderedDict with _metadata
    assert_same(weights.load(tmp_path / "module.bin", shapes), module.state_dict())
    checkpoint = {"epoch": 3, "global_step": 10**12, "lr": 1e-4, "state_dict": module.state_dict()}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert_same(weights.load(tmp_path / "last.ckpt", shapes), module.state_dict())


def refused(file, shapes=SHAPES) -> str:
    with pytest.raises(JaxsdError) as error:
        weights.load(file, shapes)
    assert "\n" not in str(error.value)
    return str(error.value)


def old(value, file):
    torch.save(value, file, _use_new_zipfile_serialization=False)


def test_the_format_of_before_1_6(tmp_path):
    expected = state_dict()
    old(expected, tmp_path / "pytorch_model.bin")
    assert_same(weights.load(tmp_path, SHAPES), expected)
    module = torch.nn.Conv2d(3, 4, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3, 3, 3)).sum().backward()
    optimizer.step()  # whose moments are storages that nobody asks for
    checkpoint = {"optimizer": optimizer.state_dict(), "state_dict": module.state_dict()}
    old(checkpoint, tmp_path / "last.ckpt")
    shapes = {"weight": (4, 3, 3, 3), "bias": (4,)}
    assert_same(weights.load(tmp_path / "last.ckpt", shapes), module.state_dict())


def test_a_damaged_file_of_before_1_6_is_refused(tmp_path):
    file = tmp_path / "a.bin"
    old({"weight": torch.ones(4, 3), "bias": torch.ones(5).half()}, file)
    whole = file.read_bytes()
    for length in range(20, len(whole), 7):
        file.write_bytes(whole[:length])
        assert "damaged" in refused(file, {"weight": (4, 3), "bias": (5,)})
    for place in range(16, len(whole) - 12 * 4 - 5 * 2, 3):  # up to the numbers themselves
        for bit in (1, 128):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            with contextlib.suppress(JaxsdError):  # some bytes mean nothing
                weights.load(file, {"weight": (4, 3), "bias": (5,)})


def test_nothing_in_a_file_of_before_1_6_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    old({"weight": torch.ones(2), "evil": Evil()}, tmp_path / "a.bin")
    assert f"{os.mkdir.__module__}.mkdir" in refused(tmp_path / "a.bin", {"weight": (2,)})
    assert not (tmp_path / "canary").exists()


def test_other_classes_are_refused_by_name(tmp_path):
    torch.save({"a": torch.zeros(2), "b": collections.Counter()}, tmp_path / "a.ckpt")
    assert "collections.Counter" in refused(tmp_path / "a.ckpt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    assert "torch.nn.modules.linear.Linear" in refused(tmp_path / "whole.pt")


def test_a_repeated_number_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.bin")
    assert "more entries than its storage" in refused(tmp_path / "a.bin", {"a": (1 << 40,)})


def test_whole_numbers_are_no_weights(tmp_path):
    torch.save({"a": torch.zeros(2, dtype=torch.int64)}, tmp_path / "a.bin")
    assert "not float32, float16 or bfloat16: a I64" in refused(tmp_path / "a.bin", {"a": (2,)})


def test_damaged_files(tmp_path):
    """Cut or flipped anywhere: an error of one line, or tensors of the right shape."""
    torch.save(state_dict(), tmp_path / "a.bin")
    whole, file = (tmp_path / "a.bin").read_bytes(), tmp_path / "b.bin"
    rng, refusals = np.random.default_rng(0), 0
    for trial in range(400):
        broken = bytearray(whole)
        if trial % 4 == 0:
            broken = broken[: rng.integers(len(whole))]
        else:
            for place in rng.integers(len(whole), size=1 + trial % 3):
                broken[place] ^= 1 << rng.integers(8)
        file.write_bytes(broken)
        try:
            params = weights.load(file, SHAPES)
        except JaxsdError as error:
            refusals += 1
            assert "\n" not in str(error)
        else:
            assert {name: value.shape for name, value in params.items()} == SHAPES
    assert refusals >= 100  # all the cuts
