"""Two processes are one training: they meet, stop together, and end as one process does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pair
import pytest

from jaxsd import processes, training
from jaxsd.checkpoints import restore_params
from jaxsd.cli import sample
from jaxsd.cli.sampling import model
from jaxsd.errors import JaxsdError

EXPORT = "model/diffusion_pytorch_model.safetensors"


def free_port(first: int = 0) -> int:
    for port in range(first, first + 4096):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError("no free port")


def explicitly() -> list[dict[str, str]]:
    """Environments in which two processes meet, told by jaxsd's own variables."""
    where = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    return [where | {"JAX_PROCESS_ID": str(i)} for i in range(2)]


def under_slurm() -> list[dict[str, str]]:
    """The same as `srun --ntasks 2` sets them; the port comes of the job's number."""
    job = {"SLURM_JOB_ID": str(free_port(61440) - 61440), "SLURM_NTASKS": "2"}
    node = {"SLURM_STEP_NODELIST": "127.0.0.1"}
    return [job | node | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]


class Pair:
    """Two processes, with a device each, that train in `workdir`."""

    def __init__(self, workdir: Path, where: list[dict[str, str]], pause_at: int = -1):
        self.log = workdir / "metrics.jsonl"
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        common = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, pair.__file__, str(workdir), str(pause_at)]
        self.processes = [
            subprocess.Popen(command, env=common | own, stdout=subprocess.PIPE, text=True)
            for own in where
        ]

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for_step(self, step: int) -> None:
        while not self.log.exists() or f'"step": {step},' not in self.log.read_text():
            assert all(process.poll() is None for process in self.processes), "ended early"
            time.sleep(0.02)

    def ends(self) -> tuple[list[int], list[str]]:
        """Exit statuses, and what was printed."""
        printed = [process.communicate(timeout=250)[0] for process in self.processes]
        return [process.returncode for process in self.processes], printed


def losses(workdir: Path) -> dict[int, float]:
    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, pair.OPTIONS.steps + 1))
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of two processes that nothing has disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    with Pair(workdir, explicitly()) as both:
        assert both.ends()[0] == [0, 0]
    return workdir


@pytest.mark.slow
def test_two_processes_killed_and_stopped_end_with_the_same_bits(whole, tmp_path):
    with Pair(tmp_path, explicitly(), pause_at=5) as both:
        both.wait_for_step(5)
        for process in both.processes:
            process.send_signal(signal.SIGKILL)
        assert both.ends()[0] == [-signal.SIGKILL] * 2
    with Pair(tmp_path, under_slurm()) as both:
        both.wait_for_step(6)
        both.processes[1].send_signal(signal.SIGTERM)  # the other hears of it
        statuses, printed = both.ends()
        assert statuses == [0, 0]
        assert "stopped by another process's signal after step" in printed[0]
        assert "stopped by SIGTERM after step" in printed[1]
        stopped = int(printed[0].partition("after step ")[2].partition(",")[0])
        assert 6 <= stopped < pair.OPTIONS.steps
        assert (tmp_path / "checkpoints" / str(stopped)).is_dir()
    with Pair(tmp_path, explicitly()) as both:
        assert both.ends()[0] == [0, 0]

    assert losses(tmp_path) == losses(whole)
    assert (tmp_path / EXPORT).read_bytes() == (whole / EXPORT).read_bytes()
    for which in ("params", "ema"):
        cut, want = restore_params(tmp_path, which=which), restore_params(whole, which=which)
        assert cut.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_array_equal(np.asarray(cut[name]), np.asarray(value))


@pytest.mark.slow
def test_two_processes_do_what_one_does(whole, tmp_path):
    options = pair.OPTIONS
    state = training.train(pair.objective(), pair.batches, options, tmp_path, {"recipe": "digits"})
    got, want = losses(whole), losses(tmp_path)
    np.testing.assert_allclose(list(got.values()), list(want.values()), atol=1e-5)
    for which, params in (("params", state.params), ("ema", state.ema)):
        for name, value in restore_params(whole, which=which).items():
            np.testing.assert_allclose(value, np.asarray(params[name]), atol=1e-5, err_msg=name)


class Painter:
    """Stands in for a pipeline: a picture is its seed, in grey."""

    takes_prompts, default_sampler = True, "ddim"

    def start(self, prompts, seeds, **_):
        grey = np.asarray(seeds, np.float32).reshape(-1, 1, 1, 1) / 127.5 - 1
        return np.broadcast_to(grey, (len(seeds), 4, 4, 3))


