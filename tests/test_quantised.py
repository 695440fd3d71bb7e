"""Weights in eight bits, and models that share parts with one that ships: smaller, and no worse."""

import importlib.util
import json
import math
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from refusals import refused
from test_single import make
from test_weights import assert_equal, raw_file

import jaxsd
from jaxsd import conversion, hub, weights
from jaxsd.cli import convert as convert_command
from jaxsd.compare.plan import opened
from jaxsd.components import Component, Parts, load_parts, save_parts
from jaxsd.conversion import share
from jaxsd.inspection import Held, inspect
from jaxsd.weights import quantised
from jaxsd.weights.entries import Ranges
from jaxsd.weights.headers import choose_files, read_entries

SHAPES = {"conv.weight": (24, 3, 3, 3), "linear.weight": (7, 50), "linear.bias": (7,), "scale": ()}
ERROR = 1 / 254 + 1e-6  # of the channel's greatest weight; the rest is rounding in float32


def params_like(shapes=SHAPES, dtype=jnp.float32):
    """Channels of very different sizes, one of them nothing at all."""
    rng, params = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        sizes = 10.0 ** rng.uniform(-6, 3, shape[:1] if len(shape) > 1 else ())
        sizes = sizes.reshape(-1, *[1] * (len(shape) - 1)) if len(shape) > 1 else 1.0
        params[name] = jnp.asarray(rng.normal(size=shape) * sizes, dtype)
    params["linear.weight"] = params["linear.weight"].at[3].set(0)
    return params


def assert_near(found, params):
    """Each channel within half a step of 1/127 of its greatest weight; vectors in float16."""
    assert found.keys() == params.keys()
    for name, value in params.items():
        got, want = np.asarray(found[name], np.float64), np.asarray(value, np.float64)
        assert got.shape == want.shape
        if want.ndim < 2:
            np.testing.assert_array_equal(got, np.asarray(value.astype(jnp.float16), np.float64))
            continue
        rows = want.reshape(len(want), -1)
        errors = np.abs(got.reshape(rows.shape) - rows).max(1, initial=0)
        assert np.all(errors <= ERROR * np.abs(rows).max(1, initial=0)), name


# --- One file --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", np.int8, jnp.int8])
def test_round_trip(tmp_path, dtype):
    params = params_like()
    file = weights.save(params, tmp_path, dtype=dtype)
    found = weights.load(tmp_path, SHAPES)
    assert_near(found, params)
    kinds = {name: str(value.dtype) for name, value in found.items()}
    assert kinds == dict.fromkeys(SHAPES, "float32") | dict.fromkeys(
        ("linear.bias", "scale"), "float16"
    )
    assert not np.asarray(found["linear.weight"][3]).any()
    # What has been rounded once stays as it is.
    again = weights.save(found, tmp_path / "again", dtype=dtype)
    assert_equal(weights.load(again, SHAPES), found)
    half = weights.load(file, SHAPES, jnp.bfloat16)
    assert_equal(half, {name: value.astype(jnp.bfloat16) for name, value in found.items()})


def test_what_the_file_holds(tmp_path):
    params = params_like(dtype=jnp.bfloat16)
    whole = weights.save(params, tmp_path, dtype="int8").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt", "quantised": "int8"}
    kinds = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    assert kinds == {
        "conv.weight": ("I8", (24, 3, 3, 3)),
        "conv.weight.scale": ("F32", (24,)),
        "linear.weight": ("I8", (7, 50)),
        "linear.weight.scale": ("F32", (7,)),
        "linear.bias": ("F16", (7,)),
        "scale": ("F16", ()),
    }
    first, last = header["conv.weight"]["data_offsets"]
    numbers = np.frombuffer(whole[8 + length :][first:last], np.int8).reshape(24, -1)
    assert np.all(np.abs(numbers.astype(int)).max(1) == 127)
    assert "metadata" not in str(header)


