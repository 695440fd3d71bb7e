"""Whether the files of a folder are still those that were written: sizes and CRC-32, in a file."""

import zlib
from pathlib import Path

from jaxsd.errors import JaxsdError
from jaxsd.weights import read_json, write_json

FILE = "checksums.json"


def write_checksums(folder: Path, ignored: tuple[str, ...] = ()) -> None:
    """Notes all files of the folder but those named `ignored`, which are about to change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    known = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _crc32(path)]
        for path in files
        if path.name not in (FILE, *ignored)
    }
    write_json(folder / FILE, known)


def find_damage(folder: Path) -> str | None:
    """What is wrong with the first file that is not as it was noted; None if all are."""
    try:
        known = read_json(folder / FILE)
    except JaxsdError as error:
        return str(error)
    for name, noted in known.items():
        path = folder / name
        try:
            size = path.stat().st_size
            found = [size, _crc32(path)] if noted[:1] == [size] else [size]
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if found != noted:
            same = len(found) == 2
            return f"{name} " + ("has other bytes" if same else f"has {size} of {noted[0]} bytes")
    return None


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
