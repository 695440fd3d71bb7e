"""Trains the models that ship, from nothing, as docs/models.md says: one command for all.

`python experiments/train_digits.py` runs the stages below one after the other, each a `train.py` of
its own, in runs/. Killed and started again it goes on where it was: an ended stage only says so.
`--fake-devices 8 --fsdp 4` splits batches and parameters over eight pretended devices, as a pod
would. `--stages vae clip-a clip latents digits` are those of `digits` alone.
"""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
# In this order; `runs` stands for the folder of the runs.
STAGES = {
    "digits-ddpm": "ddpm --steps 5000 --batch-size 64",
    "vae": "vae --steps 3000 --kl-weight 1e-3",
    "clip-a": "clip --data digits-same-colours --steps 2000 --learning-rate 2e-3",
    "clip": "clip --initial runs/clip-a/model --data digits --steps 8000 --learning-rate 2e-3",
    "latents": "encode --vae runs/vae/model --text-encoder runs/clip/model --count 65536",
    "digits": "text-to-image --vae runs/vae/model --text-encoder runs/clip/model "
    "--data runs/latents --steps 4000 --batch-size 64",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Which stages to run, where, and on how many pretended devices."""

    runs: Path = Path("runs")
    fake_devices: int = 0
    fsdp: int = 1
    stages: tuple[str, ...] = tuple(STAGES)


def command(stage: str, runs: Path) -> list[str]:
    """The arguments of `train.py` for a stage."""
    words = [w.replace("runs/", f"{runs}/", 1) if w.startswith("runs/") else w
             for w in STAGES[stage].split()]  # fmt: skip
    return [*words, "--workdir", str(runs / stage)]


def main(options: Options) -> None:
    environment = dict(os.environ)
    if options.fake_devices:
        flag = f"--xla_force_host_platform_device_count={options.fake_devices}"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}"
    for stage in options.stages:
        started = time.monotonic()
        arguments = command(stage, options.runs)
        if options.fsdp != 1 and stage != "latents":
            arguments += ["--fsdp", str(options.fsdp)]
        print(f"train.py {' '.join(arguments)}", flush=True)
        subprocess.run([sys.executable, ROOT / "train.py", *arguments], env=environment, check=True)
        print(f"{stage}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
