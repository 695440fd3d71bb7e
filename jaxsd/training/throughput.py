"""How fast a training is: images a second, FLOPs and their share of the peak, waiting, memory."""

import contextlib
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.extend import core

from jaxsd import kernels, processes

# Dense bf16 FLOP/s with float32 sums, of what JAX calls a device, from the makers' data sheets.
# (A TPU v2 or v3 chip is two devices.) The first pattern that is found in the device's kind counts.
PEAKS = {
    r"TPU v6": 918e12,
    r"TPU v5( lite|e)": 197e12,
    r"TPU v5": 459e12,
    r"TPU v4 lite": 138e12,
    r"TPU v4": 275e12,
    r"TPU v3": 61.5e12,
    r"TPU v2": 22.5e12,
    r"GB200": 2500e12,
    r"B200": 2250e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H[12]00": 989e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"L4\b": 121e12,
    r"RTX 4090": 165e12,
    r"RTX 3090": 71e12,
}


# The columns of the log that hold for one run on one machine; the others come again to the bit.
MEASURED = {
    *("images_per_second", "images_per_second_per_device", "tflops_per_device", "share_of_peak"),
    *("seconds_waiting", "share_waiting", "memory_gib"),
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of matrix products in bfloat16 that a device is made for; None if it isn't known."""
    return next((peak for name, peak in PEAKS.items() if re.search(name, device_kind)), None)


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of the matrix products and convolutions in function(*args); shapes do for arguments.

    A multiplication and an addition are two. Zeros of padding count, those between the entries of a
    dilated input do not, so the gradient of a layer takes twice what the layer takes. A scan counts
    as often as it runs, a Pallas kernel as often as its grid says, the costliest branch of a
    condition once, and the body of a `while`, whose length no one knows, once. Attention and
    convolutions count as they are defined, in whatever form a platform computes them.
    """
    with kernels.compiling_for("any"):
        return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        params = eqn.params
        shapes: list[Any] = [getattr(x.aval, "shape", ()) for x in (*eqn.invars, *eqn.outvars)]
        inside = [_count(sub) for sub in core.jaxprs_in_params(params)]
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                depth = math.prod(shapes[0][axis] for axis in contracted)
                total += 2 * math.prod(shapes[-1]) * depth
            case "conv_general_dilated":
                _, *axes = params["dimension_numbers"].rhs_spec  # inputs, height, width
                depth = math.prod(shapes[1][axis] for axis in axes)
                zeros = math.prod(params["lhs_dilation"])
                total += 2 * math.prod(shapes[-1]) * depth / zeros
            case "scan":
                total += params["length"] * sum(inside)
            case "cond":
                total += max(inside)
            case "pallas_call":
                total += math.prod(params["grid_mapping"].grid) * sum(inside)
            case _:
                total += sum(inside)
    return total


def memory_in_use() -> float:
    """GiB: the most that one of this process's devices, or else the process, has held so far."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit) / 2**30


class Meter:
    """What a step costs, between one row of the log and the next.

    batch_size: of all devices together. flops_of(batch): the model's FLOPs in a step with it.
    """

    def __init__(self, batch_size: int, flops_of: Callable[[Any], float]):
        self._batch_size, self._flops_of = batch_size, flops_of
        self._known: dict[Any, float] = {}  # by the shapes in a batch
        self._clock: float | None = None
        self._steps, self._flops, self._waited = 0, 0.0, 0.0

    def after(self, batch: Any, result: Any, waited: float) -> None:
        """Counts a step just begun. The first, which is compiled, is waited for and left out.

        waited: seconds altogether, for data.
        """
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(batch))
        if shapes not in self._known:
            with self.aside():
                self._known[shapes] = self._flops_of(batch)
        if self._clock is None:
            jax.block_until_ready(result)
            self._clock, self._waited = time.perf_counter(), waited
            return
        self._steps += 1
        self._flops += self._known[shapes]

    def row(self, waited: float) -> dict[str, float]:
        """What to log of the steps since the last row. waited: as for `after`."""
        devices, now = jax.device_count(), time.perf_counter()
        row = {"memory_gib": memory_in_use()}
        if self._clock is not None and self._steps:
            seconds = now - self._clock
            rate, flops = self._steps * self._batch_size / seconds, self._flops / seconds / devices
            row |= {
                "images_per_second": rate,
                "images_per_second_per_device": rate / devices,
                "tflops_per_device": flops / 1e12,
                "seconds_waiting": waited - self._waited,
                "share_waiting": (waited - self._waited) / seconds,
            }
            if peak := peak_flops(jax.devices()[0].device_kind):
                row["share_of_peak"] = flops / peak
        self._clock, self._steps, self._flops, self._waited = now, 0, 0.0, waited
        return row

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside takes no time; no step may be under way that is still to count."""
        start = time.perf_counter()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - start


class Profile:
    """A trace of `count` steps in `folder`, after the first `start` steps of this run."""

    def __init__(self, folder: Path, start: int, count: int):
        self._folder, self._start, self._end = folder, start, start + count
        self._running = False

    def after(self, steps: int, result: Any) -> None:
        """To be called after every step begun, with its number in this run."""
        if steps == self._start < self._end and processes.is_first():
            jax.block_until_ready(result)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif steps == self._end and self._running:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
