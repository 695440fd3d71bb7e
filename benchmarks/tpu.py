"""What a training step needs on a TPU, without a TPU: compiled ahead of time by libtpu.

    python benchmarks/tpu.py --topology v5e:4x4 --model sd1 --fsdp 16 --batch 8 --remat full

prints the bytes on each chip (arguments: the state and the batch; temporaries; the two together)
beside what a chip has, and what the chips send each other. The compiler places every buffer, so
these are the bytes there would be; times cannot be had this way. Needs `pip install "jax[tpu]"`,
any x86 machine, and some minutes. A program that is too large is refused as on the chip. The
training is `train.py text-to-image` on cached latents, or another `--recipe`.
"""

import collections
import dataclasses
import os
import re
import time
from pathlib import Path

# Before jax is imported: there is no machine to ask what it is, and arrays live on the host.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import tyro
from jax.experimental import topologies
from jax.sharding import NamedSharding
from latents import Latents, Recipe, held, objective

from jaxsd import families, sharding, training
from jaxsd.training.placement import compile_step, make_mesh, spread

# GiB of a chip's memory that programs may use.
USABLE = {"v5e": 15.75, "v6e": 31.25, "v5p": 95.74}


@dataclasses.dataclass(frozen=True)
class Options:
    recipe: Recipe = "text-to-image"
    topology: str = "v5e:4x4"
    """The chips: a generation and a grid, such as v5e:4x4, v6e:2x2 or v5p:2x2x1."""
    model: str = "sd1"
    """A family, whose UNet is trained on cached latents."""
    size: int = 512
    """Of the pictures, in pixels."""
    batch: int = 8
    """Pictures for each chip."""
    accumulate: int = 1
    fsdp: int = 16
    tensor: int = 1
    remat: str = "full"
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    hlo: Path | None = None
    """Where to write the compiled program, for a closer look."""


def main(options: Options) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    chips = len(topology.devices)
    settings = training.Options(
        1000,
        batch_size=options.batch * chips,
        **{
            name: getattr(options, name)
            for name in ("accumulate", "fsdp", "tensor", "remat", "dtype", "optimizer")
        },
    )
    mesh = make_mesh(settings, topology.devices)
    family = families.get_family(options.model)
    goal = objective(options.recipe, family, options.dtype)
    optimizer = training.make_optimizer(settings)

    state, aux = spread(held(goal, optimizer, settings), settings, mesh)
    rows = NamedSharding(mesh, sharding.ROWS)
    batch = {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=rows)
        for name, shape in Latents(family).shapes(settings.batch_size, options.size).items()
    }
    step = compile_step(training.make_step(goal, optimizer, settings), state, settings)

    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    print(
        f"{options.recipe}, {options.model}, {options.size} px, "
        f"{options.batch} a chip of {options.topology}, {sizes}"
    )
    print(
        f"{options.dtype}, {options.optimizer}, remat {options.remat}, {options.accumulate} parts"
    )
    start = time.perf_counter()
    try:
        compiled = step.lower(state, aux, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        print("refused: " + "\n".join(lines[:8]))
        raise SystemExit(1) from None
    print(f"compiled in {time.perf_counter() - start:.0f} s\n")

    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    extra = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    kinds = {"arguments": arguments, "temporaries": temporary, "not donated": extra, "code": code}
    usable = USABLE[options.topology.split(":")[0]]
    print("| a chip | GiB |\n| --- | --- |")
    for kind, size in [*kinds.items(), ("together", sum(kinds.values()))]:
        print(f"| {kind} | {size / 2**30:.2f} |")
    print(f"| usable | {usable} |\n")

    text = compiled.as_text()
    if options.hlo is not None:
        options.hlo.write_text(text)
    print("| collective | number | GiB, of the whole arrays |\n| --- | --- | --- |")
    for kind, found in sorted(collectives(text).items()):
        print(f"| {kind} | {len(found)} | {sum(found) / 2**30:.3f} |")


_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r" = (?P<shape>\(.*?\)|\S+) "
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def collectives(text: str) -> dict[str, list[int]]:
    """Of a compiled program, by kind: the bytes of each, in a chip's view, before any scattering.

    A sum of which each chip keeps its piece is a reduce-scatter, however the compiler writes it.
    What is in the body of a loop is listed once.
    """
    found: dict[str, list[int]] = collections.defaultdict(list)
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line
        if match := _COLLECTIVE.search(line):
            kind = match["kind"]
            if kind == "all-reduce" and "all-reduce-scatter" in computation:
                kind = "reduce-scatter"
            found[kind].append(sum(_bytes(m) for m in _SHAPE.finditer(match["shape"])))
    return found


def _bytes(shape: re.Match) -> int:
    bits = 8 if shape[1] == "pred" else int(shape[2])
    count = 1
    for size in filter(None, shape[3].split(",")):
        count *= int(size)
    return count * bits // 8


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
