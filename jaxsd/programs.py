"""A model's compiled parts: traced when they are called for, or made ahead of time and kept.

What is kept is StableHLO, as `jax.export` writes it: arithmetic on arrays, with no machine code and
no pickle in it, so that a folder from anywhere may be opened as a checkpoint may. XLA compiles it
for the machine at hand, which JAX's persistent cache remembers (`jaxsd.compilation_cache`). The
arguments' tree is not in the files: the model that calls has it, and must bring the same leaves.
"""

import contextlib
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from jax import export
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxsd import kernels, nn
from jaxsd.custom_calls import KERNELS, custom_calls
from jaxsd.errors import JaxsdError
from jaxsd.facts import Facts, differences, plain
from jaxsd.weights.files import as_path, read_json, reading, replacing, write_json

FILE, SUFFIX, FORMAT = "programs.json", ".stablehlo", 1


class Program:
    """One part for arguments of one kind, as it stands in a file."""

    def __init__(self, name: str, static: Facts, inputs: Mapping[str, str], data: bytes):
        self.name, self.static, self.inputs, self.data = name, static, inputs, data
        self.file = f"{name}-{hashlib.sha256(data).hexdigest()[:16]}{SUFFIX}"
        try:
            exported = export.deserialize(bytearray(data))
            foreign = custom_calls(exported) - set(KERNELS)
        except Exception as error:  # of whatever kind flatbuffers and MLIR have
            said = f"{self.file} is no program of jax.export's: {error!r}"
            raise JaxsdError(said[:300]) from None
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
        compiler_options: Callable[[], Mapping[str, Any]] = dict,
        of: Sequence[str] = (),
    ) -> "Part":
        """As `jax.jit`, for a part of the model; static arguments are named, others are not.

        function: of its arguments alone, for models share what was traced of it, and it is kept
        for good (what it was compiled to until `jax.clear_caches()`).
        compiler_options: asked when the function is first called, and again for another platform.
        of: those static arguments that are the model's own, such as its networks, which a folder of
        programs names once for all.
        """
        return Part(self, name, function, static_argnames, compiler_options, of)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Program]]:
        """Every part that is called inside is made ahead of time, run as such, and listed."""
        with self.tracing():
            self._recorded = []
            try:
                yield self._recorded
            finally:
                self._recorded = None

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Parts that are called inside are traced as ever, whatever was read."""
        before, self._read = self._read, None
        try:
            yield
        finally:
            self._read = before

    def find(self, part: "Part", args: tuple, static: Facts) -> Program | None:
        """The program for a call; None to trace as ever. JaxsdError if it was not made ahead."""
        if self._recorded is None and self._read is None:
            return None
        inputs, settled = part.describe(args), part.settled(static)
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
        """From now on only the programs of a folder are run, which have no gradient.

        JaxsdError if it is damaged, or `facts` differ from those that it was written with.
        """
        where = as_path(folder)
        listed = read_json(where / FILE)
        if listed.get("format") != FORMAT:
            raise JaxsdError(f"{folder} is of another version of jaxsd: {_again(folder)}")
        try:
            differ = differences(dict(listed["made_for"]), plain(made_for))
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
               f"same, or `jaxsd compile` this with --out {self._folder}"  # fmt: skip


class Part:
    """A function of a model that is one compiled program for each kind of arguments."""

    def __init__(
        self,
        programs: Programs,
        name: str,
        function: Callable,
        static_argnames: Sequence[str],
        compiler_options: Callable[[], Mapping[str, Any]],
        of: Sequence[str],
    ):
        self.programs, self.name, self._function = programs, name, function
        self._static, self._ask, self._of = (*static_argnames, *of), compiler_options, of
        self._made: dict[str, Callable] = {}
        self._names = [*inspect.signature(function).parameters]

    @property
    def traced(self) -> Callable:
        """What `jax.jit` made of the function, as it would be traced here and now."""
        return self._shared(self._ask)

    def _shared(self, compiler_options: Callable[[], Mapping[str, Any]]) -> Callable:
        return _shared(self._function, self._static, compiler_options, kernels.told(), nn.remat())

    def __call__(self, *args: Any, **static: Any) -> Any:
        program, leaves = self.programs.find(self, args, static), jax.tree.leaves(args)
        inside = _in_a_program(leaves)
        if program is None:
            # Inside of a caller's program, which alone may have compiler options
            return (self._shared(dict) if inside else self.traced)(*args, **static)
        if inside:
            return program.call(*leaves)
        if program.file not in self._made:
            self._made[program.file] = jax.jit(program.call, compiler_options=dict(self._ask()))
        return self._made[program.file](*_together(leaves))

    def describe(self, args: tuple) -> dict[str, str]:
        """Each leaf's place among the arguments, and what it is: {"x": "float32[1,8,8,4]"}."""
        named = dict(zip(self._names, args, strict=False))
        leaves = jax.tree_util.tree_flatten_with_path([*named.values()])[0]
        return {
            [*named][path[0].idx] + jax.tree_util.keystr(path[1:]): _kind(leaf)
            for path, leaf in leaves
        }

    def settled(self, static: Facts) -> dict[str, Any]:
        """Static arguments as a file holds them, without what is the model's own."""
        return {name: plain(value) for name, value in static.items() if name not in self._of}

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


