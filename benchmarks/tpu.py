"""What a program needs on TPUs, without a TPU: compiled ahead of time by libtpu.

    python benchmarks/tpu.py --program step --model sd1 --topology v5e:2x4 --chips 1 --bundles
    python benchmarks/tpu.py --program training --model sd1 --topology v5e:4x4 --fsdp 16 --batch 8

prints for each chip the bytes (arguments: weights or the state, and the batch; temporaries; the two
together) beside what it has, what the chips send each other, and an estimate of the time and of the
share of the peak (tpu_estimate.py; with --bundles a better one, tpu_bundles.py). The compiler
places every buffer, so these are the bytes there would be; the time is an estimate. Needs
`pip install "jax[tpu]"`, any x86 machine, and some minutes. A program that is too large is refused
as on the chip.

`step` is the UNet with guidance once, `sampling` the loop of `--steps` of them by DDIM, both in the
dtype and data-parallel; `training` is `train.py text-to-image` on cached latents, or another
`--recipe`. A share of the peak counts products and convolutions without what pads them.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# Before jax is imported: there is no machine to ask what it is, and arrays live on the host.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import programs
import tpu_bundles
import tpu_estimate
import tyro
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Options(programs.Options):
    topology: str = "v5e:4x4"
    """The chips: a generation and a grid, such as v5e:4x4, v6e:2x2 or v5p:2x2x1."""
    chips: int | None = None
    """So many of them alone."""
    fsdp: int = 16
    """Chips over which a training's state is split."""
    bundles: bool = False
    """Count the bundles that the chip would issue."""


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """What compiling says; SystemExit where the program is refused. folder: of dumped bundles."""
    generation = options.topology.split(":")[0]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    devices = topology.devices[: options.chips]
    program, given = programs.make(options, devices)
    start = time.perf_counter()
    try:
        compiled = program.lower(*given).compile()
    except jax.errors.JaxRuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise SystemExit("refused: " + "\n".join(lines[:8])) from None
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    if options.hlo is not None:
        options.hlo.write_text(text)

    chip = tpu_estimate.CHIPS[generation]
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "not donated": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    bundles = tpu_bundles.read(folder) if options.bundles else None
    estimate = tpu_estimate.Program(text, chip, bundles)
    kinds: dict[str, float] = {}
    for row in estimate.rows:
        kinds[row.kind] = kinds.get(row.kind, 0.0) + row.count * row.seconds
    return {
        "chips": len(devices),
        "versions": {name: metadata.version(name) for name in ("jax", "libtpu")},
        "compile_seconds": seconds,
        "bytes": {**sizes, "together": sum(sizes.values()), "usable": int(chip.usable * 2**30)},
        "milliseconds": estimate.seconds * 1e3,
        "milliseconds_by_kind": {kind: time * 1e3 for kind, time in kinds.items()},
        "tflop": estimate.flops / 1e12,
        "share_of_peak": estimate.flops / chip.flops / estimate.seconds,
        "collectives": tpu_estimate.summed(tpu_estimate.collectives(text)),
    }


def report(options: Options, found: dict[str, Any]) -> None:
    what = options.recipe if options.program == "training" else options.program
    print(
        f"{what}, {options.model}, {options.size} px, {options.batch} a chip, {found['chips']} "
        f"of {options.topology}, {options.dtype}, "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    )
    if options.program == "training":
        print(
            f"fsdp {options.fsdp}, tensor {options.tensor}, {options.optimizer}, "
            f"remat {options.remat}, {options.accumulate} parts"
        )
    print(f"compiled in {found['compile_seconds']:.0f} s\n\n| a chip | |\n| --- | --- |")
    for kind, size in found["bytes"].items():
        print(f"| {kind} | {size / 2**30:.2f} GiB |")
    by = "bundles" if options.bundles else "the compiler's cycles"
    print(f"| estimated time, by {by} | {found['milliseconds']:.1f} ms |")
    for kind, time_ in found["milliseconds_by_kind"].items():
        print(
            f"| … of {kind}s | {time_:.1f} ms |"
            if kind != "other"
            else f"| … else | {time_:.1f} ms |"
        )
    print(f"| arithmetic | {found['tflop']:.2f} TFLOP |")
    print(f"| estimated share of peak | {found['share_of_peak']:.0%} |\n")
    print("| collective | number | GiB, of the whole arrays | while computing |")
    print("| --- | --- | --- | --- |")
    for kind, row in found["collectives"].items():
        share = row["meanwhile"] / max(1, row["bytes"])
        print(f"| {kind} | {row['number']} | {row['bytes'] / 2**30:.3f} | {share:.0%} |")


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if options.bundles:  # read when libtpu is loaded
            os.environ["LIBTPU_INIT_ARGS"] = tpu_bundles.FLAGS.format(folder=folder)
        found = measure(options, Path(folder))
    if options.json:
        json.dump(found, sys.stdout, indent=2)
    else:
        report(options, found)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
