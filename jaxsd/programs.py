"""A model's compiled parts: traced when they are called for, or made ahead of time and kept.

What is kept is StableHLO, as `jax.export` writes it: arithmetic on arrays, with no machine code and
no pickle in it, so that a folder from anywhere may be opened as a checkpoint may. XLA compiles it
for the machine at hand, which JAX's persistent cache remembers (`jaxsd.compilation_cache`). The
arguments' tree is not in the files: the model that calls has it, and must bring the same leaves.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from jaxsd.errors import JaxsdError
from jaxsd.weights.files import as_path, read_json, reading, replacing, write_json

FILE, SUFFIX, FORMAT = "programs.json", ".stablehlo", 1
# What a program may call besides arithmetic: kernels of XLA and Pallas that compute on a device.
# Above all no `..._callback`: that is an address in memory, which is jumped to.
KERNELS = (
    *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement"),
    *("cu_threefry2x32_ffi", "__gpu$xla.gpu.triton", "tpu_custom_call"),
    *("__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax"),
)
# Of JAX's settings those that other numbers come of.
SETTINGS = ("jax_default_matmul_precision", "jax_threefry_partitionable")
Facts = Mapping[str, Any]  # of JSON


class Program:
    """One part for arguments of one kind, as it stands in a file."""

    def __init__(self, name: str, static: Facts, inputs: Mapping[str, str], data: bytes):
        self.name, self.static, self.inputs, self.data = name, static, inputs, data
        self.file = f"{name}-{hashlib.sha256(data).hexdigest()[:16]}{SUFFIX}"
        try:
            exported = export.deserialize(bytearray(data))
            foreign = _custom_calls(exported) - set(KERNELS)
        except Exception as error:  # of whatever kind flatbuffers and MLIR have
            raise JaxsdError(
                f"{self.file} is no program of jax.export's: {error!r}"[:300]
            ) from None
        if foreign:
            raise JaxsdError(f"{self.file} calls {', '.join(sorted(foreign))}, which is not run")
        self.call = exported.call

    @property
    def needs(self) -> dict[str, str]:
        """Everything about a call that is settled: values that are compiled in, and shapes."""
        return {name: json.dumps(value) for name, value in self.static.items()} | dict(self.inputs)


class Programs:
    """The compiled parts of one model: as they are called for, recorded, or read from a folder."""

    def __init__(self):
        self._recorded: list[Program] | None = None
        self._read: Sequence[Program] | None = None
        self._folder, self._settings = "", {}

    def jit(
        self,
        name: str,
        function: Callable,
        static_argnames: Sequence[str] = (),
        compiler_options: Mapping[str, Any] | None = None,
    ) -> "Part":
        """As `jax.jit`, for a part of the model; static arguments are named, others are not."""
        return Part(self, name, function, static_argnames, compiler_options)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Program]]:
        """Every part that is called inside is made ahead of time, run as such, and listed."""
        self._recorded, before, self._read = [], self._read, None
        try:
            yield self._recorded
        finally:
            self._recorded, self._read = None, before

    def find(self, part: "Part", args: tuple, static: Facts) -> Program | None:
        """The program for a call; None to trace as ever. JaxsdError if it was not made ahead."""
        if self._recorded is None and self._read is None:
            return None
        inputs, settled = part.describe(args), {n: _plain(value) for n, value in static.items()}
        made = self._recorded if self._recorded is not None else self._read or ()
        alike = [program for program in made if program.name == part.name]
        for program in alike:
            if program.inputs == inputs and program.static == settled:
                return program
        if self._recorded is None:
            raise JaxsdError(self._missing(part.name, alike, inputs, settled))
        program = Program(part.name, settled, inputs, part.exported(args, static))
        self._recorded.append(program)
        return program

    def read(self, folder: str | PurePath, made_for: Facts) -> None:
        """From now on only the programs of a folder are run.

        JaxsdError if it is damaged, or `facts` differ from those that it was written with.
        """
        where = as_path(folder)
        listed = read_json(where / FILE)
        if listed.get("format") != FORMAT:
            raise JaxsdError(f"{folder} is of another version of jaxsd: {_again(folder)}")
        try:
            differ = differences(dict(listed["made_for"]), _plain(made_for))
            settings, rows = dict(listed["settings"]), list(listed["programs"])
            read = [] if differ else [_open(where, **row) for row in rows]
        except (KeyError, TypeError, ValueError):
            raise JaxsdError(f"{where / FILE} lists no programs: {_again(folder)}") from None
        if differ:
            name, was, now = differ[0]
            more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
            raise JaxsdError(
                f"{folder} was compiled for {name} {was}, and here it is {now}{more}: "
                f"{_again(folder)}"
            )
        self._read, self._folder, self._settings = read, str(folder), settings

    def _missing(
        self, name: str, alike: Sequence[Program], inputs: Mapping[str, str], static: Facts
    ) -> str:
        """What of a call is not as it was compiled, in one line."""
        settings = ", ".join(f"{n} {value}" for n, value in self._settings.items())
        asked = {n: json.dumps(value) for n, value in static.items()} | dict(inputs)
        if not alike:
            what = f"nothing was compiled that does {name}"
        else:
            nearest = min((differences(p.needs, asked) for p in alike), key=len)
            what = ", ".join(f"{n} is {now} in place of {was}" for n, was, now in nearest[:2])
            what = f"of {name}, {what}" + (", …" if len(nearest) > 2 else "")
        return f"{self._folder} was compiled for {settings}, not for this: {what}; ask for the " \
               f"same, or {_again(self._folder)}"  # fmt: skip


class Part:
    """A function of a model that is one compiled program for each kind of arguments."""

    def __init__(
        self,
        programs: Programs,
        name: str,
        function: Callable,
        static_argnames: Sequence[str],
        compiler_options: Mapping[str, Any] | None,
    ):
        self.programs, self.name, self._function = programs, name, function
        self._options = dict(compiler_options or {})
        self.traced = jax.jit(
            function, static_argnames=static_argnames, compiler_options=self._options
        )
        self._made: dict[str, Callable] = {}
        self._names = [*inspect.signature(function).parameters]

    def __call__(self, *args: Any, **static: Any) -> Any:
        program = self.programs.find(self, args, static)
        if program is None:
            return self.traced(*args, **static)
        if program.file not in self._made:
            self._made[program.file] = jax.jit(program.call, compiler_options=self._options)
        return self._made[program.file](*_together(jax.tree.leaves(args)))

    def describe(self, args: tuple) -> dict[str, str]:
        """Each leaf's place among the arguments, and what it is: {"x": "float32[1,8,8,4]"}."""
        named = dict(zip(self._names, args, strict=False))
        leaves = jax.tree_util.tree_flatten_with_path([*named.values()])[0]
        names = [*named]
        return {
            names[path[0].idx] + jax.tree_util.keystr(path[1:]): _kind(leaf)
            for path, leaf in leaves
        }

    def exported(self, args: tuple, static: Facts) -> bytes:
        """The program for these arguments, as it is kept."""
        leaves, tree = jax.tree.flatten(args)

        def flat(*leaves: Any) -> Any:
            return self._function(*jax.tree.unflatten(tree, leaves), **static)

        flat.__name__ = self.name
        allowed = [export.DisabledSafetyCheck.custom_call(name) for name in KERNELS]
        shapes = [
            jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=_spread(leaf))
            for leaf in leaves
        ]
        with _without_paths():
            return bytes(export.export(jax.jit(flat), disabled_checks=allowed)(*shapes).serialize())


