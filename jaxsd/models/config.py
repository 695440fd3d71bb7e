"""Model configurations that read and write diffusers' and transformers' `config.json`."""

import dataclasses
from typing import Any, TypeVar

from jaxsd.errors import JaxsdError

T = TypeVar("T", bound="Config")  # not Self, which beartype cannot check method by method


class Config:
    """Base of the frozen config dataclasses.

    A field has the name and meaning that it has in `config.json`. `NEUTRAL` names what the file may
    also say without changing the architecture built here; any other value of those, or a name
    that stands in neither list, is refused: a silently ignored option gives wrong pictures.
    """

    NEUTRAL: dict[str, tuple[Any, ...]] = {}
    IGNORED: tuple[str, ...] = ()

    @classmethod
    def from_json(cls: type[T], values: dict[str, Any], where: str = "config.json") -> T:
        """Builds the config; JaxsdError lists every option that is not supported."""
        fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore
        known, unsupported = {}, []
        for name, value in values.items():
            value = tuple(value) if isinstance(value, list) else value
            if name in fields:
                # A list where one number is known: heads or layers that differ from block to block.
                kinds = [kind.startswith("tuple") for kind in str(fields[name].type).split(" | ")]
                if isinstance(value, tuple) not in kinds:
                    unsupported.append(f"{name}={values[name]!r}")
                known[name] = value
            elif name in cls.NEUTRAL:
                if value not in cls.NEUTRAL[name]:
                    unsupported.append(f"{name}={value!r} (supported: {cls.NEUTRAL[name][0]!r})")
            elif not name.startswith("_") and name not in cls.IGNORED:
                unsupported.append(f"{name}={value!r} (unknown)")
        required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(known)):
            raise JaxsdError(f"{where}: no value for {', '.join(missing)}")
        if unsupported:
            raise JaxsdError(f"{where}: unsupported {'; '.join(unsupported)}")
        try:
            return cls(**known)
        except (TypeError, ValueError) as error:
            raise JaxsdError(f"{where}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """What `config.json` says: the fields, tuples as lists."""
        values = dataclasses.asdict(self)  # pyright: ignore
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