def test_placed_as_it_is_read_and_read_by_ranges(tmp_path):
    params = params_like({"a": (8, 3), "linear.weight": (7, 50)})
    file = weights.save(params, tmp_path, dtype="int8")
    plain = weights.load(file, {name: value.shape for name, value in params.items()})
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, P(*axes)) for axes in (("fsdp",), ()))
    placed = weights.load(
        file,
        {name: value.shape for name, value in params.items()},
        sharding=lambda name, shape: rows if shape[0] % 4 == 0 else whole,
    )
    assert placed["a"].sharding == rows
    assert_equal(placed, plain)
    entries = read_entries(file)
    with Ranges(file) as tensors:  # as from a bucket
        for name, value in plain.items():
            np.testing.assert_array_equal(tensors.get(entries[name]), value)


def test_what_cannot_be_kept(tmp_path):
    for name, value in (("linear.weight", jnp.inf), ("linear.bias", 1e6), ("scale", jnp.nan)):
        params = params_like()
        params[name] = params[name].at[...].set(value)
        said = refused(weights.save, params, tmp_path / "unet", dtype="int8")
        assert f"cannot save {name} in eight bits" in said
        assert not list((tmp_path / "unet").iterdir())
    file = weights.save(params_like(), tmp_path, dtype="int8")
    assert "int8 is not supported" in refused(weights.load, file, SHAPES, dtype="int8")


ONE = {"a": {"dtype": "I8", "shape": [2, 3], "data_offsets": [0, 6]}}
SCALE = {"a.scale": {"dtype": "F32", "shape": [2], "data_offsets": [6, 14]}}
HALF = {"a.scale": {"dtype": "F16", "shape": [2], "data_offsets": [6, 10]}}
LONG = {"a.scale": {"dtype": "F32", "shape": [3], "data_offsets": [6, 18]}}
FLAT = {"a": {"dtype": "I8", "shape": [], "data_offsets": [0, 1]}}
SAYS = {"__metadata__": {"format": "pt", "quantised": "int8"}}


@pytest.mark.parametrize(
    "header, data, said",
    [
        (SAYS | ONE, b"\1" * 6, "a.scale is not there"),
        (SAYS | ONE | HALF, b"\1" * 10, r"a.scale is F16 \[2\], not a float32 for each row"),
        (SAYS | ONE | LONG, b"\1" * 18, r"a.scale is F32 \[3\]"),
        (
            SAYS | FLAT | {"a.scale": SCALE["a.scale"] | {"data_offsets": [1, 9]}},
            b"\1" * 9,
            "each row",
        ),
        ({"__metadata__": {"quantised": "int4"}} | ONE | SCALE, b"\1" * 14, "not known: 'int4'"),
        ({"__metadata__": {"quantised": ["a\nb" * 99]}} | ONE | SCALE, b"\1" * 14, "not known"),
        (ONE | SCALE, b"\1" * 14, "1 unexpected: a.scale; 1 not float32.*: a I8"),
        ({"__metadata__": 3} | ONE, b"\1" * 6, "a I8"),
        (SAYS | SCALE | {"a": ONE["a"] | {"dtype": "U8"}}, b"\1" * 14, "a U8"),
        *(
            (SAYS | ONE | SCALE, b"\1" * 6 + struct.pack("<2f", 1, value), "is damaged: scales")
            for value in (float("nan"), float("inf"), -1.0, 3e38)
        ),
    ],
)
def test_files_that_lie(tmp_path, header, data, said):
    file = raw_file(tmp_path / "a.safetensors", header, data)
    with pytest.raises(jaxsd.JaxsdError, match=said) as error:
        weights.load(file, {"a": (2, 3)})
    assert "\n" not in str(error.value) and str(file) in str(error.value)


# --- Models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Parts, Path]:
    """A tiny model, and its folder in eight bits."""
    place = tmp_path_factory.mktemp("model")
    parts = make("sd1", tiny.tokenizer(place / "words"))
    save_parts(parts, place / "int8", "int8")
    return parts, place / "int8"


