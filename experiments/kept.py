"""Figures that scripts keep by name in a JSON file, written whole after each."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd.weights import read_json, write_json


class Kept:
    """What was measured, and of what: figures of other weights or settings are not known."""

    def __init__(self, file: Path):
        self._file = file
        self._entries: dict[str, Any] = read_json(file) if file.exists() else {}

    def get(self, name: str, of: str) -> dict[str, Any] | None:
        entry = self._entries.get(name)
        return entry["figures"] if entry and entry["of"] == of else None

    def put(self, name: str, of: str, figures: Mapping[str, Any]) -> None:
        self._entries[name] = {"of": of, "figures": dict(figures)}
        write_json(self._file, dict(sorted(self._entries.items())))


def digest(params: Mapping[str, Any]) -> str:
    """Tells apart weights, arrays by name."""
    found = hashlib.sha256()
    for name, value in sorted(params.items()):
        found.update(name.encode() + np.asarray(value).tobytes())
    return found.hexdigest()[:16]
