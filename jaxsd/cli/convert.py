"""`jaxsd convert SRC DST`: between diffusers folders, single files and Orbax."""

import dataclasses
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """Write a model in another form: a diffusers folder, a single file, or Orbax."""

    source: tyro.conf.Positional[str]
    """A folder (diffusers or Orbax), a single file (.safetensors, .ckpt), or a Hub id."""
    target: tyro.conf.Positional[str]
    """A file that ends in .safetensors, or a folder."""
    orbax: bool = False
    """The target's weights as Orbax checkpoints."""
    dtype: Literal["float32", "float16", "bfloat16", "int8"] | None = None
    """By default each array keeps its own. int8, a quarter of float32, is for jaxsd alone."""
    variant: str | None = None
    """Which form of the source is read, where it has several: fp16, non_ema."""
    target_variant: str | None = None
    """A part of the names of the files that are written into a folder: fp16."""
    base: str | None = None
    """A model that ships (digits): what is the same there is left out, and read from there."""
    family: str | None = None
    """Of a single file that does not tell: sd2, sd2-v, ..."""
    config: str | None = None
    """A diffusers folder whose configs are those of the single file."""
    tokenizer: str | None = None
    """A folder or a Hub id with the vocabulary, which a single file does not hold."""
    use_ema: bool = False
    """Of a single file: the moving averages of the UNet in place of its weights."""


def main(argv: list[str] | None = None) -> None:
    from jaxsd.conversion import convert

    options = tyro.cli(Options, args=argv, prog="jaxsd convert")
    convert(**dataclasses.asdict(options))
    print(f"wrote {options.target}")
