"""How much a request, and all of them together, may ask for; what says that it is too much."""

import dataclasses

from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes on.

    steps, count (pictures of one request), prompt_length (characters), upload_bytes and
    upload_pixels (of each picture) bound a request; waiting, the pictures of all requests that
    have not begun; timeout, the seconds until an answer; frames, the pictures shown on the way.
    """

    steps: int = 100
    count: int = 8
    prompt_length: int = 1000
    upload_bytes: int = 8 * 2**20
    upload_pixels: int = 16_000_000
    waiting: int = 64
    timeout: float = 120.0
    frames: int = 8

    @property
    def body_bytes(self) -> int:
        """The most that a request's body may have: two pictures in base64, and the words."""
        return 2 * (self.upload_bytes * 4 // 3 + 4) + 2**16


class Refused(JaxsdError):
    """A request that cannot be; param: which of its fields says so."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class TooLarge(Refused):
    """A picture or a body with more bytes than are taken."""


class Busy(JaxsdError):
    """No room now; retry_after: in how many seconds there may be."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after
