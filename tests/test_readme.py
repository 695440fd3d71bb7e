"""The README is true: its commands and its Python run as they stand there."""

import re

import documents
import pytest
from PIL import Image

README = documents.README.read_text(encoding="utf-8")


def test_the_two_lines_of_the_set_up():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2 and lines[0].split("&&")[-1].strip().startswith(
        ".venv/bin/python sample"
    )
    assert lines[1].endswith("-m pytest -q -n auto --dist loadfile")


def test_it_is_short():
    """What is longer has a page in docs/."""
    assert len(README.split()) < 1200


@pytest.mark.usefixtures("at_the_desk")
def test_commands_and_python(capsys):
    scope = documents.run_page(documents.README, few_steps=False)
    assert len(capsys.readouterr().out.splitlines()) == 30  # the callback saw every step
    assert scope["images"][0].size == (32, 32)
    assert set(scope["params"]) == set(scope["pipe"].unet.shapes)


def test_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        with Image.open(documents.ROOT / path) as image:
            assert min(image.size) > 100
