"""What is left out of a training, counted and named: in the log, and all of it in a file."""

import logging
from collections.abc import Iterable
from pathlib import Path

from jaxsd.weights.files import listing

FILE = "skipped.txt"
_log = logging.getLogger("jaxsd.data")


class Skipped:
    """Names and reasons of pictures that are not used; also in `workdir/skipped.txt`."""

    def __init__(self, workdir: Path | None = None):
        self.file = None if workdir is None else workdir / FILE
        self.reasons: dict[str, str] = {}
        written = self.file.read_text("utf-8") if self.file and self.file.exists() else ""
        self.written = set(written.splitlines())

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, skipped: Iterable[tuple[str, str]], what: str) -> None:
        """Takes note of (name, reason) of pictures; those that are new are told in one line.

        what: happens to them, "left out" say.
        """
        new = {name: reason for name, reason in skipped if name not in self.reasons}
        if not new:
            return
        self.reasons |= new
        rows = [f"{one_line(name)}\t{one_line(reason)}" for name, reason in new.items()]
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            fresh = [row for row in rows if row not in self.written]
            self.written |= set(fresh)
            with open(self.file, "a", encoding="utf-8") as file:
                file.write("".join(row + "\n" for row in fresh))
        told = listing(
            [f"{one_line(name)} ({one_line(reason)})" for name, reason in new.items()][:3]
        )
        more = f", and {len(new) - 3} more" if len(new) > 3 else ""
        where = f"; all of them in {self.file}" if self.file is not None else ""
        noun = "picture is" if len(new) == 1 else "pictures are"
        _log.warning("%d %s %s: %s%s%s", len(new), noun, what, told, more, where)


def one_line(text: str) -> str:
    """On one line, whatever a file is called."""
    return text.encode("utf-8", "replace").decode().translate({9: " ", 10: " ", 13: " "})
