"""`jaxsd convert SRC DST`: between diffusers folders, single files and Orbax; LoRAs in and out."""

import dataclasses
from typing import Literal

import tyro

from jaxsd.cli.several import Several, split
from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True)
class Options:
    """Write a model in another form: a diffusers folder, a single file, Orbax, or as a LoRA."""

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

    lora: Several[str] = ()
    """Add a LoRA to the weights for good, file:scale; may be repeated."""
    extract_lora_from: str | None = None
    """A model that the source was tuned from: the target is a LoRA that leads from one to the
    other."""
    lora_rank: int = 8
    """Of an extracted LoRA: the more, the nearer, and the larger."""
    lora_form: Literal["peft", "kohya"] = "peft"
    """The names in an extracted LoRA: diffusers', or those that most other programs read."""


# What says how a whole model is written, which an extracted LoRA is not.
WHOLE = ("orbax", "target_variant", "base", "lora")
EXTRACTION = ("extract_lora_from", "lora_rank", "lora_form")


def main(argv: list[str] | None = None) -> None:
    from jaxsd import conversion

    options = tyro.cli(Options, args=argv, prog="jaxsd convert")
    given = dataclasses.asdict(options)
    loras = [split(text, float, 1.0) for text in given["lora"]]
    whole = {name: given.pop(name) for name in WHOLE}
    base, rank, form = (given.pop(name) for name in EXTRACTION)
    if base is None:
        del whole["lora"]
        conversion.convert(**given, **whole, loras=loras)
    else:
        if asked := [f"--{name.replace('_', '-')}" for name, value in whole.items() if value]:
            raise JaxsdError(f"an extracted LoRA takes no {', '.join(asked)}: leave it out")
        found = conversion.extract_lora(**given, base=base, rank=rank, form=form)
        layers = sum(len(names) for names in found.lora.layers.values())
        print(f"{layers} layers of rank {rank} hold {found.kept:.1%} of the change (Frobenius "
              f"norm); a LoRA of any rank could hold {found.possible:.1%}")  # fmt: skip
    print(f"wrote {options.target}")
