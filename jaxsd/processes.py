"""Several processes as one: how they meet, and what they say to each other.

Every process runs the same command; together they hold one mesh of all their devices. The first
one writes what there is one of: logs, pictures, models. Alone, a process agrees with itself.
"""

import json
import os
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxsd.errors import JaxsdError


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins the other processes, if there are any; before anything else is asked of jax.

    coordinator: HOST:PORT of process 0, where it listens and the others find it, with the number of
    processes and which one this is. What is not given is read from JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID; without those, jax asks the launcher: TPU pods, Slurm
    (where a task gets one GPU, or those of JAX_LOCAL_DEVICE_IDS) and Open MPI are known. Elsewhere
    this does nothing: one process is all.

    JaxsdError if they have not met after `timeout` seconds.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number("JAX_NUM_PROCESSES", num_processes)
    process_id = _number("JAX_PROCESS_ID", process_id)
    given = (coordinator, num_processes, process_id)
    if coordinator is None and not _launched_together():
        if given != (None, None, None):
            raise JaxsdError("num_processes and process_id need a coordinator: HOST:PORT")
        return
    _check(*given)
    if jax.distributed.is_initialized():
        return
    # It would take SIGTERM for itself, and the loop has its own way to stop all processes at once.
    jax.config.update("jax_enable_preemption_service", False)

    failures: list[BaseException] = []

    def meet() -> None:
        try:
            jax.distributed.initialize(*given, initialization_timeout=1 << 20)
        except BaseException as error:
            failures.append(error)

    # In a thread of its own, for when jax's own patience ends it ends the whole program, and with
    # a page of addresses instead of a reason.
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(timeout)
    place = coordinator or "the address that the launcher says"
    who = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    if thread.is_alive():
        raise JaxsdError(
            f"{who} has not met the others at {place} within {timeout} s: are all of them "
            "running, and can they reach the port of process 0?"
        )
    if failures:
        reason = (str(failures[0]).splitlines() or [type(failures[0]).__name__])[0]
        raise JaxsdError(f"{who} cannot meet the others at {place}: {reason}") from failures[0]


def _number(name: str, given: int | None) -> int | None:
    text = os.environ.get(name)
    if given is not None or text is None:
        return given
    if not text.isdecimal():
        raise JaxsdError(f"{name} must be a whole number, not {text!r}")
    return int(text)


def _launched_together() -> bool:
    """Whether a launcher that jax can ask has started several processes, as far as one can see."""
    env = os.environ
    if "SLURM_STEP_NODELIST" in env and env.get("SLURM_NTASKS", "1") != "1":
        return True
    if env.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return True
    if "TPU_ML_PLATFORM" not in env:  # which jax sets where it finds TPUs
        return False
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts is not None:
        return "," in hosts
    return "TPU_SKIP_MDS_QUERY" not in env  # else the machine's metadata say, which jax reads


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is None:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise JaxsdError(f"coordinator must be HOST:PORT, not {coordinator!r}")
    if num_processes is None or process_id is None:
        if not _launched_together():
            raise JaxsdError(f"coordinator {coordinator} needs num_processes and process_id")
    elif not 0 <= process_id < num_processes:
        raise JaxsdError(
            f"process_id must be from 0 to {num_processes - 1} of {num_processes} processes, "
            f"not {process_id}"
        )


def is_first() -> bool:
    """Whether this is the process that writes logs, pictures and models."""
    return jax.process_index() == 0


def agree(value: Any) -> Any:
    """What the first process gives, in all of them; a JSON value. To be called by all."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text)] = text[:size]  # what others hold is not looked at
    return json.loads(np.asarray(broadcast_one_to_all(padded), np.uint8).tobytes())


def first(call: Callable[[], Any]) -> Any:
    """What call() gives in the first process, in all of them; a JSON value. To be called by all.

    The others do not call it, and wait. What it raises is raised in all: else they would wait for
    ever, or for someone who has left.
    """
    failure, said, value = None, None, None
    if is_first():
        try:
            value = call()
        except Exception as error:
            kind = "" if isinstance(error, JaxsdError) else f"{type(error).__name__}: "
            failure, said = error, f"{kind}{error}"
    said, value = agree([said, value])
    if failure is not None:
        raise failure
    if said is not None:
        raise JaxsdError(said)
    return value


def wait_for_all(what: str) -> None:
    """Returns once every process has come here; `what` tells this place from others."""
    from jax.experimental.multihost_utils import sync_global_devices

    sync_global_devices(what)
