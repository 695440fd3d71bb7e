"""Files of prompts: a prompt a line, or JSON lines, read one at a time however long they are.

A line that begins with { is an object with `prompt` and, if wanted, `seed` and `negative_prompt`;
any other is a prompt as it stands. In a file named .jsonl every line is an object.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxsd.errors import JaxsdError
from jaxsd.seeds import SEEDS

KEYS = ("prompt", "seed", "negative_prompt")
MAX_LINE = 1_000_000  # bytes; a file that is none of lines would else be read into memory


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a file of prompts: what it says, and nothing where it is silent; index from 0."""

    index: int
    prompt: str
    seed: int | None = None
    negative_prompt: str | None = None


class Scan(NamedTuple):
    """How many lines a file has, the SHA-256 of what they say, and that of its first lines alone.

    start is None if there are fewer than were asked for.
    """

    count: int
    digest: str
    start: str | None


def read_lines(path: Path) -> Iterator[Line]:
    """Each line in turn; JaxsdError names the first one that is blank or cannot be read."""
    try:
        # A pipe could not be read again: the whole file is checked before anything is drawn
        if not path.is_file():
            raise JaxsdError(f"{path} is no file of prompts" if path.exists() else
                             f"the file of prompts {path} does not exist")  # fmt: skip
        with open(path, "rb") as stream:
            index = 0
            while data := stream.readline(MAX_LINE + 1):
                yield _parse(data, index, path)
                index += 1
    except OSError as error:
        raise JaxsdError(f"cannot read {path}: {error.strerror or error}") from None
    if not index:
        raise JaxsdError(f"{path} is empty: write a prompt on each line")


def scan(path: Path, start: int = 0) -> Scan:
    """Reads the whole file once, and remembers nothing of it but this; JaxsdError as above."""
    digest, known, count = hashlib.sha256(), None, 0
    for line in read_lines(path):
        if line.index == start:
            known = digest.hexdigest()
        said = [line.prompt, line.seed, line.negative_prompt]
        digest.update(json.dumps(said).encode() + b"\n")
        count += 1
    if count == start:
        known = digest.hexdigest()
    return Scan(count, digest.hexdigest(), known)


def _parse(data: bytes, index: int, path: Path) -> Line:
    where = f"{path}, line {index + 1}"
    if len(data) > MAX_LINE:
        raise JaxsdError(f"{where} is longer than {MAX_LINE} bytes: no prompt")
    try:
        text = data.decode("utf-8-sig" if index == 0 else "utf-8").strip()
    except UnicodeDecodeError:
        raise JaxsdError(f"{where} is not UTF-8 text") from None
    if not text:
        raise JaxsdError(f'{where} is blank: leave it out, or write {{"prompt": ""}}')
    if text.startswith("{") or path.suffix == ".jsonl":
        return Line(index, **_object(text, where))
    return Line(index, text)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise JaxsdError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise JaxsdError(f'{where} must be an object with a "prompt", such as {{"prompt": "..."}}')
    if unknown := [name for name in values if name not in KEYS]:
        raise JaxsdError(f"{where} says {unknown[0]!r}: it may say {', '.join(KEYS)}")
    seed, negative = values.get("seed"), values.get("negative_prompt")
    if seed is not None and (type(seed) is not int or not 0 <= seed < SEEDS):
        raise JaxsdError(f"{where}: seed must be a whole number from 0 to {SEEDS - 1}, not {seed}")
    if negative is not None and not isinstance(negative, str):
        raise JaxsdError(f"{where}: negative_prompt must be text, not {negative}")
    try:
        f"{values['prompt']}{negative}".encode()
    except UnicodeEncodeError:  # half of a pair of \\u escapes
        raise JaxsdError(f"{where} is not Unicode text") from None
    return values
