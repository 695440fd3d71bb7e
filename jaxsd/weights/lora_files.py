"""Reads and writes LoRA files: kohya's, PEFT's and old diffusers', .safetensors or PyTorch's.

A file is accepted or refused by its header, with all that is wrong in one error, before any factor
is read. Names are the matter of `lora_names`, sums of `lora`.
"""

import collections
import json
import math
import os
import re
import struct
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.nn import Net
from jaxsd.weights import lora_names as names
from jaxsd.weights import tensors
from jaxsd.weights.entries import DTYPES, Entry, open_tensors
from jaxsd.weights.files import AnyPath, as_path, listing, read_json, reading
from jaxsd.weights.headers import read_entries
from jaxsd.weights.lora import Layer, LoRA

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # under which diffusers keeps PEFT's configuration in a header
# What a folder may hold, best first.
FILES = (
    DIFFUSERS_FILE,
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
# alpha is a number of its own, which kohya's scripts save as any of these.
SCALARS = DTYPES | {"F64": np.dtype("f8"), "I64": np.dtype("i8"), "I32": np.dtype("i4")}

Shapes = Mapping[str, tuple[int, ...]]
Place = tuple[str, str]  # a component and the name of a parameter


# --- Reading ---------------------------------------------------------------------------------


def read(path: str | os.PathLike, nets: Mapping[str, Net | Shapes]) -> LoRA:
    """The LoRA in a file or folder, for a model of these components.

    nets: "unet", "text_encoder" and "text_encoder_2", as far as there are such: each a Net, or a
    dict from parameter names to shapes. Where a file tells no alpha, alpha is the rank.

    JaxsdError if the file is damaged, was made for another family, holds anything but pairs of
    low-rank factors (and DoRA's magnitudes), or a tensor for which the model has no place.
    """
    file = _file(as_path(path))
    entries = read_entries(file)
    shapes = {c: net.shapes if isinstance(net, Net) else net for c, net in nets.items()}
    _check_kind(file, entries, shapes)
    places, alphas = _check(file, entries, shapes)
    configs = _configs(file)
    layers: dict[str, dict[str, Layer]] = {}
    with reading(file), open_tensors(file) as mapped:
        for (component, name), held in places.items():
            # Copies: the file may be replaced or cut while they live.
            arrays = {
                p: np.array(mapped.get(entries[key])) for p, key in held.items() if p != "alpha"
            }
            down, up, magnitude = _factors(arrays, shapes[component][name])
            alpha = alphas.get((component, name))
            if alpha is None:
                alpha = _configured_alpha(configs.get(component), name, len(down), file)
            layers.setdefault(component, {})[name] = Layer(down, up, alpha, magnitude)
    return LoRA(layers)


def _file(path: AnyPath) -> AnyPath:
    """The file that a path stands for: itself, or the best of a folder's."""
    with reading(path):
        if not path.is_dir():
            return path
        held = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
    found = [name for name in FILES if name in held] or held
    if not found or (found[0] not in FILES and len(found) > 1):
        raise JaxsdError(f"{path}: name one of its files ({', '.join(held) or 'there is none'})")
    return path / found[0]


def _check_kind(file: AnyPath, entries: Mapping[str, Entry], shapes: Mapping[str, Shapes]) -> None:
    """JaxsdError if the file is no LoRA, or one of another family."""
    held = {name: entry.shape for name, entry in entries.items()}
    if names.differ(held, shapes):
        model = names.family(shapes.get("unet", {})) or "none that reads text"
        raise JaxsdError(f"{file} is a LoRA for {names.family(held)}; this model is {model}")
    if kind := names.other_kind(entries):
        raise JaxsdError(f"{file} holds {kind}: only LoRA's pairs of factors are supported")
    if not any(names.split(name) for name in entries):
        raise JaxsdError(f"{file} is not a LoRA: none of its {len(entries)} names is one's")


def _check(
    file: AnyPath, entries: Mapping[str, Entry], shapes: Mapping[str, Shapes]
) -> tuple[dict[Place, dict[str, str]], dict[Place, float]]:
    """Where each tensor belongs (place -> part -> name), and the alphas; JaxsdError for misfits."""
    known = {component: names.parameters(component, found) for component, found in shapes.items()}
    places: dict[Place, dict[str, str]] = {}
    unexpected, halves, misshapen, alien, infinite = [], [], [], [], []
    for name, entry in entries.items():
        key = names.split(name)
        where = [key.component] if key and key.component else list(known)
        module = key.module if key else ""
        component = next((c for c in where if module in known.get(c, {})), None)
        if key is None or component is None:
            unexpected.append(name)
            continue
        held = places.setdefault((component, known[component][module]), {})
        if held.setdefault(key.part, name) != name:  # the same under another spelling
            unexpected.append(name)
        if entry.dtype not in (SCALARS if key.part == "alpha" else DTYPES):
            alien.append(f"{name} {entry.dtype}")
    alphas = {}
    for place, held in places.items():
        parts = {part: entries[name].shape for part, name in held.items()}
        if not {"down", "up"} <= parts.keys():
            halves.append(place[1])
        elif not _fit(parts, shapes[place[0]][place[1]]):
            told = ", ".join(f"{part} {list(shape)}" for part, shape in parts.items())
            misshapen.append(f"{place[1]} {list(shapes[place[0]][place[1]])} by {told}")
        elif "alpha" in held and not alien:
            alphas[place] = _scalar(file, entries[held["alpha"]])
            infinite += [] if math.isfinite(alphas[place]) else [held["alpha"]]
    problems = {
        "unexpected": unexpected,
        "without one of the two factors": halves,
        "misshapen": misshapen,
        "not float32, float16 or bfloat16": alien,
        "no finite number": infinite,
    }
    lists = [f"{len(n)} {kind}: {listing(n)}" for kind, n in problems.items() if n]
    if lists:
        raise JaxsdError(f"{file} does not fit the model: {'; '.join(lists)}")
    return places, alphas


def _fit(parts: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]) -> bool:
    """Whether the factors' product has the shape of the weight; 1x1 kernels are matrices."""
    shapes = {part: _trim(shape) for part, shape in parts.items()}
    rank = shapes["up"][-1] if shapes["up"] else 0
    wanted = {"down": (rank, *weight[1:]), "up": (weight[0], rank)}
    if "mid" in shapes:
        inner = shapes["down"][0] if shapes["down"] else 0
        wanted |= {"down": (inner, weight[1]), "mid": (rank, inner, *weight[2:])}
    fits = all(shapes[part] == _trim(shape) for part, shape in wanted.items())
    scalar = math.prod(parts.get("alpha", ())) == 1
    rows = math.prod(parts.get("magnitude", weight[:1])) == weight[0]
    return fits and scalar and rows and rank > 0