def test_a_model_in_eight_bits(model, tmp_path):
    parts, folder = model
    assert {path.name for path in folder.rglob("*.safetensors")} == {
        "diffusion_pytorch_model.int8.safetensors",  # a name under which no other library looks
        "model.int8.safetensors",
    }
    found = load_parts(folder)
    for name, component in parts.components.items():
        assert_near(found.components[name].params, component.params)
    conversion.convert(folder, tmp_path / "float")
    plain = load_parts(tmp_path / "float")
    for name, component in found.components.items():
        assert_equal(plain.components[name].params, component.params)
    assert (tmp_path / "float" / "unet" / weights.DIFFUSERS_FILE).is_file()
    conversion.convert(folder, tmp_path / "a.safetensors", dtype="float16")  # and for others
    for target, how, said in (
        ("b.safetensors", {}, "int8 is a folder, not one file"),
        ("b.safetensors", {"dtype": None, "base": "digits"}, "what shares parts is a folder"),
        ("orbax", {"orbax": True}, "Orbax keeps no int8"),
    ):
        how = {"dtype": "int8"} | how
        assert said in refused(conversion.convert, folder, tmp_path / target, **how)


def test_what_info_says_of_it(model):
    parts, folder = model
    report = inspect(folder)
    assert not report.unusual
    for name, component in parts.components.items():
        held, shapes = report.components[name], component.net.shapes
        large = [math.prod(shape) for shape in shapes.values() if len(shape) > 1]
        rows = sum(shape[0] for shape in shapes.values() if len(shape) > 1)
        small = component.net.size - sum(large)
        assert held == Held(
            len(shapes),
            component.net.size,
            sum(large) + 4 * rows + 2 * small,
            {"I8 with scales": sum(large), "F16": small},
        )


def test_pytorch_is_given_an_ordinary_folder(model):
    """What `jaxsd compare` hands to diffusers: weights that it reads."""
    parts, folder = model
    with opened(folder) as found:
        assert found.folder != folder and found.parts.keys() == parts.components.keys()
        for name, part in found.parts.items():
            entries = weights.load(part.folder, parts.components[name].net)
            assert_near(entries, parts.components[name].params)
            assert not any("int8" in path.name for path in part.folder.iterdir())
    assert not found.folder.exists()


# --- Parts of a model that ships -------------------------------------------------------------


@pytest.fixture(scope="module")
def student() -> Parts:
    """`digits` with another UNet, as from training: in float32."""
    parts = load_parts("digits", jnp.float32)
    unet = parts.components["unet"]
    other = {name: value + 0.01 for name, value in unet.params.items()}
    components = parts.components | {"unet": Component(unet.net, other)}
    return Parts(components, parts.schedule, parts.tokenizers, parts.index)


@pytest.fixture(scope="module")
def small(student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    save_parts(share(student, "digits"), folder, "int8")
    return folder


def test_only_what_differs_is_written(student, small):
    names = {str(path.relative_to(small)) for path in small.rglob("*") if path.is_file()}
    assert names == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.int8.safetensors",
    }
    assert sum(path.stat().st_size for path in small.rglob("*")) < 2_650_000
    assert weights.read_json(small / "model_index.json")["_base"] == "digits"
    changed = dict(student.components["vae"].params)
    changed["decoder.conv_out.bias"] = changed["decoder.conv_out.bias"] + 0.1
    vae = Component(student.components["vae"].net, changed)
    other = Parts(student.components | {"vae": vae}, student.schedule, {}, student.index)
    assert share(other, "digits").components.keys() == {"unet", "vae"}


def test_the_rest_is_the_base_models(student, small, tmp_path):
    found, digits = load_parts(small), load_parts("digits")
    assert_near(found.components["unet"].params, student.components["unet"].params)
    for name in ("vae", "text_encoder"):
        assert_equal(found.components[name].params, digits.components[name].params)
    assert found.index == digits.index  # which does not speak of a base: a copy has everything
    save_parts(found, tmp_path / "whole")
    assert (tmp_path / "whole" / "tokenizer" / "vocab.json").is_file()
    again = load_parts(tmp_path / "whole")
    for name, component in found.components.items():
        assert_equal(again.components[name].params, component.params)
    report = inspect(small)
    assert report.family == "digits"
    assert report.components.keys() == student.components.keys()
    assert report.unusual == ["vae, text_encoder of digits, which ships"]
    with opened(small) as model:
        assert model.parts.keys() == student.components.keys()
        assert all(part.folder.is_dir() for part in model.parts.values())


