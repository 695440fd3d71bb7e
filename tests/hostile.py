"""Makers of damaged and hostile files, one function for each kind, for `fuzz`.

Each prepares a folder and returns a function that writes one bad input, of a seed, and reads it.
"""

import functools
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tiny

from jaxsd import conversion, weights
from jaxsd.checkpoints import load_arrays, save_arrays
from jaxsd.components import Component, load_component, load_parts, make_net, save_component
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError
from jaxsd.inspection import inspect
from jaxsd.weights.orbax import read_orbax_header

SHAPES = {"conv.weight": (4, 3, 2, 2), "conv.bias": (4,), "half": (5, 2), "empty": (0, 3)}
TINY = {"unet": tiny.LATENT_UNET, "vae": tiny.VAE_CONFIG, "text_encoder": tiny.TEXT}
# Numbers that readers stumble over, and things that are none.
ABSURD = [
    0,
    -1,
    1,
    3,
    1 << 31,
    1 << 63,
    1 << 64,
    10**400,
    1.5,
    float("nan"),
    "x",
    None,
    [],
    {},
    [[1]],
]
NAMES = [
    "../a",
    "/etc/passwd",
    "..",
    "",
    ".",
    "a/../../b",
    "\\\\host\\a",
    "C:\\a",
    "\0",
    "model",
    "é",
]


