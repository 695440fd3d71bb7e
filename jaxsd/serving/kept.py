"""Pictures that are fetched later, by those who asked for an address: in memory, for a while."""

import collections
import secrets
import time

SECONDS = 600
BYTES = 64 * 2**20


class Kept:
    """Files under names that cannot be guessed; the oldest go when their time or the room is up."""

    def __init__(self, seconds: float = SECONDS, most: int = BYTES):
        self._seconds, self._most, self._bytes = seconds, most, 0
        self._files: collections.OrderedDict[str, tuple[float, bytes]] = collections.OrderedDict()

    def add(self, data: bytes) -> str:
        """The name under which the file is found."""
        name = secrets.token_urlsafe(24)
        self._files[name] = time.monotonic() + self._seconds, data
        self._bytes += len(data)
        self._forget()
        return name

    def find(self, name: str) -> bytes | None:
        self._forget()
        return self._files[name][1] if name in self._files else None

    def _forget(self) -> None:
        while self._files:
            until, data = next(iter(self._files.values()))
            if until > time.monotonic() and self._bytes <= self._most:
                return
            self._files.popitem(last=False)
            self._bytes -= len(data)
