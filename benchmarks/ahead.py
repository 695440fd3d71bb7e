"""From the command to the picture: with and without programs made ahead of time.

    python benchmarks/ahead.py --model digits

runs `sample.py` for one picture in fresh processes, in turns: with an empty cache of compiled
programs and a full one, as it is and with what `jaxsd compile` wrote. Prints the wall time, and its
parts as jax counts them: tracing and lowering, compiling, reading from the cache. Then the loop of
denoising alone, from a loaded model to its latents, with a full cache: traced, from StableHLO, and
from an executable that jax serialised, which jaxsd does not do.
"""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
PARTS = {
    "traced": ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration"),
    "compiled or read": ("backend_compile_duration",),
}


@dataclasses.dataclass(frozen=True)
class Options:
    model: str = "digits"
    prompt: str = "a red seven"
    steps: int = 30
    size: int | None = None
    """Height and width; by default the model's."""
    dtype: str = "float32"
    rounds: int = 5
    cold: bool = True
    """Also with an empty cache."""


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        size = [] if options.size is None else ["--height", options.size, "--width", options.size]
        shared = [*size, "--batch-size", 1, "--dtype", options.dtype]
        child(work, "full", "compile", options.model, *shared, "--out", work / "made")
        request = [options.prompt, "--model", options.model, "--steps", options.steps, *shared]
        request += ["--out", work / "out"]
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for turn in range(-1, options.rounds):  # the first fills the cache of the traced ones
            for ahead in ([], ["--compiled", work / "made"]):
                for cache in ("empty", "full") if options.cold else ("full",):
                    if turn < 0 and (ahead or cache == "empty"):
                        continue
                    shutil.rmtree(work / "empty", ignore_errors=True)
                    told = child(work, cache, "sample", *request, *ahead)
                    if turn >= 0:
                        found[f"{'compiled' if ahead else 'traced'}, {cache} cache"].append(told)
        title = f"{options.model}, {options.steps} steps"
        print(f"| {title} | wall s | range | traced s | compiled or read s |")
        print("| --- | --- | --- | --- | --- |")
        for name, rows in found.items():
            middle = {key: np.median([row[key] for row in rows]) for key in rows[0]}
            walls = [row["wall"] for row in rows]
            print(f"| {name} | {middle['wall']:.2f} | {min(walls):.2f} – {max(walls):.2f} | "
                  f"{middle['traced']:.2f} | {middle['compiled or read']:.2f} |")  # fmt: skip
        loops: dict[str, list[float]] = defaultdict(list)
        for turn in range(-1, options.rounds):
            for form in ("traced", "stablehlo", "executable"):
                seconds = child(work, "full", f"loop-{form}", options.model, *shared)["loop"]
                if turn >= 0:
                    loops[form].append(seconds)
        print("\n| the loop alone, one step | s | range |\n| --- | --- | --- |")
        for form, values in loops.items():
            print(f"| {form} | {np.median(values):.2f} | {min(values):.2f} – {max(values):.2f} |")


def child(work: Path, cache: str, command: str, *arguments) -> dict[str, float]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / cache), "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start = time.perf_counter()
    words = [sys.executable, __file__, "child", str(work), command, *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"wall": wall, **json.loads(done.stdout.splitlines()[-1])}


def in_child(work: Path, command: str, arguments: list[str]) -> None:
    """A command, and what jax spent in it, as the last line of what is printed."""
    import jax

    from jaxsd.cli import run_command

    spent: dict[str, float] = defaultdict(float)

    def listen(event: str, seconds: float, **_) -> None:
        spent[event.rsplit("/", 1)[-1]] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    if command.startswith("loop-"):
        spent["loop"] = loop_alone(work, command.removeprefix("loop-"), arguments)
    else:
        run_command(command, arguments)
    told = {name: sum(spent[event] for event in events) for name, events in PARTS.items()}
    print(json.dumps({**told, "loop": spent["loop"]}))


def loop_alone(work: Path, form: str, arguments: list[str]) -> float:
    """Seconds from a loaded model to latents; an executable is written where there is none."""
    import jax
    from jax.experimental import serialize_executable

    import jaxsd
    from jaxsd.cli import sample

    jaxsd.use_compilation_cache()
    model, *rest = arguments
    options = tyro.cli(sample.Options, args=["", "--model", model, *rest])
    dtype = getattr(jax.numpy, options.dtype)
    pipe = jaxsd.load(model, dtype, compiled=work / "made" if form == "stablehlo" else None)
    size = {"height": options.height, "width": options.width}
    cond, uncond, noise = pipe.encode([""]), pipe.encode([""]), pipe.noise([0], **size)
    if form == "executable":
        # One that came out of the cache can be serialised, but not loaded again.
        jax.config.update("jax_enable_compilation_cache", False)
        part, file = pipe._compiled_denoise, work / "loop.bin"

        def call(*args, **static):
            if not file.exists():
                made = part.traced.lower(*args, **static).compile()
                file.write_bytes(pickle.dumps(serialize_executable.serialize(made)))
            loaded = serialize_executable.deserialize_and_load(
                *pickle.loads(file.read_bytes()), execution_devices=jax.devices()[:1]
            )
            return loaded(*args)

        pipe._compiled_denoise = call
    start = time.perf_counter()
    jax.block_until_ready(pipe.denoise(noise, cond, uncond, steps=1))
    return time.perf_counter() - start


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        in_child(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main(tyro.cli(Options))
