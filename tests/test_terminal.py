"""Pictures in terminals: what is written decodes to the pixels, and no terminal is disturbed."""

import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from screens import Kitty, of_iterm2, of_sixel

from jaxsd.pictures import enlarged
from jaxsd.terminal import detection, screen
from jaxsd.terminal.detection import detect
from jaxsd.terminal.protocols import iterm2, kitty
from jaxsd.terminal.screen import Screen, open_screen
from jaxsd.terminal.sixel import sixel

ROOT = Path(__file__).parent.parent
# Of 255. A sixel colour is a whole percent, half of one off at most, rounded once more
PERCENT = 2
# The mean of what 256 colours in place of all leave of a picture as models here draw them
FEW_COLOURS = 4.0


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height, width):
    """All hues, as on a photograph."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 40), np.cos(y / 30), np.sin((x + y) / 50)]
    return np.stack([np.round(127.5 * (1 + wave)) for wave in waves], -1).astype(np.uint8)


# --- What is written -------------------------------------------------------------------------


@pytest.mark.parametrize("picture", [noise(8, 8), noise(90, 70), noise(9, 5, 1), smooth(64, 96)])
def test_kitty_and_iterm2_give_the_pixels_back(picture):
    wanted = np.broadcast_to(picture, (*picture.shape[:2], 3))
    terminal = Kitty()
    terminal.write(kitty(picture, 7))
    assert terminal.shown.keys() == {7} and np.array_equal(terminal.seen[0], wanted)
    [found] = of_iterm2(iterm2(picture, 5))
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("size", [(1, 1), (6, 3), (7, 5), (16, 16), (13, 19)])
def test_sixels_give_few_colours_back(size):
    picture = noise(*size)
    [found] = of_sixel(sixel(picture))
    assert np.abs(found - picture).max() <= PERCENT


def test_sixels_of_many_colours_are_near():
    with Image.open(ROOT / "docs" / "images" / "digits.png") as image:
        picture = np.asarray(image.convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10_000
    [found] = of_sixel(sixel(picture))
    assert np.abs(found - picture).mean() <= FEW_COLOURS


def test_repeated_sixels_are_counted():
    written = sixel(np.full((12, 300, 3), 51, np.uint8))
    assert written.count("!300~") == 2 and len(written) < 80


class Terminal(io.StringIO):
    """A stream that says it is a terminal; of no size that could be asked."""

    def isatty(self):
        return True


def test_kitty_shows_the_next_picture_in_the_same_place():
    """In a terminal whose last line is reached, so that it scrolls."""
    stream, terminal = Terminal(), Kitty()
    stream.write("\n" * 17)
    shown = Screen(stream, "kitty")
    first, second, third = (noise(16, 16, seed=seed) for seed in range(3))
    for picture in (first, second, second):
        shown.show(picture)
    shown.next()
    shown.show(third)
    terminal.write(stream.getvalue())
    wanted = [enlarged(picture, 400, 400) for picture in (first, second, third)]
    assert len(terminal.seen) == 3  # what is there is not shown again
    assert all(map(np.array_equal, terminal.seen, wanted))
    (above, one), (below, other) = terminal.shown.values()
    assert np.array_equal(one, wanted[1]) and np.array_equal(other, wanted[2])
    assert below == above + 20  # 400 pixels
    assert terminal.scrolled + terminal.line == below + 20


@pytest.mark.parametrize(("protocol", "decode"), [("iterm2", of_iterm2), ("sixel", of_sixel)])
def test_elsewhere_pictures_come_one_below_the_other(protocol, decode):
    stream = Terminal()
    shown = Screen(stream, protocol)
    pictures = [noise(8, 8, seed=seed) for seed in range(2)]
    for picture in (pictures[0], *pictures, pictures[1]):
        shown.show(picture)
    found = decode(stream.getvalue())
    assert len(found) == 2 and stream.getvalue().count("\n") == 2
    for got, picture in zip(found, pictures, strict=True):
        error = np.abs(got.astype(int) - enlarged(picture, 400, 400))
        assert error.max() <= (0 if protocol == "iterm2" else PERCENT)


def test_what_is_larger_than_the_terminal_is_scaled():
    stream, terminal = Terminal(), Kitty()
    Screen(stream, "kitty").show(smooth(1000, 2400))
    terminal.write(stream.getvalue())
    assert terminal.seen[0].shape == (333, 800, 3)  # 80 characters of 10 pixels
    means = [
        picture.astype(float).mean((0, 1)) for picture in (terminal.seen[0], smooth(1000, 2400))
    ]
    assert np.abs(means[0] - means[1]).max() < 2


# --- What is shown where ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ("TERM=xterm-kitty KITTY_WINDOW_ID=1", "kitty"),
        ("TERM=xterm-256color KITTY_WINDOW_ID=1", "kitty"),
        ("TERM=xterm-ghostty TERM_PROGRAM=ghostty", "kitty"),
        ("TERM=xterm-256color TERM_PROGRAM=iTerm.app LC_TERMINAL=iTerm2", "iterm2"),
        ("TERM=xterm-256color LC_TERMINAL=iTerm2", "iterm2"),  # behind ssh
        ("TERM=xterm-256color TERM_PROGRAM=WezTerm", "iterm2"),
        ("TERM=xterm-256color TERM_PROGRAM=Apple_Terminal", None),
        ("TERM=dumb", None),
        ("TERM=linux", None),
        ("", None),
        ("TERM=xterm-kitty CI=true", None),
        ("TERM=xterm-color JPY_PARENT_PID=1", None),
        ("TERM=xterm-256color", "asked"),
        ("TERM=xterm-256color WT_SESSION=1", "asked"),
        ("TERM=foot", "asked"),
        # Of what stands around them others have the variables too
        ("TERM=xterm-256color KITTY_WINDOW_ID=1 TERM_PROGRAM=vscode", "asked"),
        ("TERM=xterm-256color KITTY_WINDOW_ID=1 VTE_VERSION=7200", "asked"),
        ("TERM=tmux-256color KITTY_WINDOW_ID=1 TMUX=/tmp/tmux", "asked"),
        ("TERM=screen LC_TERMINAL=iTerm2", "asked"),
        ("TERM=xterm-256color NO_COLOR=1 TERM_PROGRAM=WezTerm", "iterm2"),
    ],
)
def test_the_environment_tells(environment, wanted, monkeypatch):
    asked = []
    monkeypatch.setattr(detection, "_attributes", lambda: asked.append(1) or [b"62", b"4"])
    told = dict(pair.split("=") for pair in environment.split())
    assert detect(Terminal(), told) == ("sixel" if wanted == "asked" else wanted)
    assert bool(asked) == (wanted == "asked")
    assert detect(io.StringIO(), told) is None


def test_without_a_terminal_there_is_no_screen(monkeypatch):
    with open(os.devnull) as closed:
        pass
    for stream in (io.StringIO(), closed, object()):
        assert open_screen("kitty", stream) is None
    assert open_screen("off", Terminal()) is None
    monkeypatch.setattr(screen, "detect", lambda stream: None)
    assert open_screen("auto", Terminal()) is None
    assert isinstance(open_screen("sixel", Terminal()), Screen)


# --- In a pseudo-terminal --------------------------------------------------------------------

# A session's first process takes the terminal that it is given for its own
OWN = "import fcntl, os, sys, termios, time; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
DETECT = """
from jaxsd.terminal.detection import detect
before, begun = termios.tcgetattr(0), time.monotonic()
found = detect(sys.stdout, {"TERM": "xterm-256color"})
assert termios.tcgetattr(0) == before
print(f"found {found} after {time.monotonic() - begun:.1f}.", flush=True)
"""


class Session:
    """A Python program in a terminal of its own, as the terminal sees it."""

    def __init__(self, code, pixels=(0, 0), **environment):
        self._master, slave = pty.openpty()
        ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, *pixels))
        self._process = subprocess.Popen(
            [sys.executable, "-c", OWN + code],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "CI": ""} | environment,
            start_new_session=True,
        )
        os.close(slave)
        self.said = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def until(self, text, patience=120.0):
        """Waits for the program to say this, or to end."""
        end = time.monotonic() + patience
        while text is None or text not in self.said:
            assert time.monotonic() < end, f"hangs after {self.said!r}"
            if not select.select([self._master], [], [], 0.1)[0]:
                continue
            try:
                said = os.read(self._master, 1 << 16)
            except OSError:  # nobody has the other side open
                said = b""
            if not said:
                assert text is None, f"ended after {self.said!r}"
                break
            self.said += said.decode(errors="replace")
        return self.said

    def type(self, text):
        os.write(self._master, text.encode())

    def status(self):
        return self._process.wait(60)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("\x1b[?62;4;22c", "sixel"),
        ("\x1b[?1;2;4c", "sixel"),
        ("\x1b[?62;14;44c", "None"),
        ("\x1b[?6c", "None"),
        ("\x1b[?62;4", "None"),  # and no more
        ("", "None"),
    ],
)
def test_a_terminal_is_asked_and_left_as_it_was(answer, found):
    with Session(DETECT + "print('read', input())") as session:
        session.until("\x1b[c")
        session.type(answer)
        session.until(".\r\n")
        seconds = re.search(r"found (\w+) after ([\d.]+)\.", session.said)
        assert seconds[1] == found and float(seconds[2]) < 2 * detection.PATIENCE
        session.type("next\n")  # what is typed afterwards is the program's
        assert "read next" in session.until("read next")
        assert answer not in session.said.replace("\x1b[c", "") or not answer


def test_what_was_typed_ahead_is_not_eaten():
    code = "print('ready', flush=True); time.sleep(1)" + DETECT + "print('read', input())"
    with Session(code) as session:
        session.until("ready")
        session.type("ls\n")
        said = session.until("read ls")
        assert "found None" in said and "\x1b[c" not in said


def test_a_terminal_that_was_stopped_is_not_waited_for():
    """As by Ctrl-S."""
    after = DETECT.replace("assert", "termios.tcflow(0, termios.TCOON); assert")
    with Session("termios.tcflow(0, termios.TCOOFF)" + after) as session:
        said = session.until(".\r\n", 10.0)
        assert "found None" in said and "\x1b[c" not in said


def test_a_job_in_the_background_is_not_stopped():
    code = f"""
