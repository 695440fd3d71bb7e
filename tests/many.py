"""Files of prompts drawn to a folder, for the tests of `sample.py --prompts-file`."""

import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from jaxsd.cli import sample

EIGHT = jax.local_devices()
LINES = [*"0123456789", '{"prompt": "7", "seed": 4294967290}', "three", "four"]


@pytest.fixture(name="prompts")
def file_of_prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return file


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def pixels(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            found[path.name] = np.asarray(picture).astype(int)
    return found


def use_devices(monkeypatch, count: int) -> None:
    devices = EIGHT[:count]
    monkeypatch.setattr(jax, "local_devices", lambda **_: devices)


def draw(prompts: Path, out: Path, **others) -> Any:
    how = {"model": "digits-ddpm-4step", "batch_size": 2} | others
    return sample.run(sample.Options((), prompts, out=out, **how))


class Painter:
    """Stands in for a pipeline: a picture is its seed, in grey."""

    tokenizers, guidance_embedded, takes_prompts = {"tokenizer": None}, False, True

    def spread(self, mesh):
        pass

    def plan_steps(self, sampler, steps):
        return types.SimpleNamespace(count=steps), None

    def start(self, prompts, seeds, **_):
        grey = np.asarray(seeds, np.float32).reshape(-1, 1, 1, 1) % 256 / 127.5 - 1
        return np.broadcast_to(grey, (len(seeds), 64, 64, 3))
