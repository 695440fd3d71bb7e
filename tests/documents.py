"""What README and docs tell their readers to type, and how tests try it.

Every block of a page is run in its order, in a folder where `desk` has laid what readers bring. A
block that no test can run has a comment on the line before it, `<!-- needs: a TPU -->`, which
neither GitHub nor the site shows; a block that is neither fails.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from jaxsd.cli import COMMANDS, run_command
from jaxsd.hub import PRETRAINED

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"(?:^<!-- needs: ([^\n]+) -->\n)?^(```+)([^\n`]*)\n(.*?)^\2$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`((?:PYTHONPATH=\S+ )?(?:python|jaxsd) [^`\n]+)`(?!`)")
ENTRIES = ("sample.py", "train.py")  # whose options are read elsewhere
NOT_CODE = ("text", "json", "{toctree}", "{eval-rst}", "{include}")  # of fences: what nobody types
SCRIPT = "script"  # of experiments/, benchmarks/ or tests/
# Hours of work, gigabytes, or no end: blocks with these must say so
NEVER_RUN = (SCRIPT, "compare", "evaluate", "serve")
# What a reader's model is asked for, and the tiny one that takes its place can do
SMALLER = {"--resolution": "64", "--height": "8", "--width": "8", "--count": "8"}
SHOWN = {"pictures/", "captioned/", "cat/"}  # of 64 pixels, on the desk
STEPS = re.compile(r"(\bsteps=|python sample\.py .* --steps )\d+")
DEVICES = 8  # that tests pretend, and must divide batches
PARSE = """
import argparse, runpy, sys, tyro
def stopping(parse):
    def stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise SystemExit("parsed")
    return stop
tyro.cli = stopping(tyro.cli)
tyro.extras.overridable_config_cli = stopping(tyro.extras.overridable_config_cli)
argparse.ArgumentParser.parse_args = stopping(argparse.ArgumentParser.parse_args)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Fence(NamedTuple):
    """A block of a page: where it begins, its language, what is in it, and what it needs."""

    line: int
    language: str
    text: str
    needs: str | None


def fences(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    assert "\n```" not in FENCE.sub("", text), f"{page}: an odd fence"
    found = FENCE.finditer(text)
    return [
        Fence(text[: f.start(2)].count("\n") + 1, f"{f[3]} ".split(" ")[0], f[4], f[1])
        for f in found
    ]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block, without comments; a \\ at an end goes on."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def marked_commands(page: Path) -> Iterator[list[str]]:
    """Those of ours in blocks that tests cannot run, also those that gcloud is to run elsewhere."""
    for fence in fences(page):
        if fence.needs is None or fence.language not in ("", "bash"):
            continue
        for words in commands(fence.text):
            for word in words:
                if word.startswith("--command="):
                    words = shlex.split(word.partition("=")[2])
            for part in "\0".join(words).split("\0&&\0"):
                found = [w.removeprefix(".venv/bin/") for w in part.split("\0") if w != "nohup"]
                found = found[: found.index(">")] if ">" in found else found
                if found and kind(found):
                    yield found


def inline_commands(page: Path) -> list[str]:
    """What stands in the sentences of a page; a line break is a space there."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [found[1] for found in INLINE.finditer(text)]


def run_page(page: Path, few_steps: bool = True) -> dict[str, Any]:
    """Runs all blocks of a page in the current folder; what its Python defined.

    few_steps: no more of them are taken than show that a block runs.
    """
    scope: dict[str, Any] = {}
    for fence in fences(page):
        where = f"{page.relative_to(ROOT)}:{fence.line}"
        if fence.needs is not None or fence.language in NOT_CODE:
            continue
        try:
            text = STEPS.sub(r"\g<1>2", fence.text) if few_steps else fence.text
            if fence.language == "python":
                exec(compile(text, where, "exec"), scope)
            else:
                assert fence.language in ("", "bash"), f"unknown language {fence.language}"
                for words in commands(text):
                    perform(words)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{where} does not run, and is not marked: {error!r}") from error
    return scope


def without_environment(words: list[str]) -> list[str]:
    """A command without the variables before it, of which tests have their own."""
    return words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :]


def kind(words: list[str]) -> tuple[str, list[str]] | None:
    """What a command is to the tests, and its arguments: one of jaxsd's, a script, or unknown."""
    match without_environment(words):
        case ["python", "sample.py" | "train.py" as script, *rest]:
            return script.removesuffix(".py"), rest
        case ["python", "-m", "jaxsd", name, *rest] | ["jaxsd", name, *rest] if name in COMMANDS:
            return name, rest
        case ["python", "-m", "pytest" | "sphinx", *rest]:
            return SCRIPT, rest
        case ["python", script, *rest] if (ROOT / script).is_file():
            return SCRIPT, rest
    return None


def perform(words: list[str]) -> None:
    """Runs a command, but a training only as far as `--dry-run` goes."""
    known = kind(words)
    if known is None:
        raise AssertionError(f"nothing here runs {shlex.join(words)}")
    name, rest = known
    if name in NEVER_RUN:
        raise AssertionError(f"{shlex.join(words)} takes more than a test has")
    for option, value in SMALLER.items():
        if option in rest:
            rest[rest.index(option) + 1] = value
    if name == "train":
        return train(rest)
    said = printed(name, rest)
    if name == "sample" and "--prompts-file" not in rest:
        assert said.split()
        for path in said.split():
            with Image.open(path) as image:
                image.verify()


def train(words: list[str]) -> None:
    words = [of_what_ships(word) for word in words]
    words += ["--resolution", "64"] * ("--resolution" not in words and not SHOWN.isdisjoint(words))
    if "--batch-size" not in words or int(words[words.index("--batch-size") + 1]) % DEVICES:
        words += ["--batch-size", str(DEVICES)]
    if words[0] == "encode":
        printed("train", words)
        return
    before = sorted(Path().rglob("*"))
    assert "parameters" in printed("train", [*words, "--dry-run"])
    assert sorted(Path().rglob("*")) == before


def of_what_ships(word: str) -> str:
    """In place of the models that earlier trainings would have left: those that ship."""
    told = word.startswith("runs/digits-")  # the guidance scale, as all of these students are
    shipped = PRETRAINED / ("digits-4step" if told else "digits")
    return str(shipped) if re.fullmatch("runs/.*/model", word) else word


def printed(name: str, words: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_command(name, words)
    return out.getvalue()


def parse(words: list[str]) -> None:
    """Has a command read its options, in a process of its own, and stops it there."""
    match words:
        case ["python", "-m", "pytest" | "sphinx", *_]:
            return  # not ours to read
        case ["python", "-m", "jaxsd", *rest] | ["jaxsd", *rest]:
            script = ROOT / "jaxsd" / "__main__.py"
        case ["python", path, *rest]:
            script = ROOT / path
            code = script.read_text(encoding="utf-8")
            if "tyro" not in code and "argparse" not in code and path not in ENTRIES:
                assert not any(word.startswith("-") for word in rest), f"{path} has no options"
                return
        case _:
            raise AssertionError(f"nothing here reads {shlex.join(words)}")
    command = [sys.executable, "-c", PARSE, str(script), *rest]
    paths = ":".join(map(str, (ROOT, ROOT / "tests", script.parent)))
    env = environment(PYTHONPATH=paths)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stderr.strip().endswith("parsed"), f"{shlex.join(words)}: {done.stderr}"


def environment(**changes: str) -> dict[str, str]:
    """The environment of a process of its own."""
    return {**os.environ, **changes}
