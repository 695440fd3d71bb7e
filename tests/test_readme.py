"""The README is true: its commands and its Python run as they stand there."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from jaxsd.cli import run_command
from jaxsd.hub import PRETRAINED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
WITH_FILES = re.compile(r"path/to|my-folder|--model wings")  # for a model that the reader has
COMMANDS = [line for line in README.splitlines() if line.startswith("python ")]


def test_the_two_lines_of_the_set_up():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2 and lines[0].split("&&")[-1].strip().startswith(
        ".venv/bin/python sample"
    )
    assert lines[1].endswith("-m pytest -q -n auto --dist loadfile")


def test_the_python_block(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    scope: dict = {}
    exec(block[1], scope)
    assert len(capsys.readouterr().out.splitlines()) == 30  # the callback saw every step
    assert scope["images"][0].size == (32, 32)
    assert set(scope["params"]) == set(scope["pipe"].unet.shapes)


@pytest.mark.parametrize(
    "line", [c for c in COMMANDS if " sample.py " in c and not WITH_FILES.search(c)]
)
def test_sample_commands(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path.parent / "programs"))
    run_command("sample", shlex.split(line)[2:])
    printed = capsys.readouterr().out.split()
    assert printed
    for path in printed:
        with Image.open(path) as image:
            image.verify()


TRAININGS = [shlex.split(c)[2:] for c in COMMANDS if " train.py " in c and "runs/" in c]
ENCODINGS = [arguments for arguments in TRAININGS if arguments[0] == "encode"]


def of_what_ships(arguments):
    """In place of the models that earlier commands would have left: those that ship."""

    def shipped(word):
        told = word == "runs/digits-guided/model"  # the guidance scale, as its students are
        return str(PRETRAINED / ("digits-4step" if told else "digits"))

    return [shipped(word) if re.fullmatch("runs/.*/model", word) else word for word in arguments]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder where the README's `train.py encode` has run, though on few pictures."""
    folder = tmp_path_factory.mktemp("encoded")
    with contextlib.chdir(folder):
        for arguments in map(of_what_ships, ENCODINGS):
            arguments[arguments.index("--count") + 1] = "8"
            run_command("train", [*arguments, "--batch-size", "8"])
    return folder


@pytest.mark.parametrize("arguments", [a for a in TRAININGS if a not in ENCODINGS], ids=" ".join)
def test_train_commands_build_what_they_train(arguments, encoded, monkeypatch, capsys):
    monkeypatch.chdir(encoded)
    before = sorted(encoded.rglob("*"))
    run_command("train", [*of_what_ships(arguments), "--dry-run"])
    assert "parameters" in capsys.readouterr().out
    assert sorted(encoded.rglob("*")) == before


def test_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        with Image.open(ROOT / path) as image:
            assert min(image.size) > 100
