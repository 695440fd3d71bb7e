"""Puts the models that the commands in docs/models.md trained into the package.

`python experiments/ship.py` ships all of them from runs/, digits' two towers from runs/clip; with
names (`digits-4step`) it leaves the others as they are. Cards stay as they are.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from jaxsd import weights
from jaxsd.components import load_clip, load_parts, save_parts
from jaxsd.conversion import share
from jaxsd.hub import PRETRAINED

RUNS = Path("runs")


class Shipped(NamedTuple):
    """A model that ships: where its training leaves it, and how it is kept."""

    source: str  # in the folder of the runs
    dtype: str = "float16"
    base: str | None = None  # the model that ships whose parts it shares


SHIPPED = {
    "digits-ddpm": Shipped("digits-ddpm/model"),
    "digits": Shipped("digits/model"),
    **{
        f"digits-ddpm-{n}step": Shipped(
            f"digits-ddpm-progressive/{n}-steps/model", "int8", "digits-ddpm"
        )
        for n in (8, 4, 2, 1)
    },
    "digits-4step": Shipped("digits-4step/model", "int8", "digits"),
    **{
        f"digits-{n}step": Shipped(f"digits-fewer/{n}-steps/model", "int8", "digits")
        for n in (2, 1)
    },
    "digits-lcm": Shipped("digits-lcm/model", "int8", "digits"),
}


def main(names: list[str]) -> None:
    for name in names:
        source, dtype, base = SHIPPED[name]
        parts = load_parts(RUNS / source)
        parts = parts if base is None else share(parts, base)
        save_parts(parts, PRETRAINED / name, dtype)
        print(f"{name}: {', '.join([*parts.components, *parts.tokenizers])} in {dtype}")
    if "digits" in names:  # both towers: sampling needs them not, comparing with captions does
        clip = RUNS / "clip" / "model" / "clip"
        target = PRETRAINED / "digits" / "clip"
        weights.save(load_clip(clip).params, target, "model.int8.safetensors", dtype="int8")
        weights.write_json(target / "config.json", weights.read_json(clip / "config.json"))
    files = [path for path in PRETRAINED.rglob("*") if path.is_file()]
    print(f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB in {PRETRAINED}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHIPPED))
