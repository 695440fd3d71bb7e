"""A folder of pictures made from a file of prompts: what is there already is not made again.

The folder says in `sampling.json` how its pictures are made, and of which lines: one that holds
others' is refused, and the same command again makes what is missing.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from jaxsd import prompt_files
from jaxsd.errors import JaxsdError
from jaxsd.weights.files import read_json, write_json

FILE = "sampling.json"
PICTURE = re.compile(r"\d{8,}-seed\d+\.png")
UNFINISHED = re.compile(r"\.\d{8,}-seed\d+\.png\.[0-9a-f]{32}\.tmp")  # `weights.files.replacing`


def place(folder: Path, index: int, seed: int) -> Path:
    """The file of a picture: the index of its prompt's line, from 0, and its seed."""
    return folder / f"{index:08}-seed{seed}.png"


def claim(folder: Path, settings: dict[str, Any], prompts: Path) -> int:
    """Makes the folder one of pictures of this file, and returns how many lines that has.

    Lines may have been added to the file since. settings: a JSON object of what makes the pictures.
    JaxsdError if the folder holds pictures of other settings or lines. What a killed run left of
    unfinished files is removed.
    """
    file, drawn = folder / FILE, None
    with os.scandir(folder) as entries:
        for entry in entries:
            if PICTURE.fullmatch(entry.name):
                drawn = entry.name
            elif UNFINISHED.fullmatch(entry.name):
                (folder / entry.name).unlink(missing_ok=True)
    if drawn and not file.exists():
        raise JaxsdError(f"{folder} holds pictures such as {drawn}, and no {FILE} that says how "
                         "they were made: take another --out")  # fmt: skip
    known = read_json(file) if drawn else None  # what has drawn nothing may have been refused
    lines = 0 if known is None else known.get("lines", 0)
    scan = prompt_files.scan(prompts, lines)
    settings = json.loads(json.dumps(settings))  # as it comes back from the file
    if known is not None:
        _compare(known, settings, scan, folder, prompts)
    write_json(file, {"settings": settings, "lines": scan.count, "digest": scan.digest})
    return scan.count


def _compare(
    known: dict[str, Any],
    settings: dict[str, Any],
    scan: prompt_files.Scan,
    folder: Path,
    prompts: Path,
) -> None:
    way = "take another --out, or what it was made with"
    before = known.get("settings", {})
    for name in sorted(before.keys() | settings.keys()):
        if (was := before.get(name)) != (now := settings.get(name)):
            said = [_said(value) for value in (was, now)]
            raise JaxsdError(f"{folder} holds pictures with {name} {said[0]}, not {said[1]}: {way}")
    if scan.start is None:
        raise JaxsdError(f"{folder} holds pictures of {known['lines']} lines, and {prompts} has "
                         f"{scan.count}: {way}")  # fmt: skip
    if scan.start != known.get("digest"):
        raise JaxsdError(f"{folder} holds pictures of other lines than the first {known['lines']} "
                         f"of {prompts}: {way}")  # fmt: skip


def _said(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
