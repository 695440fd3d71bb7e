"""What a program needs on NVIDIA GPUs, without a GPU: compiled ahead of time by jax's plugin.

    python benchmarks/gpu.py --program step --model sd1 --gpu h200 --batch 1
    python benchmarks/gpu.py --program training --model sd2 --gpu rtx4090 --batch 1

prints for each GPU the bytes (arguments: weights or the state, and the batch; temporaries; the two
together) beside what it has, kernels and their bytes by kind, and a least time (gpu_estimate.py).
The compiler places every buffer, so these are the bytes there would be, but for what cuDNN and
cuBLAS take for themselves; which of their algorithms is fastest only a GPU can tell. Needs
`pip install "jaxsd[cuda]"` on Linux, and a minute or two. Programs as in tpu.py.
"""

import collections
import dataclasses
import json
import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

# Before jax is imported: arrays live on the host.
os.environ["JAX_PLATFORMS"] = "cpu"

import gpu_estimate
import programs
import tpu_estimate
import tyro


@dataclasses.dataclass(frozen=True)
class Options(programs.Options):
    gpu: Literal["h200", "h100", "a100", "rtx4090"] = "h200"
    gpus: int = 1
    """So many of them, of one machine."""


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """What compiling says. folder: where XLA dumps the grids."""
    gpu = gpu_estimate.GPUS[options.gpu]
    with gpu_estimate.without_a_gpu(options.gpu, options.gpus) as devices:
        program, given = programs.make(options, devices)
        start = time.perf_counter()
        chosen: dict[str, str | bool] = {"xla_dump_to": str(folder)}
        if gpu.capability < (9, 0):  # for which Triton's first choice of tiles is none
            chosen["xla_gpu_enable_triton_gemm"] = False
        compiled = program.lower(*given).compile(chosen)
        seconds = time.perf_counter() - start
    text = compiled.as_text()
    if options.hlo is not None:
        options.hlo.write_text(text)
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "not donated": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    estimate = gpu_estimate.GpuProgram(text, gpu, gpu_estimate.grids(folder))
    kinds = collections.defaultdict(collections.Counter)
    for row in estimate.rows:
        kinds[row.kind]["kernels"] += row.count
        kinds[row.kind]["bytes"] += row.count * row.bytes
        kinds[row.kind]["milliseconds"] += row.count * row.seconds * 1e3
    return {
        "gpus": len(devices),
        "versions": {name: metadata.version(name) for name in ("jax", "jax-cuda12-pjrt")},
        "compile_seconds": seconds,
        "bytes": {**sizes, "together": sum(sizes.values()), "there": int(gpu.memory * 2**30)},
        "kinds": kinds,
        "tflop": estimate.flops / 1e12,
        "collectives": tpu_estimate.summed(gpu_estimate.collectives(text)),
        "least_milliseconds": estimate.seconds * 1e3,
    }


def report(options: Options, found: dict[str, Any]) -> None:
    what = options.recipe if options.program == "training" else options.program
    print(
        f"{what}, {options.model}, {options.size} px, {options.batch} a GPU, {found['gpus']} "
        f"{options.gpu}, {options.dtype}, "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    )
    print(f"compiled in {found['compile_seconds']:.0f} s\n\n| a GPU | |\n| --- | --- |")
    for kind, size in found["bytes"].items():
        print(f"| {kind} | {size / 2**30:.2f} GiB |")
    print(f"| arithmetic | {found['tflop']:.2f} TFLOP |")
    print(f"| least time | {found['least_milliseconds']:.2f} ms |\n")
    print("| kind | kernels | GB | least ms |\n| --- | --- | --- | --- |")
    for kind, row in sorted(found["kinds"].items()):
        sizes = f"{row['bytes'] / 1e9:.2f} | {row['milliseconds']:.2f}"
        print(f"| {kind} | {row['kernels']:.0f} | {sizes} |")
    if found["collectives"]:
        print("\n| collective | number | GB | while computing |\n| --- | --- | --- | --- |")
    for kind, row in found["collectives"].items():
        share = row["meanwhile"] / max(1, row["bytes"])
        print(f"| {kind} | {row['number']} | {row['bytes'] / 1e9:.3f} | {share:.0%} |")


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    if options.json:
        json.dump(found, sys.stdout, indent=2)
    else:
        report(options, found)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
