"""A folder of pictures made from a file of prompts: what is there already is not made again.

The folder says in `sampling.json` how its pictures are made, and of which lines: one that holds
others' is refused, and the same command again makes what is missing. The file comes just before the
first picture, so that what fails before has claimed nothing.
"""

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from jaxsd import prompt_files
from jaxsd.errors import JaxsdError
from jaxsd.weights.files import read_json, reading, write_json

FILE = "sampling.json"
PICTURE = re.compile(r"\d{8,}-seed\d+\.png")
UNFINISHED = re.compile(r"\.\d{8,}-seed\d+\.png\.[0-9a-f]{32}\.tmp")  # `weights.files.replacing`
# Seconds after which nobody is at it any more: a picture that was not finished, and a FILE after
# which no picture came
GIVEN_UP, NOT_FOLLOWED = 3600.0, 10.0


def place(folder: Path, index: int, seed: int) -> Path:
    """The file of a picture: the index of its prompt's line, from 0, and its seed."""
    return folder / f"{index:08}-seed{seed}.png"


def check(folder: Path, settings: dict[str, Any], prompts: Path) -> dict[str, Any]:
    """What `claim` needs to make the folder one of pictures of this file: a JSON object.

    Its "lines" says how many the file has; some may have been added since pictures were made.
    settings: a JSON object of what makes the pictures. JaxsdError if the folder holds pictures of
    other settings or lines. What a killed run left is removed, once it is old enough to be no other
    command's that is writing.
    """
    file, drawn, writing = folder / FILE, None, False
    with os.scandir(folder) as entries:
        for entry in entries:
            if PICTURE.fullmatch(entry.name):
                drawn = entry.name
            elif UNFINISHED.fullmatch(entry.name):
                writing |= not _remove_old(folder / entry.name, GIVEN_UP)
    if not drawn and not writing:
        _remove_old(file, NOT_FOLLOWED)
    if drawn and not file.exists():
        raise JaxsdError(f"{folder} holds pictures such as {drawn}, and no {FILE} that says how "
                         "they were made: take another --out")  # fmt: skip
    known = _read(file) if drawn else None
    scan = prompt_files.scan(prompts, known["lines"] if known else 0)
    settings = json.loads(json.dumps(settings))  # as it comes back from the file
    if known is not None:
        _compare(known, settings, scan, folder, prompts)
    return {"settings": settings, "lines": scan.count, "digest": scan.digest}


def claim(folder: Path, record: dict[str, Any], prompts: Path) -> None:
    """Before a first picture is written, or taken for one that need not be: says how it is made.

    record: what `check` returned. JaxsdError if another command was faster, and makes others.
    """
    file = folder / FILE
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    try:
        with open(file, "x", encoding="utf-8") as stream:
            stream.write(text)
        return
    except FileExistsError:
        pass
    except OSError as error:
        raise JaxsdError(f"cannot write {file}: {error.strerror or error}") from None
    with reading(file):
        for _ in range(20):
            if file.stat().st_size:
                break
            time.sleep(0.1)  # another process has made it, and is about to write
    known = _read(file)
    if known != record:
        scan = prompt_files.scan(prompts, known["lines"])
        _compare(known, record["settings"], scan, folder, prompts)
        write_json(file, record)


def _remove_old(file: Path, seconds: float) -> bool:
    """Whether it was as old as this, and is gone."""
    with contextlib.suppress(FileNotFoundError):  # another command's, which has just finished it
        if time.time() - file.stat().st_mtime > seconds:
            file.unlink()
            return True
    return False


def _read(file: Path) -> dict[str, Any]:
    known = read_json(file)
    settings, lines, digest = (known.get(name) for name in ("settings", "lines", "digest"))
    counted = type(lines) is int and lines >= 0
    if not (isinstance(settings, dict) and counted and isinstance(digest, str)):
        raise JaxsdError(f"{file} does not say how the pictures beside it were made (settings, "
                         "lines, digest): take another --out")  # fmt: skip
    return known


def _compare(
    known: dict[str, Any],
    settings: dict[str, Any],
    scan: prompt_files.Scan,
    folder: Path,
    prompts: Path,
) -> None:
    way = "take another --out, or what it was made with"
    before = known["settings"]
    for name in sorted(before.keys() | settings.keys()):
        if (was := before.get(name)) != (now := settings.get(name)):
            said = [_said(value) for value in (was, now)]
            raise JaxsdError(f"{folder} holds pictures with {name} {said[0]}, not {said[1]}: {way}")
    if scan.start is None:
        raise JaxsdError(f"{folder} holds pictures of {known['lines']} lines, and {prompts} has "
                         f"{scan.count}: {way}")  # fmt: skip
    if scan.start != known["digest"]:
        raise JaxsdError(f"{folder} holds pictures of other lines than the first {known['lines']} "
                         f"of {prompts}: {way}")  # fmt: skip


def _said(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
