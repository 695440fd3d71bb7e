"""What the library says when it refuses: one line."""

from collections.abc import Callable
from typing import Any

import pytest

from jaxsd.errors import JaxsdError


def refused(call: Callable, *args: Any, **kwargs: Any) -> str:
    """The message of the JaxsdError that the call must raise: a single line."""
    with pytest.raises(JaxsdError) as caught:
        call(*args, **kwargs)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)