@functools.cache
def _shared(
    function: Callable,
    static: tuple[str, ...],
    compiler_options: Callable[[], Mapping[str, Any]],
    target: kernels.Target | None,
    remat: str | None,
) -> Callable:
    """`jax.jit` of a function, one for all who ask where `target` and `remat` hold.

    Networks read both while they are traced.
    """
    # A new object for each: JAX would find by the function itself what was traced where others held
    own = functools.partial(function)
    return jax.jit(own, static_argnames=static, compiler_options=dict(compiler_options()))


def save(
    programs: Sequence[Program], folder: str | PurePath, made_for: Facts, settings: Facts
) -> None:
    """Writes a folder that `Programs.read` opens; until all is written, what was there stands.

    made_for: must hold where they are run. settings: what was asked for, to tell the user.
    """
    where = as_path(folder)
    before = _listed(where)
    for program in programs:
        with replacing(where / program.file) as temporary:
            temporary.write_bytes(program.data)
    rows = [
        {"name": p.name, "file": p.file, "static": p.static, "inputs": p.inputs} for p in programs
    ]
    values = {"format": FORMAT, "made_for": made_for, "settings": settings, "programs": rows}
    write_json(where / FILE, values)
    for name in before - {program.file for program in programs}:
        (where / name).unlink(missing_ok=True)


def _listed(where: Any) -> set[str]:
    """The files of a folder that its list names: what else lies there is not ours."""
    try:
        files = [str(row["file"]) for row in read_json(where / FILE)["programs"]]
    except (JaxsdError, KeyError, TypeError):
        return set()
    return {PurePath(file).name for file in files if file.endswith(SUFFIX)}


def _open(folder: Any, name: str, file: str, static: Facts, inputs: Mapping[str, str]) -> Program:
    texts = (name, file, *dict(inputs).values())
    if not isinstance(static, dict) or not all(isinstance(text, str) for text in texts):
        raise TypeError("not what was written")
    path = folder / PurePath(file).name
    with reading(path):
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] not in file:
        raise JaxsdError(f"{path} is damaged: {_again(folder)}")
    return Program(name, static, inputs, data)


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


def _in_a_program(leaves: Sequence[Any]) -> bool:
    """Whether a caller's jit or gradient is being traced; in a jit constants become part of it."""
    return any(isinstance(leaf, Tracer) for leaf in (*leaves, jax.device_put(np.int8(0))))


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


def _again(folder: Any) -> str:
    return f"run `jaxsd compile` with --out {folder} again"