def test_the_commands(student, tmp_path, capsys):
    save_parts(student, tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(tmp_path / "small")]
    convert_command.main([*arguments, "--dtype", "int8", "--base", "digits"])
    assert not (tmp_path / "small" / "vae").exists()
    assert_near(
        load_parts(tmp_path / "small").components["unet"].params,
        student.components["unet"].params,
    )
    assert "those are digits" in refused(share, student, "dig")


@pytest.mark.parametrize(
    "base", ["dig", "../digits", "digits/", "", ".", 5, ["digits"], {}, "a\nb"]
)
def test_bases_that_are_none(small, tmp_path, base):
    values = weights.read_json(small / "model_index.json")
    weights.write_json(tmp_path / "model_index.json", values | {"_base": base})
    for read in (load_parts, inspect, jaxsd.load):
        said = refused(read, tmp_path)
        assert "_base names no model that ships; those are digits" in said


def test_what_the_base_lacks(small, tmp_path):
    values = weights.read_json(small / "model_index.json")
    weights.write_json(tmp_path / "model_index.json", values | {"_base": "digits-ddpm"})
    said = refused(load_parts, tmp_path)
    assert "lacks" in said and "vae/" in said and "tokenizer/" in said


def test_models_are_shipped(student, tmp_path, monkeypatch, capsys):
    """experiments/ship.py, with folders of its own."""
    place = Path(hub.__file__).parents[1] / "experiments" / "ship.py"
    spec = importlib.util.spec_from_file_location("ship", place)
    ship = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ship)
    monkeypatch.setattr(ship, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(ship, "PRETRAINED", tmp_path / "pretrained")
    save_parts(student, tmp_path / "runs" / ship.SHIPPED["digits-4step"].source)
    ship.main(["digits-4step"])
    folder = tmp_path / "pretrained" / "digits-4step"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model_index.json",
        "scheduler",
        "unet",
    ]
    assert "digits-4step: unet in int8" in capsys.readouterr().out
    assert set(ship.SHIPPED) >= set(hub.shipped())
    assert all(row.base is None or row.base in hub.shipped() for row in ship.SHIPPED.values())


def test_what_stood_there_is_replaced_by_the_other_form(small, tmp_path):
    """Of two forms in a folder the old one would be read."""
    pipe = jaxsd.load(small)
    for dtype in ("float32", "int8", "float32"):
        pipe.components["unet"].params["conv_in.bias"] += 1.0
        pipe.save(tmp_path / "model", dtype)
        want = np.asarray(pipe.params["unet"]["conv_in.bias"])
        got = jaxsd.load(tmp_path / "model").params["unet"]["conv_in.bias"]
        np.testing.assert_allclose(got, want, rtol=2e-3)


def test_eight_bits_are_taken_where_there_is_nothing_better():
    eight = "diffusion_pytorch_model.int8.safetensors"
    assert choose_files(["config.json", "other.safetensors", eight]) == [eight]
    assert choose_files([eight], "fp16") == [eight]
    assert choose_files([eight, weights.DIFFUSERS_FILE]) == [weights.DIFFUSERS_FILE]
    assert choose_files([eight, weights.DIFFUSERS_FILE], "int8") == [eight]


def test_the_form_is_asked_for_by_name():
    assert all(quantised.is_asked_for(dtype) for dtype in ("int8", np.int8, np.dtype("int8")))
    for dtype in (None, "float16", "bfloat16", jnp.bfloat16, np.float32, "nonsense"):
        assert not quantised.is_asked_for(dtype)