def save(
    programs: Sequence[Program], folder: str | PurePath, made_for: Facts, settings: Facts
) -> None:
    """Writes a folder that `Programs.read` opens; until all is written, what was there stands.

    made_for: must hold where they are run. settings: what was asked for, to tell the user.
    """
    where = as_path(folder)
    for program in programs:
        with replacing(where / program.file) as temporary:
            temporary.write_bytes(program.data)
    rows = [
        {"name": p.name, "file": p.file, "static": p.static, "inputs": p.inputs} for p in programs
    ]
    values = {"format": FORMAT, "made_for": made_for, "settings": settings, "programs": rows}
    write_json(where / FILE, values)
    for file in where.glob(f"*{SUFFIX}"):  # of another time
        if file.name not in {program.file for program in programs}:
            file.unlink(missing_ok=True)


def _open(folder: Any, name: str, file: str, static: Facts, inputs: Mapping[str, str]) -> Program:
    path = folder / PurePath(file).name
    with reading(path):
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] not in file:
        raise JaxsdError(f"{path} is damaged: {_again(folder)}")
    return Program(name, static, inputs, data)


def facts(configs: Facts) -> dict[str, Any]:
    """What must be the same where programs are made and where they are run."""
    libraries = {name: metadata.version(name) for name in ("jaxsd", "jax", "jaxlib")}
    machine = {"platform": jax.default_backend()}
    settings = {name: str(getattr(jax.config, name)) for name in SETTINGS}
    return {**libraries, **machine, **settings, **_plain(configs)}


def differences(old: Facts, new: Facts, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(name, old, new) of what differs in two JSON objects, names with dots for objects inside."""
    found = []
    for name in [*old, *(name for name in new if name not in old)]:
        was, now = old.get(name), new.get(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += differences(was, now, f"{prefix}{name}.")
        elif was != now:
            found.append((prefix + name, "nothing" if was is None else was,
                          "nothing" if now is None else now))  # fmt: skip
    return found


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """JAX notes no lines of source: they are this machine's, and half of the file."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _spread(leaf: Any) -> Any:
    """The sharding of an array that several devices hold."""
    sharding = getattr(leaf, "sharding", None)
    return sharding if sharding and len(sharding.device_set) > 1 else None


def _together(leaves: list[Any]) -> list[Any]:
    """With arrays on several devices all others, too: what a program gave stays on its device."""
    several = [sharding.mesh for leaf in leaves if (sharding := _spread(leaf))]
    if not several:
        return leaves
    whole = NamedSharding(several[0], PartitionSpec())
    return [leaf if _spread(leaf) else jax.device_put(leaf, whole) for leaf in leaves]


def _kind(leaf: Any) -> str:
    kind = f"{leaf.dtype}[{','.join(str(n) for n in np.shape(leaf))}]"
    if sharding := _spread(leaf):
        axes = {name: size for name, size in sharding.mesh.shape.items() if size > 1}
        kind += f" as {tuple(sharding.spec)} over {axes}"
    return kind


def _plain(value: Any) -> Any:
    """As JSON holds it."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def _again(folder: Any) -> str:
    return f"run `jaxsd compile` with --out {folder} again"


def _custom_calls(exported: export.Exported) -> set[str]:
    data = exported.mlir_module_serialized
    # In bytecode names stand as they are, and text, which could hide them, is not taken.
    if not data.startswith(b"ML\xefR"):
        raise JaxsdError("it is not in bytecode")
    if b"custom_call" not in data:
        return set()
    # What is not written as XLA's printer writes it counts as "", which is none of ours.
    return set(re.findall(r"custom_call(?: @\"?([^\"(\s]+))?", exported.mlir_module()))