def _trim(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if set(shape[2:]) <= {1} else shape


def _factors(
    parts: Mapping[str, np.ndarray], weight: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """down, up and magnitude in the shapes of a `Layer`."""
    down, up = parts["down"], parts["up"]
    if "mid" in parts:  # LoCon's third factor, a kernel between two 1x1 kernels
        mid, first = (x.astype(np.float32) for x in (parts["mid"], down.reshape(down.shape[:2])))
        down = np.einsum("rs...,si->ri...", mid, first)
    magnitude = parts["magnitude"].reshape(-1) if "magnitude" in parts else None
    return down.reshape(-1, *weight[1:]), up.reshape(up.shape[:2]), magnitude


def _scalar(file: AnyPath, entry: Entry) -> float:
    dtype = SCALARS[entry.dtype]
    with reading(file), file.open("rb") as stream:
        stream.seek(entry.offset)
        return float(np.frombuffer(stream.read(dtype.itemsize), dtype)[0])


# --- What PEFT keeps beside the tensors ------------------------------------------------------


def _configs(file: AnyPath) -> dict[str, dict[str, Any]]:
    """PEFT's configuration of each component: from the header, or from the file beside it."""
    beside = file.parent / "adapter_config.json"
    if file.name.startswith("adapter_model.") and beside.is_file():
        return dict.fromkeys(names.COMPONENTS, read_json(beside))
    text = _metadata(file).get(METADATA)
    if not text:
        return {}
    try:
        flat = json.loads(text)
        prefixes = {component: f"{component}." for component in names.COMPONENTS}
        return {
            component: {
                key.removeprefix(prefix): value
                for key, value in flat.items()
                if key.startswith(prefix)
            }
            for component, prefix in prefixes.items()
            if any(key.startswith(prefix) for key in flat)
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise JaxsdError(f"{file} has broken {METADATA} in its header") from None


def _metadata(file: AnyPath) -> dict[str, Any]:
    """What a header, checked before, says about the whole file; PyTorch's says nothing."""
    with reading(file), file.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"PK"):
            return {}
        found = json.loads(stream.read(struct.unpack("<Q", start)[0])).get("__metadata__")
    return found if isinstance(found, dict) else {}


def _configured_alpha(config: dict[str, Any] | None, name: str, rank: int, file: AnyPath) -> float:
    """alpha as PEFT's configuration tells it: one for all, and exceptions by name."""
    if config is None:
        return float(rank)
    module = name.removesuffix(".weight")
    alpha, exceptions = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    try:
        for pattern, other in exceptions.items():
            # PEFT would run these as regular expressions, which may take forever; diffusers
            # writes names, with ^ where nothing may stand before them.
            if not re.fullmatch(r"\^?[\w.]+", pattern):
                raise JaxsdError(f"{file} names layers by {pattern!r}: only whole names are read")
            end = pattern.removeprefix("^")
            whole = module in (end, f"text_model.{end}") or f"text_model.{module}" == end
            if whole or (end == pattern and module.endswith(f".{end}")):
                alpha = other
                break
        alpha = float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    except (TypeError, ValueError, AttributeError, OverflowError):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise JaxsdError(f"{file}: PEFT's configuration tells no alpha for {module}")
    return alpha


# --- Writing ---------------------------------------------------------------------------------


def save(lora: LoRA, path: str | os.PathLike, form: str = "peft", dtype: Any = None) -> AnyPath:
    """Writes a LoRA, whole or not at all, and returns the file's path.

    path: a folder, in which diffusers' name is used, or the path of a .safetensors file. form:
    "peft", as diffusers writes, whose alphas stand in the header: diffusers and PEFT look there,
    most other programs take the rank for alpha; or "kohya", which all of them read, and where alpha
    is a number of its own. dtype: of the factors, as in `weights.save`; alphas stay float32.
    """
    check_form(form, lora.layers)
    prefixes = names.kohya_prefixes(lora.layers)
    factors, alphas, metadata = {}, {}, {}
    for component, layers in lora.layers.items():
        for name, layer in layers.items():
            module = name.removesuffix(".weight")
            if form == "peft":
                factors |= _peft(f"{component}.{module}", layer)
            else:
                stem = prefixes[component] + module.replace(".", "_")
                factors |= _kohya(stem, layer)
                alphas[f"{stem}.alpha"] = jnp.asarray(layer.alpha, jnp.float32)
        metadata |= {f"{component}.{key}": value for key, value in _config(layers).items()}
    wanted = None if dtype is None else tensors.as_dtype(dtype)
    params = {name: jnp.asarray(value, wanted) for name, value in factors.items()} | alphas
    told = {METADATA: json.dumps(metadata)} if form == "peft" else {}
    return tensors.save(params, path, DIFFUSERS_FILE, metadata=told)


def check_form(form: str, components: Collection[str]) -> None:
    """JaxsdError if a LoRA that changes these components cannot be saved in this form."""
    if form not in ("peft", "kohya"):
        raise JaxsdError(f"unknown form of LoRA {form!r}; there are peft and kohya")
    known = names.kohya_prefixes(dict.fromkeys(components, ()))
    if form == "kohya" and (strange := {*components} - known.keys()):
        raise JaxsdError(f"kohya has no names for {listing(sorted(strange))}: save it as peft")


def _config(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """PEFT's LoraConfig of one component: the most frequent rank and alpha, and the exceptions."""
    # transformers >= 5.6 leaves text_model. out; PEFT looks for the end of a name, unless ^ is told
    modules = {name: name.removesuffix(".weight").removeprefix("text_model.") for name in layers}
    ranks = {modules[name]: layer.rank for name, layer in layers.items()}
    alphas = {modules[name]: float(layer.alpha) for name, layer in layers.items()}
    [(rank, _)] = collections.Counter(ranks.values()).most_common(1)
    [(alpha, _)] = collections.Counter(alphas.values()).most_common(1)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "target_modules": sorted(modules.values()),
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
    }


def _peft(module: str, layer: Layer) -> dict[str, np.ndarray]:
    parts = {"lora_A.weight": layer.down, "lora_B.weight": _kernel(layer.up, layer)}
    if layer.magnitude is not None:
        kernel = (1, -1, 1, 1) if layer.down.ndim == 4 else (-1,)
        parts["lora_magnitude_vector"] = layer.magnitude.reshape(kernel)
    return {f"{module}.{part}": value for part, value in parts.items()}


def _kohya(module: str, layer: Layer) -> dict[str, np.ndarray]:
    if layer.magnitude is not None:
        raise JaxsdError("programs differ about DoRA under kohya's names: save it as peft")
    return {
        f"{module}.lora_down.weight": layer.down,
        f"{module}.lora_up.weight": _kernel(layer.up, layer),
    }


def _kernel(up: np.ndarray, layer: Layer) -> np.ndarray:
    """[out, r], or [out, r, 1, 1] beside a convolution's `down`."""
    return up.reshape(*up.shape, *(1,) * (layer.down.ndim - 2))
