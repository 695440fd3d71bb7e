"""How long a program compiled for a TPU takes, estimated from its text: no TPU needed.

The text of a compiled program is its schedule. Each instruction takes what the compiler itself
expects (`estimated_cycles`) or, where its bundles were dumped (tpu_bundles.py), as many cycles as
these; what has neither, the roofline: its arithmetic or its bytes of HBM, whichever takes longer.
Bodies of loops count as often as they run, of branches the longest does. Copies on the side are
taken to be hidden; collectives are listed with their bytes, not timed. Estimates rank designs; they
are not times.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np


class Chip(NamedTuple):
    flops: float  # a second, of bfloat16
    bandwidth: float  # bytes of HBM a second
    clock: float
    usable: float  # GiB of HBM that programs may use


CHIPS = {
    "v5e": Chip(197e12, 819e9, 1.5e9, 15.75),
    "v5p": Chip(459e12, 2765e9, 1.75e9, 95.74),
    "v6e": Chip(918e12, 1640e9, 1.75e9, 31.25),
}

# Take no time: names for what is there already, or the ends of what runs on the side.
_FREE = set(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota "
    "opt-barrier domain copy-start copy-done slice-start slice-done async-start async-update "
    "async-done".split()
)
_MARKS = re.compile(
    'custom_call_target="(ConcatBitcast|AllocateBuffer|AssumeGatherIndicesInBound|Sharding|SPMD|Move)'
)
COLLECTIVE = re.compile(
    r"^(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start|-done)?$"
)
# Of what follows them, a slice say, they compute no more than is asked for
_POINTWISE = set(
    "bitcast convert concatenate add subtract multiply divide maximum minimum negate select "
    "exponential logistic tanh rsqrt".split()
)
Dims = tuple[int, ...]
_SHAPE = re.compile(r"\b(pred|(?:bf|[fsu])(\d+)\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """dims; size: bytes; padded: bytes in HBM with its tiles, 0 of what lies in vector memory."""

    dims: tuple[int, ...]
    size: int
    padded: int

    @classmethod
    def of(cls, found: re.Match) -> "Shape":
        bits = int(found[2] or 8)
        dims = tuple(int(n) for n in found[3].split(",") if n)
        order, _, tiles = (found[4] or "").partition(":")
        full = [dims[int(i)] for i in order.split(",") if i]  # the fastest axis first
        if tile := re.match(r"T\(([\d,]+)\)", tiles):
            for i, unit in enumerate(reversed(tile[1].split(","))):
                if i < len(full):
                    full[i] = -(-full[i] // int(unit)) * int(unit)
        padded = 0 if re.search(r"S\(\d", tiles) else math.prod(full) * bits // 8
        return cls(dims, math.prod(dims) * bits // 8, padded)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    shapes: list[Shape]  # of its results
    operands: list[str]
    rest: str  # operands and attributes, as written

    def attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


def parse(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    shape, rest = _closed(rest) if rest[0] == "(" else rest.split(" ", 1)
    op = re.match(r"\s*([a-z][\w\-]*)(?=\()", rest)
    if op is None:
        return None
    rest = rest[op.end() :]
    operands, _ = _closed(rest)
    operands = _NAME.findall(re.sub(r"/\*.*?\*/", "", operands))
    return Instruction(
        head[1], op[1], [Shape.of(m) for m in _SHAPE.finditer(shape)], operands, rest
    )


def _closed(text: str) -> tuple[str, str]:
    """What is in the parentheses that a text begins with, and what comes after them."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[1:i], text[i + 1 :]
    return text[1:], ""


class Row(NamedTuple):
    """One instruction: how often it runs; of one run, FLOP, bytes of HBM and seconds."""

    name: str
    kind: str  # "convolution", "kernel" (of Pallas) or "other"
    count: int
    flops: float
    bytes: float
    seconds: float
    origin: str  # in the Python program


