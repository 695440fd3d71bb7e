"""What jaxsd costs beside diffusers, on the same device in the same run.

python benchmarks/beside.py --model sd1 --parts text unet decode

Each side has a process of its own, and they work in turns; with --apart only one of them is there
at a time, for what does not fit twice: each loads the model anew in each round. Printed are ratios
of jaxsd to the peer (below 1 is faster, or smaller): median, least and most over the turns, with
what each needs to start; then the seconds they are ratios of, and pictures (or steps of one, or
prompts) a second. "Of peak" is our arithmetic, of the plain forms, beside what the device's maker
says, or on a CPU beside a matrix product of torch's (convolutions by Winograd's algorithm may take
it above 100 %). Weights are random, written once by diffusers; what both say of the same
input is compared, so that the work is the same. On a GPU: --dtype bfloat16 --peers eager compile
--batches 1 4 16. First call includes compiling; with --cold nothing is there that was compiled
before.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from latents import Recipe
from sides import Work

from jaxsd.compilation_cache import default_folder
from jaxsd.families import FAMILIES, Family
from jaxsd.models import UNetConfig

COMPARED = ("text", "unet", "decode")  # which begin with the same, and draw nothing
Part = Literal["text", "unet", "decode", "image", "train"]


@dataclasses.dataclass(frozen=True)
class Options:
    model: str = "sd1"
    """A family of jaxsd/families.py, of random weights, or a diffusers folder."""
    narrower: int = 1
    """Divides the channels of a family's UNet: training at full width takes 30 GB for both."""
    parts: tuple[Part, ...] = ("text", "unet", "decode")
    """Text encoding, a UNet step with guidance, decoding, whole pictures, a training step."""
    peers: tuple[Literal["eager", "compile"], ...] = ("eager",)
    """diffusers, channels last: as it is, or by torch.compile."""
    size: int = 512
    batches: tuple[int, ...] = (1,)
    """Pictures at a time: 1 is for latency, more for throughput."""
    steps: int = 50
    """Of whole pictures."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: Literal["none", "selective", "full"] = "full"
    """Of training, what is computed twice; in torch all of it, or nothing."""
    recipes: tuple[Recipe, ...] = ("text-to-image",)
    """Of training: text-to-image, and distillations of the model, each a row."""
    rounds: int = 5
    apart: bool = False
    """One side in memory at a time, loaded anew for each round."""
    threads: int = os.cpu_count() or 1
    """Of the peer, on CPU."""
    cold: bool = False
    """Have jaxsd compile, with an empty cache, instead of loading what it compiled before."""
    folder: Path | None = None
    """Where the random weights are kept for the next time."""
    json: Path | None = None
    """Where to write the figures."""


class Side:
    """A process of sides.py, and what was measured of it; it may begin and end several times."""

    def __init__(self, name: str, work: Work, environment: dict[str, str]):
        self.name, self.out, self.seconds, self.memory = name, work.out, [], 0
        self.start: dict[str, Any] = {}
        script = str(Path(__file__).with_name("sides.py"))
        self._command = [sys.executable, script, name, json.dumps(dataclasses.asdict(work))]
        self._environment = os.environ | environment
        self._running: subprocess.Popen | None = None

    def begin(self) -> None:
        """Starts, loads, and makes the first call; how long that took the first time is kept."""
        self._running = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        start = self._read()
        start["first"] = self._once()
        self.start = self.start or start

    def once(self) -> None:
        self.seconds.append(self._once())

    def end(self) -> None:
        self._process.stdin.close()
        self.memory = max(self.memory, self._read()["peak"])
        self._process.wait()

    def kill(self) -> None:
        if self._running is not None:
            self._running.kill()

    @property
    def _process(self) -> Any:
        assert self._running is not None, "begin() comes first"
        return self._running

    def _once(self) -> float:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended with status {self._process.wait()}")


def measure(
    options: Options,
    folder: str,
    part: Part,
    batch: int,
    scratch: Path,
    recipe: Recipe | None = None,
) -> list[dict[str, Any]]:
    """A row for each peer."""
    names = ("jaxsd", *options.peers)
    # Without --cold what it compiles is kept from one process to the next
    cache = scratch / "programs" if options.cold else default_folder()
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in names:
            out = str(scratch / f"{part}-{name}.npy")
            work = Work(folder, part, batch, options.size, options.steps, options.dtype,
                        options.remat, recipe, options.threads, out)  # fmt: skip
            sides[name] = Side(name, work, environment)
            stack.callback(sides[name].kill)
        if options.apart:
            for _ in range(options.rounds):
                for side in sides.values():
                    side.begin()
                    side.once()
                    side.end()
        else:
            for side in sides.values():
                side.begin()
            for _ in range(options.rounds):
                for side in sides.values():
                    side.once()
            for side in sides.values():
                side.end()
    ours, rows = sides["jaxsd"], []
    flops = ours.start["flops"]
    for name in options.peers:
        peer = sides[name]
        fastest = ours.start["fastest"] or peer.start["fastest"]
        seconds = {side: float(np.median(sides[side].seconds)) for side in ("jaxsd", name)}
        ratios = np.asarray(ours.seconds) / np.asarray(peer.seconds)
        row = {
            "part": recipe or part, "batch": batch, "peer": name, "device": ours.start["device"],
            "ratio": [float(np.median(ratios)), float(ratios.min()), float(ratios.max())],
            "seconds": seconds,
            "first": {n: sides[n].start["first"] for n in ("jaxsd", name)},
            "import": {n: sides[n].start["import"] for n in ("jaxsd", name)},
            "load": {n: sides[n].start["load"] for n in ("jaxsd", name)},
            "memory": {n: sides[n].memory for n in ("jaxsd", name)},
            "difference": _difference(ours.out, peer.out) if part in COMPARED else None,
            "tflop": flops / 1e12,
            "share_of_peak": fastest and flops / seconds["jaxsd"] / fastest,
        }  # fmt: skip
        rows.append(row)
    return rows


def _difference(ours: str, theirs: str) -> float:
    """The most that results differ, as a share of the largest."""
    a, b = np.load(ours), np.load(theirs)
    return float(np.abs(a - b).max() / np.abs(b).max())


def heading(device: str) -> str:
    """Of the table of ratios, a row of which is `line`."""
    return (
        f"| jaxsd / peer, {device} | batch | time | range | of peak | memory | first call | import "
        "| load | differ |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )


def line(row: dict[str, Any]) -> str:
    """Of what `measure` found with one peer."""
    middle, low, high = row["ratio"]
    ratios = " | ".join(
        f"{row[what]['jaxsd'] / max(row[what][row['peer']], 1e-9):.2f}"
        for what in ("memory", "first", "import", "load")
    )
    differ = "–" if row["difference"] is None else f"{row['difference']:.0e}"
    share = f"{row['share_of_peak']:.0%}" if row["share_of_peak"] else "–"
    return (
        f"| {row['part']}, {row['peer']} | {row['batch']} | {middle:.2f} "
        f"| {low:.2f} – {high:.2f} | {share} | {ratios} | {differ} |"
    )


def absolute(rows: list[dict[str, Any]]) -> str:
    """A table of what the ratios are of: seconds mean something on the device alone."""
    titles = (
        "| {} | batch | s | peer's s | pictures/s | TFLOP/s | GB | first call | import | load |"
    )
    table = [titles.format(rows[0]["device"]), "|" + " --- |" * 10]
    for row in rows:
        own = {
            name: row[name]["jaxsd"] for name in ("seconds", "memory", "first", "import", "load")
        }
        table.append(
            f"| {row['part']}, {row['peer']} | {row['batch']} | {own['seconds']:.3f} "
            f"| {row['seconds'][row['peer']]:.3f} | {row['batch'] / own['seconds']:.2f} "
            f"| {row['tflop'] / own['seconds']:.2f} "
            f"| {own['memory'] / 1e9:.2f} | {own['first']:.2f} | {own['import']:.2f} "
            f"| {own['load']:.2f} |"
        )
    return "\n".join(table)


def narrowed(family: Family, by: int) -> Family:
    """The family with a UNet of `by` times fewer channels, heads as many."""
    assert isinstance(family.unet, UNetConfig)
    widths = tuple(width // by for width in family.unet.block_out_channels)
    return dataclasses.replace(
        family, unet=dataclasses.replace(family.unet, block_out_channels=widths)
    )


def main(options: Options) -> None:
    if options.narrower != 1 and options.model not in FAMILIES:
        raise SystemExit(f"--narrower is of a family, and {options.model} is none")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if options.model in FAMILIES:
            from random_model import write

            place = options.folder or Path(scratch) / "model"
            if not (place / "model_index.json").exists():
                write(narrowed(FAMILIES[options.model], options.narrower), place)
            folder = str(place)
        settings = dataclasses.asdict(options) | {"folder": None, "json": None}
        rows: list[dict[str, Any]] = []
        for part in options.parts:
            for recipe in options.recipes if part == "train" else (None,):
                for batch in options.batches:
                    found = measure(options, folder, part, batch, Path(scratch), recipe)
                    if not rows:
                        print(heading(found[0]["device"]))
                    rows += found
                    print(*map(line, found), sep="\n", flush=True)
                    # As it goes: a part that fails, for want of memory say, leaves those before it
                    if options.json is not None:
                        text = json.dumps({"options": settings, "rows": rows}, indent=1)
                        options.json.write_text(text)
        print("", absolute(rows), sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
