"""Model configurations that read and write diffusers' and transformers' `config.json`."""

import contextlib
import dataclasses
import types
from typing import Any, TypeVar, get_args, get_origin

from jaxsd.errors import JaxsdError

T = TypeVar("T", bound="Config")  # not Self, which beartype cannot check method by method


class Config:
    """Base of the frozen config dataclasses.

    A field has the name and meaning that it has in `config.json`. `NEUTRAL` names what the file may
    also say without changing the architecture built here; any other value of those, or a name
    that stands in neither list, is refused: a silently ignored option gives wrong pictures. `OURS`
    are fields that diffusers has no word for: they are written only if they say something.
    """

    NEUTRAL: dict[str, tuple[Any, ...]] = {}
    IGNORED: tuple[str, ...] = ()
    OURS: tuple[str, ...] = ()

    @classmethod
    def from_json(cls: type[T], values: dict[str, Any], where: str = "config.json") -> T:
        """Builds the config; JaxsdError lists every option that is not supported."""
        fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore
        known, unsupported = {}, []
        for name, value in values.items():
            value = tuple(value) if isinstance(value, list) else value
            if name in fields:
                try:
                    known[name] = _cast(value, fields[name].type)
                except (TypeError, OverflowError):
                    unsupported.append(f"{name}={short(values[name])}")
            elif name in cls.NEUTRAL:
                if value not in cls.NEUTRAL[name]:
                    neutral = cls.NEUTRAL[name][0]
                    unsupported.append(f"{name}={short(value)} (supported: {neutral!r})")
            elif not name.startswith("_") and name not in cls.IGNORED:
                unsupported.append(f"{short(name)[1:-1]}={short(value)} (unknown)")
        required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
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
        values = {k: v for k, v in values.items() if k not in self.OURS or v is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _cast(value: Any, kind: Any) -> Any:
    """A value of a file as a field's type, a whole number as a float too; TypeError if it is none.

    JSON's other confusions, such as true for 1, are refused: they are mistakes.
    """
    if isinstance(kind, types.UnionType):
        for one in get_args(kind):
            with contextlib.suppress(TypeError):
                return _cast(value, one)
    elif get_origin(kind) is tuple and isinstance(value, tuple):
        return tuple(_cast(v, get_args(kind)[0]) for v in value)
    elif kind is float and type(value) in (int, float) and value == value:  # NaN is not itself
        return float(value)
    elif type(value) is kind and (kind is not str or len(value) <= 100):
        return value
    raise TypeError(f"{value!r} is no {kind}")


def short(value: Any) -> str:
    """How an error shows a value of a file: on one line, and no more than that."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


# Least and most of the numbers in a network's config, far beyond any network there is: what a file
# asks for must be built in seconds, and a mistake in it be told in words.
LIMITS: dict[str, tuple[float, float]] = {
    "downsample_padding": (0, 1),
    "dropout": (0, 0.99),
    "eos_token_id": (0, 1 << 20),
    "freq_shift": (0, 16),
    "layer_norm_eps": (0, 1),
    "layers_per_block": (1, 16),
    "norm_eps": (0, 1),
    "num_decoder_blocks": (0, 16),
    "num_encoder_blocks": (0, 16),
    "num_hidden_layers": (1, 128),
    "scaling_factor": (1e-6, 1e6),
    "transformer_layers_per_block": (0, 32),
    "vocab_size": (1, 1 << 20),
}
SIZE = (1, 1 << 16)  # of any other number
MOST_BLOCKS = 8


class NetworkConfig(Config):
    """A config whose numbers are sizes of a network: ValueError for those that none can have."""

    def __post_init__(self):
        for field in dataclasses.fields(self):  # pyright: ignore
            value = getattr(self, field.name)
            if isinstance(value, list):  # as JSON has them; a config is hashable
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            values = value if isinstance(value, tuple) else (value,)
            if not 1 <= len(values) <= MOST_BLOCKS:
                raise ValueError(f"{field.name} has {len(values)} entries, not 1 to {MOST_BLOCKS}")
            least, most = LIMITS.get(field.name, SIZE)
            for number in values:
                if type(number) in (int, float) and not least <= number <= most:
                    raise ValueError(
                        f"{field.name}={short(number)} is not from {least:g} to {most:g}"
                    )