class Program:
    """A compiled program's text, taken apart."""

    def __init__(self, text: str, chip: Chip, bundles: Mapping[str, "Bundles"] | None = None):
        """bundles: by the instruction's name (tpu_bundles.read)."""
        self.chip, self._bundles = chip, bundles or {}
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._flops: dict[str, float] = {}
        self._entry = inside = ""
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" "):
                if begun := re.match(r"(ENTRY )?%?([\w.\-<>]+) ", line):
                    inside = begun[2]
                    self._computations[inside] = {}
                    self._entry = inside if begun[1] else self._entry
            elif inside and (instruction := parse(line)):
                self._computations[inside][instruction.name] = instruction
        self.rows = list(self._walk(self._entry, 1))

    @property
    def seconds(self) -> float:
        return sum(row.count * row.seconds for row in self.rows)

    @property
    def flops(self) -> float:
        """Of products and convolutions, without what pads them, and of kernels as they say."""
        return sum(row.count * row.flops for row in self.rows)

    def _walk(self, computation: str, count: int) -> Iterator[Row]:
        for it in self._computations[computation].values():
            if it.op == "while":
                yield from self._walk(it.attribute(r"body=%?([\w.\-]+)"), count * self._trips(it))
            elif it.op == "call":
                yield from self._walk(it.attribute(r"to_apply=%?([\w.\-]+)"), count)
            elif it.op == "conditional":
                names = it.attribute(r"branch_computations=\{([^}]*)\}") or it.attribute(
                    r"(true_computation=.*)"
                )
                ways = [n for n in _NAME.findall(names) if n in self._computations]
                rows = [list(self._walk(way, count)) for way in ways]
                yield from max(rows, key=lambda way: sum(r.count * r.seconds for r in way))
            elif not (it.op in _FREE or COLLECTIVE.match(it.op) or _MARKS.search(it.rest)):
                yield self._row(computation, it, count)

    def _row(self, computation: str, it: Instruction, count: int) -> Row:
        kernel = it.op == "custom-call"
        flops = self._of_instruction(computation, it)
        moved = self._moved(computation, it)
        at_best = moved / self.chip.bandwidth
        if bundles := self._bundles.get(it.name):
            inner = re.findall(r"\d+", it.attribute(r'"iteration_bounds":\[([^\]]*)\]'))
            turns = int(inner[-1]) if inner else bundles.rounds if kernel else 1
            seconds = bundles.seconds(self.chip.clock, at_best, turns)
        elif cycles := it.attribute(r'"estimated_cycles":"(\d+)"'):
            seconds = int(cycles) / self.chip.clock
        else:
            seconds = max(flops / self.chip.flops, at_best)
        kind = "kernel" if kernel else "convolution" if flops else "other"
        return Row(it.name, kind, count, flops, moved, seconds, it.attribute(r'op_name="([^"]*)"'))

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: known to the compiler, or what its condition compares with."""
        if known := loop.attribute(r"known_trip_count[^\d]*(\d+)"):
            return int(known)
        condition = self._computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        limits = [i.rest for i in condition.values() if i.op == "constant"]
        numbers = [int(n[1]) for text in limits if (n := re.match(r"\((\d+)\)", text))]
        return max([1, *numbers])

    # --- FLOP ---

    def _of_instruction(self, computation: str, it: Instruction) -> float:
        if it.op == "custom-call":
            return float(it.attribute(r'"flops":"?(\d+)') or 0)
        if it.op in ("convolution", "dot"):
            return self._product(self._computations[computation], it)
        called = it.attribute(r"calls=%?([\w.\-]+)")
        if called and called not in self._flops:
            inner = self._computations.get(called, {})
            self._flops[called] = sum(self._of_instruction(called, i) for i in inner.values())
        return self._flops.get(called, 0.0)

    def _product(self, around: Mapping[str, Instruction], it: Instruction) -> float:
        left, right = (around[name].shapes[0].dims for name in it.operands[:2])
        out = it.shapes[0].dims
        if it.op == "dot":
            axes = it.attribute(r"lhs_contracting_dims=\{([\d,]*)\}").split(",")
            return 2.0 * math.prod(out) * math.prod(left[int(a)] for a in axes if a)
        return self._convolution(it, left, right, out)

    def _convolution(self, it: Instruction, left: Dims, right: Dims, out: Dims) -> float:
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", it.rest)
        assert labels is not None
        lhs, rhs, result = labels.groups()
        flops = 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
        window = dict(
            part.split("=") for part in it.attribute(r"window=\{([^}]*)\}").split() if "=" in part
        )
        for axis in (a for a in result if a.isdigit()):
            size, stride, before, after = (
                _pick(window.get(key, ""), int(axis), default)
                for key, default in (
                    ("size", 1),
                    ("stride", 1),
                    ("lhs_dilate", 1),
                    ("rhs_dilate", 1),
                )
            )
            pad = window["pad"].split("x")[int(axis)].split("_")[0] if "pad" in window else 0
            # Pairs of an output and a weight that meet an input, rather than what pads it
            at = np.arange(out[result.index(axis)])[:, None] * stride - int(pad)
            at = at + np.arange(size) * after
            most = (left[lhs.index(axis)] - 1) * before
            flops *= int(((at >= 0) & (at <= most) & (at % before == 0)).sum())
        return flops

    # --- HBM ---

    def _moved(self, computation: str, it: Instruction) -> float:
        around = self._computations[computation]
        inner = self._computations.get(it.attribute(r"calls=%?([\w.\-]+)"), {})
        moved = sum(shape.padded for shape in it.shapes)
        for update in (i for i in inner.values() if i.op == "dynamic-update-slice"):
            if any(update.shapes[0].dims == s.dims and s.padded for s in it.shapes):  # in place
                part = inner.get(update.operands[1])
                moved -= update.shapes[0].padded - (part.shapes[0].padded if part else 0)
        parameters = {
            int(i.attribute(r"^\((\d+)\)")): i.name for i in inner.values() if i.op == "parameter"
        }
        for number, name in enumerate(it.operands):
            whole = around[name].shapes if name in around else []
            if len(whole) == 1 and whole[0].size > 4:
                size = whole[0].padded
                if number in parameters:
                    size = min(size, _read(inner, parameters[number], size))
                elif it.op in ("dynamic-slice", "slice", "gather") and number == 0:
                    size = min(size, it.shapes[0].padded)
                moved += size
        return moved


def _pick(text: str, axis: int, default: int) -> int:
    return int(text.split("x")[axis]) if text else default


def _read(inner: Mapping[str, Instruction], name: str, whole: int) -> int:
    """Bytes that a fusion reads of a parameter: of slices, theirs."""
    total, users = 0, [i for i in inner.values() if name in i.operands]
    if not users:  # it is a result itself
        return whole
    for user in users:
        if user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += user.shapes[0].padded or user.shapes[0].size
        elif user.op in _POINTWISE:
            total += _read(inner, user.name, whole)
        elif not (user.op == "dynamic-update-slice" and user.operands[0] == name):
            return whole
    return min(total, whole)


class Bundles(NamedTuple):
    """Cycles of an instruction's program (tpu_bundles.py), without waiting for memory.

    always: what runs each time. seldom: in branches of the innermost loop, which are its beginning
    and its end; of Pallas' kernels, in those of one step of the grid, as if there were one. rounds:
    of the outer loop, in which memory is fetched for the next one.
    """

    always: int
    seldom: int
    rounds: int

    def seconds(self, clock: float, memory: float, inner: int) -> float:
        """memory: seconds that fetching takes; inner: one turn of so many has the seldom ones."""
        busy = (self.always + self.seldom / max(1, inner)) / clock
        return max(busy, memory) + min(busy, memory) / max(1, self.rounds)


class Sent(NamedTuple):
    """One collective: bytes of what it makes, and whether the chip computes meanwhile."""

    bytes: int
    meanwhile: bool


def collectives(text: str) -> dict[str, list[Sent]]:
    """Of a compiled program, by kind: each one, in a chip's view, before any scattering.

    A sum of which each chip keeps its piece is a reduce-scatter, however the compiler writes it.
    What is in the body of a loop is listed once. One that goes on meanwhile is written out where it
    begins, in each product beside it and where it ends, all on one channel: that is one, too.
    """
    found: dict[str, dict[str, Sent]] = collections.defaultdict(dict)
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line
        it = parse(line)
        match = it and COLLECTIVE.match(it.op)
        if it and match and match[2] != "-done":
            kind = match[1]
            if kind == "all-reduce" and "all-reduce-scatter" in computation:
                kind = "reduce-scatter"
            sizes = [shape.size for shape in it.shapes]
            if match[2] and kind != "all-reduce":  # what it takes, what it gives, and counters
                sizes = [size for size in sizes if size > 4]
                sizes = sizes[len(sizes) // 2 :]
            # Others may be several on a channel
            steps = re.match(r"%?(fused_computation|async_collective)", computation)
            key = (steps and it.attribute(r"channel_id=(\d+)")) or it.name
            before = found[kind].get(key, Sent(0, False))
            meanwhile = match[2] == "-start" or "async_collective" in computation
            found[kind][key] = Sent(sum(sizes), before.meanwhile or meanwhile)
    return {kind: list(sent.values()) for kind, sent in found.items()}


def summed(found: Mapping[str, list[Sent]]) -> dict[str, dict[str, int]]:
    """Of each kind of collective how many, their bytes, and those that are sent meanwhile."""
    return {
        kind: {
            "number": len(sent),
            "bytes": sum(each.bytes for each in sent),
            "meanwhile": sum(each.bytes for each in sent if each.meanwhile),
        }
        for kind, sent in sorted(found.items())
    }
