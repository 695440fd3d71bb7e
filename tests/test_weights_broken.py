"""Files of weights that are damaged, or lie: each is refused in one line."""

import tracemalloc

import numpy as np
import pytest
from refusals import refused
from test_weights import SHAPES, params_like, raw_file

from jaxsd import weights


def test_truncated_anywhere(tmp_path):
    file = weights.save(params_like(SHAPES), tmp_path)
    whole = file.read_bytes()
    for size in (*range(20), len(whole) // 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        message = refused(weights.load, file, SHAPES)
        assert str(file) in message and f"{size} bytes" in message
    assert f"truncated: {len(whole) - 1} bytes where its header promises {len(whole)}" in message
    file.write_bytes(whole + b"more")
    assert "damaged" in refused(weights.load, file, SHAPES)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}q\x00.",
        b"version https://git-lfs.github.com/spec/v1\n",
    ]
    + [
        bytes(np.random.default_rng(seed).integers(256, size=400, dtype=np.uint8))
        for seed in (1, 2)
    ],
)
def test_garbage(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    assert "is not a safetensors file" in refused(weights.load, tmp_path, SHAPES)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, data",
    [
        ({"a": F32 | {"data_offsets": [0, 4]}}, b"\0" * 4),
        ({"a": F32 | {"data_offsets": [8, 0]}}, b"\0" * 8),
        ({"a": F32 | {"data_offsets": [-8, 0]}}, b"\0" * 8),
        ({"a": F32 | {"data_offsets": [0, 8, 8]}}, b"\0" * 8),
        ({"a": F32 | {"data_offsets": [8, 16]}}, b"\0" * 16),  # a hole
        ({"a": F32, "b": F32}, b"\0" * 8),  # an overlap
        ({"a": F32 | {"shape": [2.0]}}, b"\0" * 8),
        ({"a": F32 | {"shape": 2}}, b"\0" * 8),
        ({"a": F32 | {"shape": [-1, -2]}}, b"\0" * 8),
        ({"a": F32 | {"shape": [1 << 40, 1 << 40]}}, b"\0" * 8),
        ({"a": {"dtype": "F32"}}, b""),
        ({"a": F32 | {"dtype": ["F32"]}}, b"\0" * 8),
        ({"a": 3}, b""),
        (b"{]", b""),
        (b'{"a":' * 50_000, b""),
        (b'{"a\xff": 1}', b""),
    ],
)
def test_lying_headers(tmp_path, header, data):
    file = raw_file(tmp_path / "a.safetensors", header, data)
    shapes = {name: (2,) for name in header} if isinstance(header, dict) else {"a": (2,)}
    assert str(file) in refused(weights.load, file, shapes)


def test_nothing_is_allocated_that_the_file_does_not_hold(tmp_path):
    huge = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    lies = [raw_file(tmp_path / "a.safetensors", huge)]
    lies += [
        raw_file(tmp_path / f"{n}.safetensors", b"{}", length=n)
        for n in (99_999_999, 1 << 40, (1 << 64) - 1)
    ]
    tracemalloc.start()
    for file in lies:
        refused(weights.load, file, {"a": (1 << 40,)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