def test_processes_share_out_the_pictures(tmp_path, monkeypatch):
    """Each under the name that it has when one process makes them all."""
    monkeypatch.setattr(model, "load", lambda options: model.Session(options, Painter()))
    monkeypatch.setattr(processes, "initialize", lambda *_: None)
    monkeypatch.setattr(processes, "agree", lambda _: 0)  # the first to look finds nothing there

    def pictures(out, count):
        for index in range(count):
            monkeypatch.setattr(jax, "process_count", lambda: count)
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            options = sample.Options(("a", "b"), num_images=3, batch_size=2, out=out)
            made = sample.run(options)
            assert len(made) == (7 if count == 1 else 4 - 2 * index)
        return {path.name: path.read_bytes() for path in out.iterdir()}

    one, two = pictures(tmp_path / "one", 1), pictures(tmp_path / "two", 2)
    del one["00000-grid.png"]
    assert len(two) == 6 and two == one


@pytest.mark.parametrize(
    "error, said", [(JaxsdError("disk full"), "^disk full$"), (KeyError("x"), "^KeyError: 'x'$")]
)
def test_what_fails_in_the_first_process_fails_in_all(error, said, monkeypatch):
    """Else the others would wait for it."""
    sent = []
    monkeypatch.setattr(processes, "agree", lambda value: sent.append(value) or sent[0])

    def fail():
        assert jax.process_index() == 0
        raise error

    with pytest.raises(type(error)):
        processes.first(fail)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(JaxsdError, match=said):
        processes.first(fail)
    sent[:] = [[None, {"loss": 0.5}]]
    assert processes.first(fail) == {"loss": 0.5}


# --- Meeting ---------------------------------------------------------------------------------

MEETING = [
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NODELIST"),
    *("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_ML_PLATFORM", "TPU_PROCESS_ADDRESSES"),
    *("TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"),
]


@pytest.fixture
def asked(monkeypatch):
    """What jax.distributed is asked for, in an environment that says nothing yet."""
    for name in MEETING:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return calls


GKE = {"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize(
    "env, meets",
    [
        ({}, False),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, False),  # keeps all of its GPUs
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_ML_PLATFORM": "JAX"}, True),  # Google Cloud: its metadata say which hosts there are
        (GKE | {"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        (GKE, False),
    ],
)
def test_processes_meet_where_a_launcher_has_started_several(env, meets, asked, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    processes.initialize()
    assert asked == ([(None, None, None)] if meets else [])


def test_what_is_said_goes_before_what_the_environment_says(asked, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "there:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    processes.initialize()
    processes.initialize("here:2", process_id=0)
    assert asked == [("there:1", 3, 2), ("here:2", 3, 0)]


@pytest.mark.parametrize(
    "given, said",
    [
        (("here", 2, 0), "coordinator must be HOST:PORT, not 'here'"),
        (("here:0", 2, 0), "coordinator must be HOST:PORT"),
        (("here:99999", 2, 0), "coordinator must be HOST:PORT"),
        (("here:1", None, None), "here:1 needs num_processes and process_id"),
        (("here:1", 2, 2), "process_id must be from 0 to 1 of 2 processes, not 2"),
        ((None, 2, 1), "need a coordinator: HOST:PORT"),
    ],
)
def test_a_meeting_that_cannot_be_is_refused(given, said, asked):
    with pytest.raises(JaxsdError, match=said):
        processes.initialize(*given)
    assert not asked


def test_a_number_in_the_environment_must_be_one(asked, monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(JaxsdError, match="JAX_PROCESS_ID must be a whole number, not 'first'"):
        processes.initialize()


def test_waiting_for_the_others_ends(tmp_path):
    """With one line, where jax would end the program with a page of addresses."""
    command = [sys.executable, "-m", "jaxsd", "train", "ddpm", "--workdir", str(tmp_path / "w")]
    where = f"127.0.0.1:{free_port()}"
    together = ["--coordinator", where, "--num-processes", "2", "--process-id", "1"]
    done = subprocess.run(
        [*command, *together, "--meeting-timeout", "2"],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith(
        f"error: process 1 of 2 has not met the others at {where} within 2 s"
    )
    assert not (tmp_path / "w").exists()
