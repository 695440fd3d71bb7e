"""LoRA files that do not fit, or are broken: one line says why, and nothing else happens."""

import json

import numpy as np
import pytest
from lora_examples import CONV, NETS, PROJ, K, Q, example, factors, tensors_of, write

from jaxsd.errors import JaxsdError
from jaxsd.weights import lora_files
from jaxsd.weights.lora import LoRA

STEM = f"unet.{Q.removesuffix('.weight')}"
DOWN, UP = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"


@pytest.fixture(scope="module")
def tensors(tmp_path_factory) -> dict[str, np.ndarray]:
    return tensors_of(lora_files.save(example(), tmp_path_factory.mktemp("lora")))


def refused(path, nets=NETS) -> str:
    with pytest.raises(JaxsdError) as error:
        lora_files.read(path, nets)
    assert "\n" not in str(error.value)
    return str(error.value)


def refused_tensors(tmp_path, tensors, metadata=None) -> str:
    return refused(write(tmp_path / "a.safetensors", tensors, metadata))


def test_everything_amiss_is_told_at_once(tmp_path, tensors):
    stem = f"unet.{CONV.removesuffix('.weight')}"
    wrong = tensors | {
        "unet.nowhere.lora_A.weight": np.zeros((2, 8), "f4"),
        "stray": np.zeros(3, "f4"),
        DOWN: np.zeros((2, 9), "f4"),
        f"{stem}.alpha": np.float32(np.nan),
        f"unet.{PROJ.removesuffix('.weight')}.lora_B.weight": None,
    }
    wrong = {name: value for name, value in wrong.items() if value is not None}
    message = refused_tensors(tmp_path, wrong)
    assert "2 unexpected: unet.nowhere.lora_A.weight, stray" in message
    assert f"1 without one of the two factors: {PROJ}" in message
    assert f"1 misshapen: {Q} [8, 8] by down [2, 9], up [8, 2]" in message
    assert f"1 no finite number: {stem}.alpha" in message


@pytest.mark.parametrize(
    "changes, told",
    [
        ({DOWN: np.zeros((0, 8), "f4"), UP: np.zeros((8, 0), "f4")}, "misshapen"),  # rank 0
        ({DOWN: np.zeros((3, 8), "f4")}, "misshapen"),  # two ranks
        ({DOWN: np.zeros((8, 2), "f4"), UP: np.zeros((2, 8), "f4")}, "misshapen"),  # turned
        ({DOWN: np.zeros((), "f4")}, "misshapen"),
        ({UP: np.zeros((), "f4")}, "misshapen"),
        ({DOWN: np.zeros((2, 8), "i4")}, "not float32, float16 or bfloat16"),
        ({f"{STEM}.alpha": np.zeros(2, "f4")}, "misshapen"),
        ({f"{STEM}.alpha": np.float32(np.inf)}, "no finite number"),
        ({f"{STEM}.lora_magnitude_vector": np.zeros(9, "f4")}, "misshapen"),
        ({f"{STEM}.lora.down.weight": np.zeros((2, 8), "f4")}, "1 unexpected"),  # once more
        ({f"{STEM}.lora_B.bias": np.zeros(8, "f4")}, "holds biases"),
        ({f"{STEM}.dora_scale": np.zeros((8, 1), "f4")}, "DoRA under kohya's names"),
        ({f"{STEM}.hada_w1_a": np.zeros((8, 1), "f4")}, "LoHa"),
        ({f"{STEM}.lokr_w1": np.zeros((8, 1), "f4")}, "LoKr"),
        ({f"{STEM}.diff": np.zeros((8, 8), "f4")}, "differences of whole weights"),
        (
            {"lora_te2_text_projection.lora_up.weight": np.zeros((8, 2), "f4")},
            "Stable Diffusion XL",
        ),
        ({"transformer.a.lora_A.weight": np.zeros((2, 2), "f4")}, "such as Stable Diffusion 3"),
    ],
)
def test_one_thing_amiss(tmp_path, tensors, changes, told):
    assert told in refused_tensors(tmp_path, tensors | changes)


