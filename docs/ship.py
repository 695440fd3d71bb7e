"""Puts the models that the README's commands trained into the package, in float16.

`python docs/ship.py` reads runs/digits-ddpm, runs/digits and runs/clip; with a name (`digits`) it
leaves the other model as it is. Cards stay as they are.
"""

import sys
from pathlib import Path

import jax.numpy as jnp

import jaxsd
from jaxsd import weights
from jaxsd.components import load_clip
from jaxsd.hub import PRETRAINED

RUNS = Path("runs")


def main(names: list[str]) -> None:
    for name in names:
        jaxsd.load(RUNS / name / "model").save(PRETRAINED / name, jnp.float16)
    if "digits" in names:  # both towers: sampling needs them not, comparing with captions does
        clip = RUNS / "clip" / "model" / "clip"
        target = PRETRAINED / "digits" / "clip"
        weights.save(load_clip(clip).params, target, weights.TRANSFORMERS_FILE, dtype=jnp.float16)
        weights.write_json(target / "config.json", weights.read_json(clip / "config.json"))
    files = [path for path in PRETRAINED.rglob("*") if path.is_file()]
    print(f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB in {PRETRAINED}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["digits-ddpm", "digits"])
