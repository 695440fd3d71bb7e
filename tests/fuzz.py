"""Damaged and hostile files, made by the thousand and given to the readers.

python tests/fuzz.py --count 20000        # prints how many of each kind were tried

Each must be read or refused with a JaxsdError of one line: no other exception, no code run, no file
opened outside the folder, and no memory taken that the file does not pay for in bytes.
"""

import argparse
import collections
import os
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path

from hostile import KINDS, Kind, Trial

MOST_MEMORY = 4 << 20  # bytes, for files of a few thousand
MOST_SECONDS = 5.0


class Watch:
    """Sees every file that is opened and every process that is started (an audit hook)."""

    FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")

    def __init__(self):
        self.folder: str | None = None  # None: not watching
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event.startswith(self.FORBIDDEN):
            self.seen.append(f"{event} {arguments}")
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            own = (self.folder, sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]))
            if not path.startswith((*own, "/proc", "/sys", "/dev")):
                self.seen.append(f"open {path}")


def run(
    count: int, seed: int = 0, kinds: Mapping[str, Kind] = KINDS
) -> tuple[collections.Counter, list[str]]:
    """Tries `count` inputs; returns how many of each kind, and what went wrong."""
    tried: collections.Counter = collections.Counter()
    failures: list[str] = []
    watch = Watch()
    total = sum(share for _, share in kinds.values())
    with tempfile.TemporaryDirectory() as place:
        for kind, (prepare, share) in kinds.items():
            folder = Path(place, kind.replace(" ", "-"))
            folder.mkdir()
            trial = prepare(folder)
            for number in range(max(1, count * share // total)):
                watch.folder, watch.seen = os.path.realpath(place), []
                problem = next(_problems(trial, random.Random(f"{kind} {seed} {number}")), None)
                watch.folder = None
                tried[kind] += 1
                if problem or watch.seen:
                    failures.append(f"{kind} {seed} {number}: {problem or watch.seen}")
    return tried, failures


def _problems(trial: Trial, rng: random.Random) -> Iterator[str]:
    tracemalloc.start()
    start = time.perf_counter()
    try:
        trial(rng)
    except Exception as error:
        yield f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if peak > MOST_MEMORY:
        yield f"{peak} bytes taken"
    if time.perf_counter() - start > MOST_SECONDS:
        yield "too slow"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tried, failures = run(options.count, options.seed)
    for kind, number in tried.items():
        print(f"{number:7,} {kind}")
    print(f"{sum(tried.values()):7,} inputs, {len(failures)} failures")
    print("\n".join(failures[:50]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
