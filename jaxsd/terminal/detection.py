"""Which pictures a terminal understands: what the environment says, or the terminal itself.

A terminal is asked in one case alone: the environment does not tell, a person is there, and the
answer, which a terminal gives at once, is waited for no longer than `PATIENCE`.
"""

import contextlib
import os
import re
import select
import time
from collections.abc import Mapping
from typing import Any

PATIENCE = 0.5  # seconds; over a slow network an answer takes a third of it
# By TERM_PROGRAM, which a terminal sets for its own children; None: what is known to show nothing
PROGRAMS = {
    "ghostty": "kitty",
    "kitty": "kitty",
    "iTerm.app": "iterm2",
    "WezTerm": "iterm2",
    "mintty": "iterm2",
    "Apple_Terminal": None,
}
TERMS = {"xterm-kitty": "kitty", "xterm-ghostty": "kitty", "dumb": None, "linux": None, "": None}
# Of terminals which, where they were started from another one, have inherited its variables.
OTHERS = ("XTERM_VERSION", "VTE_VERSION", "KONSOLE_VERSION", "WT_SESSION")
NOBODY = ("CI", "JPY_PARENT_PID", "INSIDE_EMACS")  # no person, or none who sees a terminal
QUESTION = b"\x1b[c"  # primary device attributes (DA1)
ANSWER = re.compile(rb"\x1b\[\?([0-9;]*)c")
SIXEL = b"4"  # among the attributes


def detect(stream: Any, environment: Mapping[str, str] = os.environ) -> str | None:
    """kitty, iterm2 or sixel: what the terminal behind a text stream shows; None if nothing.

    None, too, where there is no terminal, or it cannot be asked without disturbing someone.
    """
    if not is_terminal(stream) or any(environment.get(name) for name in NOBODY):
        return None
    told, known = _told(environment)
    if known:
        return told
    return "sixel" if SIXEL in _attributes() else None


def is_terminal(stream: Any) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # of a caller's own, of none, or one that is closed
        return False


def _told(environment: Mapping[str, str]) -> tuple[str | None, bool]:
    """(what the environment says, whether it says anything)."""
    term = environment.get("TERM", "")
    if environment.get("TMUX") or term.startswith(("screen", "tmux")):
        # What stands behind it is not what the program speaks to; a tmux that draws sixels says so
        return None, False
    if term in TERMS:
        return TERMS[term], True
    program = environment.get("TERM_PROGRAM", "")
    if program in PROGRAMS:
        return PROGRAMS[program], True
    if program or any(environment.get(name) for name in OTHERS):
        return None, False
    if environment.get("KITTY_WINDOW_ID"):
        return "kitty", True
    if environment.get("LC_TERMINAL") == "iTerm2":  # which ssh hands on
        return "iterm2", True
    return None, False


def _attributes(patience: float = PATIENCE) -> list[bytes]:
    """What the controlling terminal says it can do; nothing if it stays silent."""
    try:
        import termios
    except ImportError:  # Windows
        return []
    try:
        # Of its own, and not to be waited for where somebody has stopped the output (Ctrl-S)
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return []
    try:
        # A job in the background that touches the terminal is stopped by the system
        if os.tcgetpgrp(terminal) != os.getpgrp():
            return []
        before = termios.tcgetattr(terminal)
        quiet = termios.tcgetattr(terminal)
        quiet[3] &= ~(termios.ICANON | termios.ECHO)
        quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 0, 0
        try:
            termios.tcsetattr(terminal, termios.TCSANOW, quiet)
            return _ask(terminal, patience)
        finally:
            termios.tcsetattr(terminal, termios.TCSANOW, before)
    except (OSError, termios.error):
        return []
    finally:
        with contextlib.suppress(OSError):
            os.close(terminal)


def _ask(terminal: int, patience: float) -> list[bytes]:
    if select.select([terminal], [], [], 0)[0]:
        return []  # somebody has typed ahead, for the next command perhaps
    os.write(terminal, QUESTION)
    said, end = b"", time.monotonic() + patience
    while (left := end - time.monotonic()) > 0:
        if not select.select([terminal], [], [], left)[0]:
            break
        # One at a time, so that nothing is taken that follows
        if not (byte := os.read(terminal, 1)):
            break
        said += byte
        if found := ANSWER.search(said):
            return found[1].split(b";")
    return []
