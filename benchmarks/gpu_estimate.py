"""What a program compiled for an NVIDIA GPU does, and at least takes, from its text: no GPU needed.

Each kernel takes its arithmetic at the peak or its bytes at the memory's bandwidth, whichever is
longer, and `BETWEEN` to begin and end. One of fewer blocks than there are multiprocessors has their
share of the bandwidth. Nothing is known of caches, nor of how near to the peak a kernel comes, and
what GPUs send each other takes no time, so times are least times: they rank designs. What matters
most stands beside them: kernels, and bytes.
"""

import collections
import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jax.experimental import topologies
from tpu_estimate import COLLECTIVE, Chip, Instruction, Program, Row, Sent, parse

BETWEEN = 2e-6  # seconds from one kernel of a CUDA graph to the next
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {most_shared}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


class Gpu(NamedTuple):
    name: str  # as JAX has it
    capability: tuple[int, int]
    flops: float  # a second, of bfloat16, summed in float32
    bandwidth: float  # bytes a second
    cores: int  # multiprocessors
    units: int  # of float32, each
    threads: int
    shared: int  # KiB, each; a block may have one less
    cache: int  # MiB
    clock: float  # GHz
    memory: float  # GiB

    def description(self) -> str:
        """For XLA, in the text form of its GpuTargetConfig."""
        major, minor = self.capability
        return _DESCRIPTION.format(
            **self._asdict()
            | {
                "bandwidth": int(self.bandwidth),
                "shared": self.shared << 10,
                "most_shared": self.shared - 1 << 10,
                "cache": self.cache << 20,
                "memory": int(self.memory * 2**30),
                "major": major,
                "minor": minor,
            }
        )


GPUS = {
    "h200": Gpu("NVIDIA H200", (9, 0), 989e12, 4.8e12, 132, 128, 2048, 228, 50, 1.98, 139.8),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 989e12, 3.35e12, 132, 128, 2048, 228, 50, 1.98, 79.1
    ),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 312e12, 2.04e12, 108, 64, 2048, 164, 40, 1.41, 79.2
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 165e12, 1.01e12, 128, 128, 1536, 100, 72, 2.52, 23.6
    ),
}


@contextlib.contextmanager
def without_a_gpu(name: str, count: int = 1) -> Iterator[list[Any]]:
    """Devices of GPUs that are not there; only inside, programs can be compiled for them."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    gpu = GPUS[name]
    before = cudnn.check_compute_capability, cudnn.is_cuda_compute_capability_equal
    # jax asks the GPUs of this process for what cuDNN can do on them
    cudnn.check_compute_capability = lambda text: _capability(text) <= gpu.capability
    cudnn.is_cuda_compute_capability_equal = lambda text: _capability(text) == gpu.capability
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=gpu.description(), topology=f"1x{count}x1"
        )
        yield list(topology.devices)
    finally:
        cudnn.check_compute_capability, cudnn.is_cuda_compute_capability_equal = before


def _capability(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


class GpuProgram(Program):
    """A compiled program's text, taken apart; kinds: convolution, attention, product, other."""

    def __init__(self, text: str, gpu: Gpu, blocks: dict[str, int]):
        """blocks: of each kernel's grid, by the instruction's name (`grids`)."""
        self._gpu, self._blocks = gpu, blocks
        super().__init__(text, Chip(gpu.flops, gpu.bandwidth, gpu.clock * 1e9, gpu.memory))

    def _row(self, computation: str, it: Instruction, count: int) -> Row:
        flops, moved = self._of_instruction(computation, it), self._moved(computation, it)
        busy = min(1.0, self._blocks.get(it.name, self._gpu.cores) / self._gpu.cores)
        seconds = max(flops / self._gpu.flops, moved / (self._gpu.bandwidth * busy)) + BETWEEN
        target = it.attribute(r'custom_call_target="([^"]*)"')
        kind = "convolution" if "conv" in target else "attention" if "fmha" in target else "product"
        kind = kind if flops else "other"
        return Row(it.name, kind, count, flops, moved, seconds, it.attribute(r'op_name="([^"]*)"'))

    def _moved(self, computation: str, it: Instruction) -> float:
        """Without the room that a library asks for to work in, the last of a call's results."""
        scratch = it.op == "custom-call" and len(it.shapes) > 1 and len(it.shapes[-1].dims) == 1
        return super()._moved(computation, it) - (it.shapes[-1].size if scratch else 0)

    def _of_instruction(self, computation: str, it: Instruction) -> float:
        target = it.attribute(r'custom_call_target="([^"]*)"')
        if not target:
            return super()._of_instruction(computation, it)
        around = self._computations[computation]
        given = [around[name].shapes[0].dims for name in it.operands[:2] if name in around]
        made = it.shapes[0].dims
        if "conv" in target:  # of gradients, the labels are those of what they are the gradient of
            if "BackwardFilter" in target:
                return self._convolution(it, given[0], made, given[1])
            if "BackwardInput" in target:
                return self._convolution(it, made, given[1], given[0])
            return self._convolution(it, given[0], given[1], made)
        if "fmha" in target:
            (b, t, h, d), (_, s, *_) = given
            products = 5 if "Backward" in target else 2  # of the gradient, the scores again
            return 2.0 * products * b * h * t * s * d
        if axes := it.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]'):
            summed = (given[0][int(axis)] for axis in re.findall(r"\d+", axes))
            return 2.0 * math.prod(made) * math.prod(summed)
        return 0.0


def collectives(text: str) -> dict[str, list[Sent]]:
    """Of a compiled program, by kind; meanwhile: a kernel is launched before it has to be there.

    What is in the body of a loop is listed once.
    """
    found: dict[str, list[Sent]] = collections.defaultdict(list)
    begun: dict[str, tuple[int, int]] = {}  # bytes, and kernels before
    kernels = 0
    for it in filter(None, map(parse, text.splitlines())):
        match = COLLECTIVE.match(it.op)
        if it.op in ("fusion", "custom-call"):
            kernels += 1
        elif match and match[2] == "-done":
            size, before = begun.pop(it.operands[0])
            found[match[1]].append(Sent(size, kernels > before))
        elif match:
            sizes = [shape.size for shape in it.shapes]
            if match[2] and match[1] != "all-reduce":  # what it takes, and what it gives
                sizes = sizes[len(sizes) // 2 :]
            if match[2]:
                begun[it.name] = (sum(sizes), kernels)
            else:
                found[match[1]].append(Sent(sum(sizes), False))
    return dict(found)


def grids(folder: Path) -> dict[str, int]:
    """Blocks of each kernel that a program launches, by instruction, as XLA dumped them."""
    found: dict[str, int] = {}
    for sequence in folder.glob("*.thunk_sequence.txt"):
        metadata = sequence.with_name(sequence.name.replace("sequence", "metadata"))
        names = {
            int(number): name
            for name, number in re.findall(
                r'profile_annotation: "([^"]+)"\s+thunk_id: (\d+)', metadata.read_text()
            )
        }
        for number, x, y, z in re.findall(
            r"^\s*(\d+): .*grid: \[(\d+), (\d+), (\d+)\]", sequence.read_text(), re.M
        ):
            if int(number) in names:
                found[names[int(number)]] = int(x) * int(y) * int(z)
    return found
