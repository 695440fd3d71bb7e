"""Kills a training again and again, and holds what comes out against one that was left alone.

    python tests/drill.py --kills 20 ddpm --steps 300 --batch-size 32 --save-every 10

takes the arguments of `train.py` but for --workdir. Half of the kills come while a checkpoint is
being written, a quarter of all are SIGTERM, the others SIGKILL.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np


class Process(Protocol):
    """What the drill needs of a process; subprocess.Popen has it."""

    def poll(self) -> int | None: ...
    def send_signal(self, number: int) -> None: ...
    def wait(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Kill:
    signal: str
    saving: bool  # whether a checkpoint was being written
    step: int  # the last row of the log
    checkpoints: tuple[int, ...]  # the complete ones, afterwards
    status: int


def drill(
    start: Callable[[int], Process],
    workdir: Path,
    kills: int,
    seed: int = 0,
    longest: float = 0.2,
    patience: float = 120.0,
    report: Callable[[Kill], None] = lambda kill: None,
    pace: float = 0.0,
) -> list[Kill]:
    """Starts the training `kills` times and kills it each time, after it has made progress.

    start(i) begins or resumes it for the i-th time. A kill comes as soon as a checkpoint is being
    written, or up to `longest` seconds after a row of the log, or within 5 `longest` of the start,
    whatever has come of it; report(kill) follows at once. Kill i waits for more than `pace` i rows,
    so that the last ones come late in a training on slow machines, too. AssertionError if a
    checkpoint that was complete when the kill came is gone, or a row of the log that it covers, or
    if a SIGTERM is not obeyed with status 0.
    """
    rng, done, covered = random.Random(seed), [], set()
    for i in range(kills):
        number = signal.SIGTERM if i % 4 == 3 else signal.SIGKILL
        before = _log(workdir).count("\n")
        process = start(i)
        try:
            if i % 4 == 2:
                time.sleep(rng.uniform(0, 5 * longest))
            else:
                least = max(before, pace * i)
                _wait(lambda n=least: _log(workdir).count("\n") > n, process, patience)
            if i % 2:
                _wait(lambda: _saving(workdir), process, patience)
            elif i % 4 == 0:
                time.sleep(rng.uniform(0, longest))
        finally:
            saving, known = _saving(workdir), _complete(workdir)
            process.send_signal(number)
            status = process.wait()
        assert status == (0 if number == signal.SIGTERM else -number), f"ended with {status}"
        there = _complete(workdir)
        assert max(there, default=0) >= max(known, default=0), f"{known} became {there}"
        rows = [json.loads(row) for row in _log(workdir).splitlines() if row.endswith("}")]
        logged = {row["step"] for row in rows}
        assert covered <= logged, f"rows {covered - logged} are gone"
        covered = {step for step in logged if step <= max(there, default=0)}
        last = max(logged, default=0)
        done.append(Kill(signal.Signals(number).name, saving, last, there, status))
        report(done[-1])
    return done


def _log(workdir: Path) -> str:
    file = workdir / "metrics.jsonl"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _saving(workdir: Path) -> bool:
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


def _complete(workdir: Path) -> tuple[int, ...]:
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return tuple(sorted(int(name) for name in names if name.isdecimal()))


def _wait(condition: Callable[[], bool], process: Process, patience: float) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end, "it makes no progress"
        time.sleep(0.002)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two ended trainings, in bits: states, logs, pictures, models."""
    from orbax.checkpoint import StandardCheckpointer

    from jaxsd.training.throughput import MEASURED

    found = []
    files = ["config.json"]
    for pattern in ("model/**/*", "samples/*"):
        paths = [path for top in (one, other) for path in top.glob(pattern) if path.is_file()]
        files += {str(p.relative_to(one if one in p.parents else other)) for p in paths}
    for name in sorted(files):
        contents = [
            (top / name).read_bytes() if (top / name).exists() else None for top in (one, other)
        ]
        if contents[0] != contents[1]:
            found.append(name)

    def rows(workdir: Path) -> list[dict]:
        lines = [json.loads(line) for line in _log(workdir).splitlines()]
        return [{n: v for n, v in row.items() if n not in MEASURED} for row in lines]

    if rows(one) != rows(other):
        found.append("metrics.jsonl")

    steps = [max(_complete(workdir), default=0) for workdir in (one, other)]
    if steps[0] != steps[1]:
        return [*found, f"newest checkpoint {steps[0]}, {steps[1]}"]
    with StandardCheckpointer() as reader:
        for item in ("params", "ema", "opt_state", "counters"):
            folders = [top / "checkpoints" / str(steps[0]) / item for top in (one, other)]
            a, b = (_leaves(reader.restore(folder.absolute())) for folder in folders)
            if a.keys() != b.keys() or any(not np.array_equal(a[name], b[name]) for name in a):
                found.append(f"{item} of step {steps[0]}")
    return found


def _leaves(tree: object) -> dict[str, np.ndarray]:
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=5.0, help="seconds from a row to a kill")
    options, recipe = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        cut, whole = Path(scratch) / "cut", Path(scratch) / "whole"
        # Programs that the first start compiles are read by the others
        programs = {
            "JAX_COMPILATION_CACHE_DIR": str(Path(scratch) / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

        def start(workdir: Path) -> subprocess.Popen:
            command = [sys.executable, "-m", "jaxsd", "train", *recipe, "--workdir", str(workdir)]
            with open(Path(scratch) / f"{workdir.name}.log", "a") as said:
                return subprocess.Popen(
                    command, env={**programs, **os.environ}, stdout=said, stderr=said
                )

        def report(kill: Kill) -> None:
            when = "while saving" if kill.saving else "in between"
            line = f"{kill.signal:8} {when:13} step {kill.step:6}  complete {kill.checkpoints}"
            print(f"{time.monotonic() - begun:5.0f} s  {line}", flush=True)

        begun = time.monotonic()
        kills = drill(
            lambda i: start(cut), cut, options.kills, options.seed, options.longest, 600, report
        )
        assert start(cut).wait() == 0 and start(whole).wait() == 0
        wrong = differences(cut, whole)
        if "Traceback" in (said := (Path(scratch) / "cut.log").read_text()):
            print(said)
            wrong.append("a traceback was printed")
        counts = f"{len(kills)} kills, {sum(k.saving for k in kills)} of them while saving"
        print(f"{counts}, {time.monotonic() - begun:.0f} s: {', '.join(wrong) or 'equal in bits'}")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