# --- Changes ---------------------------------------------------------------------------------


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cuts, flips, overwrites, repeats or adds to bytes, near their start as often as anywhere."""
    broken = bytearray(data)
    near = rng.choice([16, 64, 512, len(broken)])

    def place() -> int:
        return rng.randrange(max(1, min(near, len(broken))))

    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind = rng.randrange(6)
        if kind == 0:
            del broken[place() :]
        elif kind == 1 and broken:
            broken[place()] ^= 1 << rng.randrange(8)
        elif kind == 2:
            start = place()
            broken[start : start + rng.choice([1, 2, 4, 8])] = rng.randbytes(8)
        elif kind == 3:  # a length that lies
            start = place()
            broken[start : start + 8] = struct.pack("<Q", rng.choice([0, 1, 1 << 31, 1 << 62]))
        elif kind == 4:
            broken += broken[: place()]
        else:
            start = place()
            del broken[start : start + rng.choice([1, 7, 8])]
    return bytes(broken)


def disturb(value, rng: random.Random):
    """A JSON value with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(5)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return value | {rng.choice(NAMES): value[key]}
        return value | {key: disturb(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return [*value[:i], disturb(value[i], rng), *value[i + 1 :]]
    if type(value) is int and rng.random() < 0.3:
        return value + rng.choice([-1, 1, 8])
    return rng.choice([*ABSURD, *NAMES])


# --- Kinds of files --------------------------------------------------------------------------

Trial = Callable[[random.Random], None]


def both(*readers: Callable[[], object]) -> None:
    """Reads, and lets nothing through but a refusal in one line."""
    for read in readers:
        try:
            read()
        except JaxsdError as error:
            if "\n" in str(error):
                raise AssertionError(f"an error of several lines: {error}") from None


def safetensors(folder: Path, dtype: str | None = None) -> Trial:
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
    params["half"] = params["half"].astype(jnp.bfloat16)
    whole = weights.save(params, folder, "good.safetensors", dtype).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    file = folder / "bad.safetensors"

    def trial(rng: random.Random) -> None:
        if rng.random() < 0.5:
            file.write_bytes(damage(whole, rng))
        else:
            text = json.dumps(disturb(header, rng)).encode()
            told = len(text) if rng.random() < 0.9 else rng.choice([0, 1 << 20, 1 << 62])
            file.write_bytes(struct.pack("<Q", told) + text + data)
        both(lambda: weights.load(file, SHAPES), lambda: inspect(file))

    return trial


def zips(folder: Path) -> Trial:
    """PyTorch's archives, damaged as bytes, or with a damaged or a hostile pickle inside."""
    program = _program(SHAPES)
    file = folder / "bad.bin"
    whole = _archive(file, program, dict.fromkeys(map(str, range(4)), bytes(256)))

    def trial(rng: random.Random) -> None:
        if rng.random() < 0.4:
            file.write_bytes(damage(whole, rng))
        else:
            sizes = {str(i): bytes(rng.choice([0, 8, 256])) for i in range(rng.randrange(1, 5))}
            _archive(file, damage(program, rng), sizes)
        both(lambda: weights.load(file, SHAPES), lambda: inspect(file))

    return trial


def _archive(file: Path, program: bytes, storages: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return file.read_bytes()


def _program(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """The pickle of a state dict of float32 tensors, as torch.save writes it."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    program = b"\x80\x02ccollections\nOrderedDict\n)R("
    for key, (name, shape) in enumerate(shapes.items()):
        size = int(np.prod(shape))
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu")
        storage += b"J" + struct.pack("<i", size) + b"tQ"
        program += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
        program += b"K\x00" + numbers(shape) + numbers(strides) + b"\x89NtR"
    return program + b"u."


class Run:
    """What a pickle makes of this object is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickles_that_run(folder: Path) -> Trial:
    file, canary = folder / "evil.ckpt", folder / "canary"
    calls = [
        (os.mkdir, str(canary)),
        (os.system, f"mkdir {canary}"),
        (eval, f"__import__('os').mkdir({str(canary)!r})"),
        (exec, f"open({str(canary)!r}, 'w')"),
        (open, str(canary), "w"),
        (Path.mkdir, canary),
        (os.chdir, "/"),
    ]

    def trial(rng: random.Random) -> None:
        value = Run(*rng.choice(calls))
        for _ in range(rng.randrange(4)):
            value = rng.choice(
                [lambda v: [v], lambda v: {"state_dict": {"a": v}}, lambda v: (1, v)]
            )(value)
        program = pickle.dumps(value, rng.randrange(6))
        if rng.random() < 0.5:  # behind a state dict that is in order
            program = _program(SHAPES)[:-1] + b"0" + program.removeprefix(b"\x80\x02")
        if rng.random() < 0.3:
            program = damage(program, rng)
        _archive(file, program, {"0": bytes(256)})
        both(lambda: weights.load(file, SHAPES), lambda: inspect(file))
        if canary.exists():
            raise AssertionError("a pickle ran")

    return trial


def indexes(folder: Path) -> Trial:
    (folder / "outside").mkdir()
    inside = folder / "unet"
    weights.save({"b": jnp.ones(2)}, folder, "a.safetensors")
    places = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        places[name] = f"model-{i}.safetensors"
        weights.save({name: jnp.ones(shape)}, inside, places[name])
    good = {"metadata": {"total_size": 1}, "weight_map": places}

    def trial(rng: random.Random) -> None:
        value = disturb(good, rng)
        if rng.random() < 0.3:
            value = {"weight_map": places | {rng.choice([*places, "x"]): rng.choice(NAMES)}}
        text = json.dumps(value).encode()
        text = damage(text, rng) if rng.random() < 0.3 else text
        (inside / "model.safetensors.index.json").write_bytes(text)
        both(lambda: weights.load(inside, SHAPES))

    return trial


def configs(folder: Path) -> Trial:
    """Component folders whose weights are in order."""
    texts = {}
    for name, config in TINY.items():
        net = make_net(config)
        save_component(folder / name, net, tiny.parameters(net))
        texts[name] = json.loads((folder / name / "config.json").read_text())

    def trial(rng: random.Random) -> None:
        name = rng.choice(list(texts))
        text = json.dumps(disturb(texts[name], rng)).encode()
        text = damage(text, rng) if rng.random() < 0.3 else text
        (folder / name / "config.json").write_bytes(text)
        both(lambda: load_component(folder / name))

    return trial


def single_files(folder: Path) -> Trial:
    """CompVis' names, in a header that lies."""
    components = {}
    for name, config in TINY.items():
        net = make_net(config)
        components[name] = Component(net, tiny.parameters(net))
        weights.write_json(folder / "configs" / name / "config.json", config.to_json())
    weights.write_json(folder / "configs" / "model_index.json", {})
    scheduler = folder / "configs" / "scheduler" / "scheduler_config.json"
    weights.write_json(scheduler, Schedule().to_json())
    tiny.tokenizer(folder / "configs" / "tokenizer")
    file = folder / "model.safetensors"
    conversion.save_single(components, file)
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def trial(rng: random.Random) -> None:
        if rng.random() < 0.3:
            file.write_bytes(damage(whole, rng))
        else:
            text = json.dumps(disturb(header, rng)).encode()
            file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        both(lambda: inspect(file), lambda: load_parts(file, config=folder / "configs"))

    return trial


def orbax(folder: Path) -> Trial:
    net, good = make_net(tiny.TEXT), folder / "good"
    save_arrays(tiny.parameters(net), good)
    files = {file: file.read_bytes() for file in sorted(good.rglob("*")) if file.is_file()}

    def trial(rng: random.Random) -> None:
        file = rng.choice(list(files))
        if rng.random() < 0.2:
            file.unlink()
        else:
            file.write_bytes(damage(files[file], rng))
        try:
            both(lambda: read_orbax_header(good), lambda: load_arrays(good, net))
        finally:
            file.write_bytes(files[file])

    return trial


# kind -> (what makes it, its share of the inputs)
Kind = tuple[Callable[[Path], Trial], int]
KINDS: dict[str, Kind] = {
    "safetensors": (safetensors, 22),
    "eight bits": (functools.partial(safetensors, dtype="int8"), 8),
    "PyTorch zips": (zips, 30),
    "pickles that run code": (pickles_that_run, 15),
    "indexes": (indexes, 10),
    "configs": (configs, 8),
    "single files": (single_files, 5),
    "Orbax folders": (orbax, 2),
}
