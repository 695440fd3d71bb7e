"""What a model is, from headers alone: family, parameters, dtypes, sizes, and what is unusual.

report = inspect("v1-5-pruned.safetensors")
report.family, report.components["unet"].parameters, report.unusual

Neither jax nor a tensor is loaded, so that it takes the time of reading a header.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from jaxsd.errors import JaxsdError
from jaxsd.hub import FOLDERS, PRETRAINED, base_of, find, part_of
from jaxsd.weights import embedding_names, lora_names, single
from jaxsd.weights.entries import DTYPES, SCALED, Entry
from jaxsd.weights.files import AnyPath, as_path, listing, read_json, reading
from jaxsd.weights.headers import component_entries, read_entries
from jaxsd.weights.orbax import FOLDER, is_orbax, read_orbax_header


@dataclasses.dataclass(frozen=True)
class Held:
    """The weights of one network."""

    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]  # parameters of each dtype, as safetensors spells it


@dataclasses.dataclass(frozen=True)
class Report:
    """What `jaxsd info` prints."""

    path: str
    kind: str  # "diffusers folder", "single file", ...
    family: str  # one of jaxsd.families, several where the file cannot tell, or "unknown"
    components: dict[str, Held]
    unusual: list[str]


def inspect(model: str | PurePath, variant: str | None = None) -> Report:
    """The report on a folder, a file, a Hub id or an Orbax checkpoint; JaxsdError if it is none."""
    path = as_path(model)
    with reading(path):
        checkpoint = is_orbax(path)
    if checkpoint:
        entries = read_orbax_header(path)
        return Report(str(path), "Orbax checkpoint", "unknown", {"arrays": _held(entries)}, [])
    path = find(model, variant)
    if path.is_file():
        return _inspect_file(path)
    if (path / "model_index.json").is_file():
        return _inspect_folder(path, variant)
    config = read_json(path / "config.json")
    entries = _component_entries(path, variant)
    kind = f"component folder, {_class_of(config)}"
    families = _families(config, {})
    held = {path.name: _held(entries)}
    return Report(str(path), kind, " or ".join(families) or "unknown", held, _oddities(held))


def _held(entries: Mapping[str, Entry]) -> Held:
    counts: Counter[str] = Counter()
    for entry in entries.values():
        counts[entry.kind] += math.prod(entry.shape)
    size = sum(entry.size for entry in entries.values())
    return Held(len(entries), sum(counts.values()), size, dict(counts.most_common()))


def _oddities(components: Mapping[str, Held]) -> list[str]:
    """What a set of networks shows by its dtypes."""
    lines = []
    for name, held in components.items():
        kinds = {dtype for dtype, count in held.dtypes.items() if count}
        if len(kinds & DTYPES.keys()) > 1:
            lines.append(f"{name} mixes {', '.join(sorted(kinds))}")
        if alien := sorted(kinds - DTYPES.keys() - {SCALED}):
            lines.append(f"{name} holds {', '.join(alien)}, which are no weights")
    return lines


# --- Folders ---------------------------------------------------------------------------------


def _inspect_folder(folder: AnyPath, variant: str | None) -> Report:
    index = read_json(folder / "model_index.json")
    named = [n for n, v in index.items() if isinstance(v, list) and v and v[0] is not None]
    held, unusual = {}, []
    base = base_of(index, folder)
    places = {name: part_of(folder, name, index) for name in (*FOLDERS, "scheduler")}
    for name in (n for n in FOLDERS if n in named):
        try:
            held[name] = _held(_component_entries(places[name], variant))
        except JaxsdError as error:
            unusual.append(str(error))
    config = _json(places["unet"] / "config.json")
    schedule = _json(places["scheduler"] / "scheduler_config.json")
    if shared := [name for name in held if places[name].parent != folder]:
        unusual.append(f"{', '.join(shared)} of {base}, which ships")
    if idle := sorted({*named} - {*FOLDERS, "scheduler", "tokenizer", "tokenizer_2"}):
        unusual.append(f"not read: {', '.join(idle)}")
    family = " or ".join(_families(config, schedule)) or "unknown"
    if base is not None or folder.parent == PRETRAINED:
        family = base or folder.name
    kind = f"diffusers folder, {_class_of(index)}"
    return Report(str(folder), kind, family, held, unusual + _oddities(held))


def _component_entries(folder: AnyPath, variant: str | None) -> dict[str, Entry]:
    if is_orbax(folder / FOLDER):
        return read_orbax_header(folder / FOLDER)
    return component_entries(folder, variant)[0]


def _json(path: AnyPath) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _class_of(values: Mapping[str, Any]) -> str:
    named = values.get("_class_name") or values.get("architectures") or "of an unknown class"
    return str(named[0] if isinstance(named, list) and named else named)


def _families(unet: Mapping[str, Any], schedule: Mapping[str, Any]) -> list[str]:
    """The families that a UNet's and a scheduler's config.json can be of."""
    key: Any = unet.get("cross_attention_dim"), unet.get("in_channels")
    found = list(single.FAMILIES.get(key, ())) if all(type(n) is int for n in key) else []
    if unet.get("time_cond_proj_dim"):
        return [f"{name}-lcm" for name in found]
    if len(found) > 1 and "prediction_type" in schedule:
        velocity = schedule["prediction_type"] == "v_prediction"
        found = [name for name in found if name.endswith("-v") == velocity]
    return found


# --- Files -----------------------------------------------------------------------------------


def _inspect_file(file: AnyPath) -> Report:
    entries = read_entries(file)
    parts = single.parts(entries)
    if not parts:
        kind = lora_names.describe(entries) or embedding_names.describe(entries) or "weights"
        held = {"tensors": _held(entries)}
        return Report(str(file), kind, "unknown", held, _oddities(held))
    held, unusual = {}, []
    for part in parts:
        own = {name: e for name, e in entries.items() if name.startswith(part.prefix)}
        used = {name: e for name, e in own.items() if not single.is_idle(name, part)}
        held[part.component] = _held(used)
    if single.has_ema(entries):
        averages = {n: e for n, e in entries.items() if n.startswith("model_ema.")}
        held["unet, moving averages"] = _held(averages)
        unusual.append("moving averages (EMA) of the UNet are there, read with use_ema")
    if alien := single.unexpected(entries, parts):
        unusual.append(f"{len(alien)} unknown tensors: {listing(alien)}")
    missing = [n for n in ("unet", "vae") if n not in held and "controlnet" not in held]
    missing += [] if any(n.startswith(("text", "control")) for n in held) else ["text encoder"]
    if missing:
        unusual.append(f"without {', '.join(missing)}")
    families = single.family(entries)
    if len(families) > 1:
        unusual.append("nothing in the file says which of these families: name it with family")
    family = " or ".join(families) or "unknown"
    return Report(str(file), "single file", family, held, unusual + _oddities(held))
