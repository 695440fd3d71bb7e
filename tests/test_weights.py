"""Weights come back as they were saved, and a file that does not fit or is broken is refused."""

import json
import os
import struct
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from refusals import refused

from jaxsd import weights
from jaxsd.weights import DIFFUSERS_FILE, TRANSFORMERS_FILE
from jaxsd.weights.files import LISTED

SHAPES = {"conv.weight": (4, 3, 2, 2), "conv.bias": (4,), "logit_scale": (), "empty": (0, 3)}


def params_like(shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))


def raw_file(path, header, data=b"", length=None):
    """A safetensors file that says what we like."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


# --- Round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [DIFFUSERS_FILE, TRANSFORMERS_FILE, "any.fp16.safetensors"])
def test_round_trip(tmp_path, dtype, name):
    params = params_like(SHAPES, dtype)
    assert weights.save(params, tmp_path / "unet", name) == tmp_path / "unet" / name
    assert os.listdir(tmp_path / "unet") == [name]
    assert_equal(weights.load(tmp_path / "unet", SHAPES), params)
    assert_equal(weights.load(str(tmp_path / "unet" / name), SHAPES), params)


def test_casts(tmp_path):
    params = params_like(SHAPES)
    halves = {k: v.astype(jnp.bfloat16) for k, v in params.items()}
    file = weights.save(params, tmp_path / "a.safetensors", dtype="bfloat16")
    assert_equal(weights.load(file, SHAPES), halves)
    file = weights.save(params, tmp_path / "b.safetensors")
    assert_equal(weights.load(file, SHAPES, dtype=jnp.bfloat16), halves)
    assert "float64 is not supported" in refused(weights.load, file, SHAPES, dtype="float64")
    assert "int32" in refused(weights.save, {"ids": jnp.arange(3)}, tmp_path)


def test_other_libraries_read_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    mixed = {**params_like({"a": (3,), "b": ()}, jnp.float16), **params_like({"c": (2, 5)})}
    file = weights.save(mixed, tmp_path)
    theirs = safetensors.load_file(file)
    assert_equal({name: theirs[name] for name in mixed}, mixed)
    with safetensors.safe_open(file, "numpy") as tensors:
        assert tensors.metadata() == {"format": "pt"}  # transformers asks for it


def test_others_may_read_the_file(tmp_path):
    (tmp_path / "plain").touch()
    file = weights.save(params_like(SHAPES), tmp_path)
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_placed_as_it_is_read(tmp_path, dtype):
    params = params_like({"a": (8, 3), "b": (3,)})
    file = weights.save(params, tmp_path / "a.safetensors")
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, P(*axes)) for axes in (("fsdp",), ()))
    shapes = {name: value.shape for name, value in params.items()}

    def place(name, shape):
        return rows if shape[0] % 4 == 0 else whole

    loaded = weights.load(file, shapes, dtype, sharding=place)
    expected = {name: value.astype(dtype or "float32") for name, value in params.items()}
    assert loaded["a"].sharding == rows and loaded["b"].sharding == whole
    assert {piece.data.shape for piece in loaded["a"].addressable_shards} == {(2, 3)}
    assert_equal(loaded, expected)
    loaded = weights.load(file, shapes, dtype, sharding=whole)
    assert all(value.sharding == whole for value in loaded.values())
    assert_equal(loaded, expected)


def test_the_file_may_be_replaced_while_its_arrays_live(tmp_path):
    shapes = {"a": (64, 64), "b": (3,)}
    params = params_like(shapes)
    file = weights.save(params, tmp_path)
    whole = file.read_bytes()
    loaded = weights.load(file, shapes)
    more = jax.jit(lambda params: {n: v + 1 for n, v in params.items()}, donate_argnums=0)
    changed = more(loaded)
    assert file.read_bytes() == whole  # donated, and not written to
    assert_equal(changed, {name: value + 1 for name, value in params.items()})
    loaded = weights.load(file, shapes)
    weights.save(changed, tmp_path)
    assert_equal(loaded, params)
    assert_equal(weights.load(file, shapes), changed)


def test_tensors_that_are_not_aligned_are_copied(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    params = params_like({"a": (1000,), "b": (5,), "c": (7, 11)})
    for length in range(1, 10):  # of a name, which moves the data
        name = "x" * length
        named = params | {name: jnp.ones(3)}
        safetensors.save_file({n: np.asarray(v) for n, v in named.items()}, tmp_path / "a")
        shapes = {n: value.shape for n, value in named.items()}
        assert_equal(weights.load(tmp_path / "a", shapes), named)


def unaligned_file(path, shapes):
    """A file whose tensors lie eight bytes beside where XLA would take them."""
    header, data, params = {}, b"", params_like(shapes)
    for name, value in params.items():
        start, data = len(data), data + np.asarray(value).tobytes()
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    return raw_file(path, text + b" " * (-len(text) % 64), data), params


def test_arrays_that_are_still_being_copied_can_be_used_and_given_away(tmp_path):
    shapes = {name: (1000, 1000 + n) for n, name in enumerate("abcd")}
    file, params = unaligned_file(tmp_path / "a.safetensors", shapes)
    more = jax.jit(lambda params: {n: v + 1 for n, v in params.items()}, donate_argnums=0)
    expected = {name: value + 1 for name, value in params.items()}
    for _ in range(5):
        assert_equal(more(weights.load(file, shapes)), expected)
        for value in weights.load(file, shapes).values():
            value.delete()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what Linux tells")
def test_pages_that_were_copied_are_given_back(tmp_path):
    shapes = {name: (1000, 1000) for name in "abcdefgh"}
    file, params = unaligned_file(tmp_path / "a.safetensors", shapes)
    loaded = weights.load(file, shapes)
    assert_equal(loaded, params)
    deadline = time.monotonic() + 10
    while str(file) in Path("/proc/self/maps").read_text():
        assert time.monotonic() < deadline, "the file is still mapped"
        jax.device_put(np.ones(3, np.float32))  # jax lets go of what it was given at its next call
        time.sleep(0.01)


# --- What does not fit -----------------------------------------------------------------------


def test_everything_that_differs_is_listed_at_once(tmp_path):
    file = weights.save(params_like({"a": (2,), "b": (3, 4), "x": (1,), "c": (5,)}), tmp_path)
    message = refused(weights.load, tmp_path, {"a": (2,), "b": (4, 3), "c": (1, 5), "y": (1,)})
    assert str(file) in message
    for part in ("1 missing: y", "1 unexpected: x", "b [3, 4] instead of [4, 3]", "c [5]"):
        assert part in message


def test_long_lists_are_cut_and_counted(tmp_path):
    weights.save(params_like({f"a{i:03}": (1,) for i in range(150)}), tmp_path)
    message = refused(weights.load, tmp_path, {})
    assert "150 unexpected: a000, " in message and f"and {150 - LISTED} more" in message


def test_whole_numbers_are_no_weights(tmp_path):
    entry = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}
    file = raw_file(tmp_path / "a.safetensors", {"a": entry}, b"\0" * 8)
    assert "1 not float32, float16 or bfloat16: a I64" in refused(weights.load, file, {"a": (1,)})


def test_which_file_of_a_folder(tmp_path):
    message = refused(weights.load, tmp_path / "unet", SHAPES)
    assert "unet does not exist" in message and DIFFUSERS_FILE in message
    assert "nor model.safetensors" in refused(weights.load, tmp_path, SHAPES)
    params = params_like(SHAPES)
    weights.save(params_like({"other": (1,)}), tmp_path, "b.safetensors")
    weights.save(params_like({"other": (1,)}), tmp_path, "a.safetensors")
    assert "a.safetensors, b.safetensors" in refused(weights.load, tmp_path, SHAPES)
    weights.save(params, tmp_path)
    assert_equal(weights.load(tmp_path, SHAPES), params)


def test_variants(tmp_path):
    plain, half = params_like(SHAPES), params_like(SHAPES, jnp.float16)
    weights.save(plain, tmp_path)
    weights.save(half, tmp_path, "diffusion_pytorch_model.fp16.safetensors")
    assert_equal(weights.load(tmp_path, SHAPES), plain)
    assert_equal(weights.load(tmp_path, SHAPES, variant="fp16"), half)
    assert_equal(weights.load(tmp_path, SHAPES, variant="non_ema"), plain)  # as diffusers does


def shards(folder, params, variant="", index=None):
    for i, name in enumerate(params, 1):
        file = f"model{variant}-{i:05}-of-{len(params):05}.safetensors"
        weights.save({name: params[name]}, folder, file)
    places = {
        name: f"model{variant}-{i:05}-of-{len(params):05}.safetensors"
        for i, name in enumerate(params, 1)
    }
    value = {"metadata": {"total_size": 1}, "weight_map": places if index is None else index}
    weights.write_json(folder / f"model.safetensors.index{variant}.json", value)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tmp_path, variant):
    params = params_like(SHAPES)
    shards(tmp_path, params, f".{variant}" if variant else "")
    assert_equal(weights.load(tmp_path, SHAPES, variant=variant), params)
    next(tmp_path.glob("*-00002-of-*")).unlink()
    assert "00002-of-00004" in refused(weights.load, tmp_path, SHAPES, variant=variant)


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "", "..", "x/a.bin", 7])
def test_an_index_that_points_elsewhere(tmp_path, file):
    weights.save(params_like({"a": (1,)}), tmp_path, "a.safetensors")
    shards(tmp_path / "unet", {}, index={"a": file})
    message = refused(weights.load, tmp_path / "unet", {"a": (1,)})
    assert "points outside its folder" in message or "no weight_map" in message


@pytest.mark.parametrize("index", [{}, [], None, "a.safetensors"])
def test_an_index_of_nothing(tmp_path, index):
    value = {"weight_map": index}
    weights.write_json(tmp_path / "model.safetensors.index.json", value)
    assert "no weight_map from names to files" in refused(weights.load, tmp_path, {"a": (1,)})


def test_a_tensor_in_two_shards(tmp_path):
    params = params_like({"a": (1,)})
    shards(tmp_path, params, index={"a": "one.safetensors", "b": "two.safetensors"})
    weights.save(params, tmp_path, "one.safetensors")
    weights.save(params, tmp_path, "two.safetensors")
    assert "in two of its 2 files" in refused(weights.load, tmp_path, {"a": (1,)})


# --- Aliases ---------------------------------------------------------------------------------


def test_text_model_prefix_and_position_ids(tmp_path):
    params = params_like({"text_model.embeddings.token_embedding.weight": (5, 2)})
    shapes = {name: value.shape for name, value in params.items()}
    ids = {"embeddings.position_ids": jnp.zeros((1, 77))}
    bare = {name.removeprefix("text_model."): value for name, value in params.items()}
    for stored in (
        params,
        bare,
        params | {f"text_model.{n}": v for n, v in ids.items()},
        bare | ids,
    ):
        weights.save(stored, tmp_path)
        assert_equal(weights.load(tmp_path, shapes), params)
    weights.save(params | bare, tmp_path)  # both at once is not the same model
    assert "1 unexpected: embeddings.token" in refused(weights.load, tmp_path, shapes)


def test_old_attention_names(tmp_path):
    new = params_like(
        {
            f"encoder.mid_block.attentions.0.{layer}.{kind}": (4, 4) if kind == "weight" else (4,)
            for layer in ("to_q", "to_k", "to_v", "to_out.0")
            for kind in ("weight", "bias")
        }
    )
    shapes = {name: value.shape for name, value in new.items()}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in new.items():
        for here, there in names.items():
            if f".{here}." in name:
                old[name.replace(here, there)] = value
    as_convolutions = {n: v[:, :, None, None] if v.ndim == 2 else v for n, v in old.items()}
    for stored in (old, as_convolutions):
        weights.save(stored, tmp_path)
        assert_equal(weights.load(tmp_path, shapes), new)
    # Only where the model expects the other name, or the other shape, of this very layer.
    assert (
        weights.load(tmp_path, {n: v.shape for n, v in as_convolutions.items()}).keys()
        == old.keys()
    )
    weights.save(params_like({"proj_in.weight": (4, 4, 1, 1)}), tmp_path)
    assert "misshapen" in refused(weights.load, tmp_path, {"proj_in.weight": (4, 4)})


# --- Writing ---------------------------------------------------------------------------------


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    params = params_like(SHAPES)
    weights.save(params, tmp_path)

    def interrupted(source, target):
        assert len(os.listdir(tmp_path)) == 2  # the new file stands beside the old one
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        weights.save(params_like(SHAPES, "float16"), tmp_path)
    with pytest.raises(TypeError):
        weights.write_json(tmp_path / "config.json", {"a": object()})
    assert os.listdir(tmp_path) == [DIFFUSERS_FILE]
    assert_equal(weights.load(tmp_path, SHAPES), params)


def test_unwritable_targets(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in refused(weights.save, params_like(SHAPES), tmp_path / "file" / "unet")
    (tmp_path / "folder" / DIFFUSERS_FILE / "x").mkdir(parents=True)
    assert "cannot write" in refused(weights.save, params_like(SHAPES), tmp_path / "folder")
    assert "cannot write" in refused(weights.write_json, tmp_path / "file" / "a.json", {})
    assert sorted(os.listdir(tmp_path / "folder")) == [DIFFUSERS_FILE]


def test_json(tmp_path):
    values = {"channels": [4, 8], "eps": 1e-5, "name": "größe", "none": None}
    weights.write_json(tmp_path / "new" / "config.json", values)
    assert weights.read_json(tmp_path / "new" / "config.json") == values
    assert os.listdir(tmp_path / "new") == ["config.json"]
    assert "does not exist" in refused(weights.read_json, tmp_path / "config.json")
    assert "cannot read" in refused(weights.read_json, tmp_path)
    for broken in (b"", b"{", b"\xff\xfe{}", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(broken)
        assert "a.json is not valid JSON" in refused(weights.read_json, tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[1]")
    assert "holds a JSON list, not an object" in refused(weights.read_json, tmp_path / "a.json")