import subprocess
command = [sys.executable, "-c", "import sys, termios, time" + {DETECT!r}]
child = subprocess.Popen(command, process_group=0)
for _ in range(200):
    pid, status = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED)
    if pid:
        print("stopped" if os.WIFSTOPPED(status) else f"status {{status}}", flush=True)
        break
    time.sleep(0.1)
"""
    with Session(code) as session:
        said = session.until("status")
        assert "found None" in said and "status 0" in said + session.until(None)
        assert "\x1b[c" not in said


SAMPLE = """
from jaxsd.cli import run_command
run_command("sample", sys.argv[1:] or {arguments!r})
"""


def sampled(out, *options, **environment):
    """What a terminal of 80 x 24 characters of 10 x 20 pixels is told by sample.py."""
    arguments = ["7", "3", "--model", "digits-ddpm", "--steps", "4", "--out", str(out), *options]
    code = SAMPLE.format(arguments=arguments)
    with Session(code, (800, 480), **environment) as session:
        said = session.until(None)
        assert session.status() == 0, said
    return said


def test_sample_shows_pictures_on_their_way_in_kitty(tmp_path):
    said = sampled(tmp_path, "--preview-every", "2", TERM="xterm-kitty")
    terminal = Kitty()
    terminal.write(said.replace("\r\n", "\n"))
    with Image.open(tmp_path / "00000-grid.png") as grid:
        wanted = enlarged(np.asarray(grid), 400, 800)
    assert len(terminal.seen) == 2 and len(terminal.shown) == 1
    assert np.array_equal(terminal.seen[-1], wanted)
    assert not np.array_equal(terminal.seen[0], wanted)
    paths = [line for line in said.splitlines() if line.endswith(".png")]
    names = ["00000-7-seed0.png", "00001-3-seed0.png", "00000-grid.png"]
    assert [line.rpartition("\r")[2] for line in paths] == [str(tmp_path / name) for name in names]


def test_sample_shows_the_pictures_at_the_end(tmp_path):
    [found] = of_iterm2(sampled(tmp_path, TERM="xterm", LC_TERMINAL="iTerm2"))
    with Image.open(tmp_path / "00000-grid.png") as grid:
        assert np.array_equal(found, enlarged(np.asarray(grid), 400, 800))


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (("--show", "off"), {"TERM": "xterm-kitty"}),
        (("--json",), {"TERM": "xterm-kitty"}),
    ],
)
def test_elsewhere_sample_says_paths_alone(options, environment, tmp_path):
    said = sampled(tmp_path, "--preview-every", "2", *options, **environment)
    assert "\x1b" not in said and said.count("\n") == (1 if "--json" in options else 3)


def test_a_file_of_prompts_shows_nothing(tmp_path):
    (tmp_path / "prompts.txt").write_text("7\n")
    out, file = str(tmp_path / "out"), str(tmp_path / "prompts.txt")
    arguments = ["--prompts-file", file, "--model", "digits-ddpm", "--steps", "1", "--out", out]
    with Session(SAMPLE.format(arguments=arguments), TERM="xterm-kitty") as session:
        said = session.until(None)
    assert "1 images" in said and "\x1b_G" not in said
    with Session(SAMPLE.format(arguments=[*arguments, "--show", "kitty"])) as session:
        assert "error: show kitty is for prompts of the command line" in session.until(None)
