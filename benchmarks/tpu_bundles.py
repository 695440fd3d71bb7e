"""The cycles of a TPU's instructions, counted in the bundles that libtpu writes out.

A bundle is what the chip issues in one cycle. Each instruction of a program is a small program of
bundles with loops; the dumped text marks how deep each lies and how often a loop turns.
"""

import collections
import re
from pathlib import Path

from tpu_estimate import Bundles

# For LIBTPU_INIT_ARGS, before libtpu is loaded.
FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=false "
    "--xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra|dedup"
)

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}\s*)?:\s*((?:>\s*)*)\{(\}?)")
_TURNS = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target bundleno = (\d+)")
_FILE = re.compile(r"\d+-(.+)-\d+-packed-bundles-post-ra\.txt$")


def read(folder: Path) -> dict[str, Bundles]:
    """Of the instructions of a program whose compilation was dumped here, by name."""
    found = {}
    for path in folder.glob("*-packed-bundles-post-ra.txt"):
        if name := _FILE.match(path.name):
            found[name[1]] = count(path.read_text(errors="replace"))
    # Of instructions that are alike one is compiled, which the others' lists name.
    for path in folder.glob("*TLP-*deduplication-map.txt"):
        key = ""
        for line in path.read_text().splitlines():
            if line.startswith("key:"):
                key = line[4:].strip()
            elif line.startswith("  ") and key in found:
                found.setdefault(line.strip(), found[key])
    return {name: bundles for name, bundles in found.items() if bundles is not None}


def count(text: str) -> Bundles | None:
    """Of one instruction's bundles; None where it has a loop of which no number is known."""
    depths: list[int] = []
    turns: dict[int, list[int]] = collections.defaultdict(list)  # by bundle, of exit tests
    skips: list[tuple[int, int]] = []  # bundles that a branch may jump over
    loops: list[tuple[int, int]] = []  # the bundles that a branch back repeats
    pipelined = False
    for line in text.splitlines():
        if bundle := _BUNDLE.match(line):
            depth = bundle[1].count(">")
            # An empty one, scheduled to wait, lies where the one before it does
            depths.append(depths[-1] if depths and bundle[2] and depth == 0 else depth)
        if not depths:
            continue
        at = len(depths) - 1
        pipelined = pipelined or "stage = 2" in line or "pipeline-emitter" in line
        if turn := _TURNS.search(line):
            turns[at].append(int(turn[1]))
        if branch := _BRANCH.search(line):
            goal = int(branch[1])
            skips += [(at + 1, goal)] if goal > at else []
            loops += [(goal, at)] if goal <= at else []
    # What is moved into a loop from outside of it keeps the mark of where it came from
    starts: dict[int, int] = {}
    for start, last in loops:
        starts[start] = inside = max(depths[start], depths[last])
        depths[start : last + 1] = [max(inside, depth) for depth in depths[start : last + 1]]

    unknown = 0

    def cycles(start: int, stop: int, depth: int) -> tuple[int, int]:
        """Of bundles at this depth and in its loops: those always taken, and those seldom."""
        nonlocal unknown
        seldom = _seldom(skips, start, stop) if depth else set()
        totals, at = [0, 0], start
        while at < stop:
            if depths[at] <= depth:
                totals[at in seldom] += 1
                at += 1
                continue
            end = at + 1
            while end < stop and depths[end] > depth and starts.get(end) != depth + 1:
                end += 1
            tests = [n for i in range(at, end) if depths[i] == depth + 1 for n in turns.get(i, ())]
            inside = cycles(at, end, depth + 1)
            if not tests and end - at > 16:
                unknown += end - at
            times = tests[-1] if tests else 1
            if tests and pipelined and depth == 0:
                times = max(1, times - 2)  # two rounds only fill and drain the pipeline
            if at in seldom:
                totals[1] += sum(inside) * times
            else:
                totals[0] += inside[0] * times
                totals[1] += inside[1] * times
            at = end
        return totals[0], totals[1]

    always, seldom = cycles(0, len(depths), 0)
    # Of the outer loop: kernels have more inside of it, that fetch nothing
    outer = [n for at, found in turns.items() if depths[at] <= 1 for n in found]
    rounds = max([1, *(n - 2 for n in outer)])
    return None if unknown > 64 else Bundles(always, seldom, rounds)


def _seldom(skips: list[tuple[int, int]], start: int, stop: int) -> set[int]:
    """In a loop's bundles: those of branches that are small beside its body."""
    inside = [(a, b) for a, b in skips if start <= a and b <= stop]
    large = [(a, b) for a, b in inside if 2 * (b - a) >= stop - start]
    low, high = max(large, key=lambda pair: pair[1] - pair[0], default=(start, stop))
    small = [(a, b) for a, b in inside if low <= a and b <= high and 2 * (b - a) < high - low]
    return {at for a, b in small for at in range(a, b)}
