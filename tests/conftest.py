"""Strictness that tests pay and users do not.

Types and array shapes in annotations are checked at run time, dtypes and ranks are promoted
explicitly or not at all, and the machine pretends to have eight CPU devices. Warnings are errors,
with the exceptions in pyproject.toml. Programs compiled once are kept for all workers of a run,
which halves its time: many tests build the same tiny models.
"""

import atexit
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Scripts that tests import, and that import each other; last, so that they hide nothing.
sys.path += [str(Path(__file__).parent.parent / name) for name in ("benchmarks", "experiments")]

# Before jax is imported: it reads these once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Programs run once or twice on tiny arrays: compiling them is what takes the time
    + " --xla_backend_optimization_level=0"
    + " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
if importlib.util.find_spec("libtpu") is None:  # it ends processes whose flags it does not know
    # A third of that time without the newer emitters of fused operations
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["HF_HUB_OFFLINE"] = "1"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else a worker, or the caller's wish
    programs = tempfile.mkdtemp(prefix="jaxsd-tests-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
# What takes less to compile takes as long to write and to read
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from jax.experimental import topologies
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Stays installed: every module of the package is checked, whichever test imports it first.
install_import_hook("jaxsd", "beartype.beartype")


def pytest_collection_finish():
    """What is imported stays: the collector need not look at it again and again, nor as often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file():
    """Programs that models share are kept for good: here they go with the file that used them."""
    yield
    if "jaxsd.programs" in sys.modules:
        sys.modules["jaxsd.programs"]._shared.cache_clear()


@pytest.fixture
def untraced():
    """Models share what was traced of their networks, but not with the tests before this one."""
    from jaxsd import programs  # after the hook

    programs._shared.cache_clear()


@pytest.fixture
def tpus(monkeypatch):
    """Gives the chips of a topology, "v5e:2x4" say, to compile for: they need not be there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

    def chips(name):
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices

    return chips


@pytest.fixture
def gpus():
    """An H200 to compile for, which need not be there."""
    installed = importlib.util.find_spec("jax_cuda12_plugin") is not None
    if not installed or os.environ.get("JAX_PLATFORMS") != "cpu":
        pytest.skip("needs jax's plugin for CUDA, and JAX_PLATFORMS=cpu")
    import gpu_estimate

    with gpu_estimate.without_a_gpu("h200") as devices:
        yield devices


@pytest.fixture(scope="session")
def laid(tmp_path_factory):
    """What readers of the docs bring, made once."""
    import desk

    folder = tmp_path_factory.mktemp("desk")
    desk.lay_out(folder)
    return folder


@pytest.fixture
def at_the_desk(laid, tmp_path, monkeypatch):
    """A folder of one's own with all of it, to work in."""
    shutil.copytree(laid, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
