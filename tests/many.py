"""Files of prompts drawn to a folder, for the tests of `sample.py --prompts-file`."""

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
