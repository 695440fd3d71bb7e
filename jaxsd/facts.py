"""What must be the same where programs are made and where they are run, and how it is compared."""

import dataclasses
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

# Of JAX's settings those that other numbers come of.
SETTINGS = ("jax_default_matmul_precision", "jax_threefry_partitionable")
Facts = Mapping[str, Any]  # of JSON


def facts(configs: Facts) -> dict[str, Any]:
    """What must be the same where programs are made and where they are run."""
    libraries = {name: metadata.version(name) for name in ("jaxsd", "jax", "jaxlib")}
    machine = {"platform": jax.default_backend()}
    if machine["platform"] != "cpu":  # kernels are chosen by the card, or the chip
        machine["device"] = jax.devices()[0].device_kind
    settings = {name: str(getattr(jax.config, name)) for name in SETTINGS}
    return {**libraries, **machine, **settings, **plain(configs)}


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


def plain(value: Any) -> Any:
    """As JSON holds it."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))