@pytest.mark.parametrize(
    "width, family", [(768, "1.x"), (1024, "2.x"), (2048, "XL"), (1280, "the refiner")]
)
def test_another_family_is_named(tmp_path, width, family):
    file = lora_files.save(LoRA({"unet": {K: factors((320, width))}}), tmp_path)
    message = refused(file)
    assert family in message and "this model is a model with text states of 8 channels" in message
    assert "none that reads text" in refused(file, {"unet": {"conv_in.weight": (8, 1, 3, 3)}})


def test_what_is_no_lora(tmp_path, tensors):
    message = refused_tensors(tmp_path, {"conv.weight": np.zeros((2, 2), "f4")})
    assert "is not a LoRA: none of its 1 names" in message
    assert "cannot read" in refused(tmp_path / "nowhere.safetensors")
    (tmp_path / "empty").mkdir()
    assert "there is none" in refused(tmp_path / "empty")
    for name in "ab":
        write(tmp_path / "empty" / f"{name}.safetensors", tensors)
    assert "name one of its files (a.safetensors, b.safetensors)" in refused(tmp_path / "empty")
    with pytest.raises(JaxsdError, match="unknown form of LoRA 'webui'; there are peft and kohya"):
        lora_files.save(example(), tmp_path, "webui")


@pytest.mark.parametrize(
    "config",
    [
        {"unet.lora_alpha": "much"},
        {"unet.lora_alpha": None},
        {"unet.lora_alpha": 1e400},
        {"unet.lora_alpha": 4, "unet.alpha_pattern": ["to_q"]},
        {"unet.lora_alpha": 4, "unet.alpha_pattern": {"attn2.to_q": []}},
        {"unet.lora_alpha": 4, "unet.alpha_pattern": {"(a+)+b": 4}},  # takes for ever
        ["unet.lora_alpha"],
        7,
        "{",
    ],
    ids=str,
)
def test_a_broken_configuration(tmp_path, tensors, config):
    text = config if isinstance(config, str) else json.dumps(config)
    refused_tensors(tmp_path, tensors, {"lora_adapter_metadata": text})
    refused_tensors(tmp_path, tensors, {"lora_adapter_metadata": 3})


def test_fuzz(tmp_path, tensors):
    """900 damaged files: read as something that fits, or refused in one line."""
    rng = np.random.default_rng(0)
    whole = {
        form: lora_files.save(example(), tmp_path / form, form).read_bytes()
        for form in ("peft", "kohya")
    }
    file, read = tmp_path / "a.safetensors", 0

    def attempt():
        nonlocal read
        try:
            made = lora_files.read(file, NETS)
        except JaxsdError as error:
            assert "\n" not in str(error)
            return
        read += 1
        for component, layers in made.layers.items():
            for name, layer in layers.items():
                shape = NETS[component].shapes[name]
                assert layer.down.shape == (layer.rank, *shape[1:])
                assert layer.up.shape == (shape[0], layer.rank) and np.isfinite(layer.alpha)

    for data in whole.values():
        header = 8 + int.from_bytes(data[:8], "little")
        for _ in range(150):  # a bit, of the header mostly
            at = rng.integers(0, header if rng.random() < 0.9 else len(data))
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :])
            attempt()
        for _ in range(50):
            file.write_bytes(data[: rng.integers(0, len(data))])
            attempt()
    names = list(tensors)
    for _ in range(500):
        changed = dict(tensors)
        for name in rng.choice(names, rng.integers(1, 4), replace=False):
            value = changed.pop(name)
            match rng.integers(5):
                case 0:
                    pass  # dropped
                case 1:
                    at = rng.integers(len(name))
                    changed[name[:at] + chr(rng.integers(33, 127)) + name[at + 1 :]] = value
                case 2:
                    changed[name] = value.T
                case 3:
                    changed[name] = value.reshape(rng.permutation([*value.shape, 1]))
                case 4:
                    changed[name] = value.astype(rng.choice(["f2", "f8", "i8"]))
        write(file, changed)
        attempt()
    assert 0 < read < 300  # some damage is to numbers, names of no meaning, or the precision alone
