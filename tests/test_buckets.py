"""gs:// and local paths alike: a bucket in memory, which counts the bytes that are asked of it."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils.epath import backend
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.registry import _registry as registry
from refusals import refused
from test_single import assert_same, make

from jaxsd import conversion, weights
from jaxsd.components import load_parts, save_parts
from jaxsd.inspection import inspect


class CountedFile(MemoryFile):
    def read(self, size=-1):
        data = super().read(size)
        Bucket.taken += len(data)
        return data


class Bucket(MemoryFileSystem):
    """Objects under gs://, as gcsfs would show them."""

    protocol = ("gcs", "gs")
    store = {}
    pseudo_dirs = [""]
    taken = 0

    def __init__(self, *args, finalize_on_close=True, **kwargs):
        super().__init__(*args, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    def _open(self, path, mode="rb", **kwargs):
        if mode != "rb":
            return super()._open(path, mode, **kwargs)
        file = self.store.get(self._strip_protocol(path))
        if file is None:
            raise FileNotFoundError(2, "No such object", path)
        return CountedFile(None, path, file.getvalue())


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setitem(registry, "gcs", Bucket)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.store.clear()
    Bucket.taken = 0
    yield Bucket
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_a_file_is_read_by_ranges(bucket, tmp_path):
    params = {"a": jnp.arange(50_000, dtype=jnp.float32), "b": jnp.ones((3, 2), jnp.bfloat16)}
    weights.save(params, "gs://bucket/unet")
    assert list(bucket.store) == ["/bucket/unet/diffusion_pytorch_model.safetensors"]
    with pytest.raises(Exception, match="1 missing"):
        weights.load("gs://bucket/unet", {"a": (50_000,), "b": (3, 2), "c": (1,)})
    assert bucket.taken < 1000  # the header alone
    loaded = weights.load("gs://bucket/unet", {name: p.shape for name, p in params.items()})
    for name, value in params.items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), np.asarray(value))
    assert bucket.taken < 202_000


def test_a_model_and_its_tokenizer(bucket, tmp_path):
    parts = make("sdxl", tiny.tokenizer(tmp_path / "words"))
    save_parts(parts, "gs://bucket/model")
    assert_same(load_parts("gs://bucket/model"), parts)
    bucket.taken = 0
    report = inspect("gs://bucket/model")
    assert report.components["unet"].parameters == parts.components["unet"].net.size
    assert bucket.taken < sum(held.bytes for held in report.components.values()) / 2
    conversion.convert("gs://bucket/model", "gs://bucket/model.safetensors")
    file = "gs://bucket/model.safetensors"
    assert_same(load_parts(file, config="gs://bucket/model"), parts)
    ids = load_parts("gs://bucket/model").tokenizers["tokenizer_2"](["a red seven"], 8)
    np.testing.assert_array_equal(ids, parts.tokenizers["tokenizer_2"](["a red seven"], 8))


def test_what_is_not_there(bucket):
    assert "gs://bucket/none" in refused(load_parts, "gs://bucket/none")
    assert "gs://bucket/none" in refused(weights.load, "gs://bucket/none", {})
    bucket.store.clear()
    assert "does not exist" in refused(weights.read_json, "gs://bucket/a.json")
    assert "cannot open" in refused(weights.load, "ftp://host/file", {})


def test_a_bucket_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    backend.fsspec_backend._get_filesystem.cache_clear()
    assert "cannot read gs://bucket/model" in refused(load_parts, "gs://bucket/model")
