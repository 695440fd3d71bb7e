"""Puts the models that the README's commands trained into the package, in float16.

`python docs/ship.py` reads runs/digits-ddpm, runs/digits and runs/clip; cards stay as they are.
"""

from pathlib import Path

import jax.numpy as jnp

import jaxsd
from jaxsd import weights
from jaxsd.components import PRETRAINED, load_clip

RUNS = Path("runs")


def main() -> None:
    for name in ("digits-ddpm", "digits"):
        jaxsd.load(RUNS / name / "model").save(PRETRAINED / name, jnp.float16)
    # Both towers, for those who want to compare pictures with captions; sampling needs them not.
    clip = RUNS / "clip" / "model" / "clip"
    target = PRETRAINED / "digits" / "clip"
    weights.save(load_clip(clip).params, target, weights.TRANSFORMERS_FILE, dtype=jnp.float16)
    weights.write_json(target / "config.json", weights.read_json(clip / "config.json"))
    files = [path for path in PRETRAINED.rglob("*") if path.is_file()]
    print(f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB in {PRETRAINED}")


if __name__ == "__main__":
    main()
