"""The device that a side of `beside.py` works on, as its library knows it."""

import time
from typing import Any

SIDE = 2048  # of the matrices whose product says how fast a CPU is


class OnJax:
    """With what commands of jaxsd set for their process."""

    def __init__(self, jax: Any):
        from jaxsd import memory

        self._jax = jax
        memory.give_back_after_compiling()

    def device(self) -> str:
        return self._jax.devices()[0].device_kind

    def fastest(self) -> float | None:
        """FLOP/s that the device is made for; None where its maker says nothing."""
        from jaxsd.training.throughput import peak_flops

        return peak_flops(self.device())

    def device_peak(self) -> int | None:
        """Bytes that were in use at most; None where the device does not tell."""
        return (self._jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class OnTorch:
    """On the GPU if there is one, else on CPU with so many threads."""

    def __init__(self, torch: Any, threads: int, dtype: str):
        self._torch, self._dtype = torch, getattr(torch, dtype)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(threads)

    def flops(self) -> None:
        """Ours are counted."""

    def device(self) -> str:
        gpu = self._device.type == "cuda"
        return self._torch.cuda.get_device_name() if gpu else "cpu"

    def fastest(self) -> float | None:
        """FLOP/s of a matrix product, the best of some, on CPU; None on a GPU."""
        if self._device.type != "cpu":
            return None
        matrix = self._torch.ones(SIDE, SIDE, dtype=self._dtype)

        def seconds() -> float:
            begin = time.perf_counter()
            matrix @ matrix
            return time.perf_counter() - begin

        return 2 * SIDE**3 / min(seconds() for _ in range(30))

    def device_peak(self) -> int | None:
        gpu = self._device.type == "cuda"
        return self._torch.cuda.max_memory_allocated() if gpu else None
