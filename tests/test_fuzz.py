"""A short run of tests/fuzz.py; the long one is `python tests/fuzz.py --count 20000`."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from hostile import KINDS, both

from jaxsd.errors import JaxsdError


def test_damaged_and_hostile_files():
    # In a process of its own: Orbax leaves the event loops of damaged folders to be collected, and
    # what it says then would be held against whichever test runs at the time.
    command = [sys.executable, fuzz.__file__, "--count", "1000", "--seed", "1"]
    paths = {"PYTHONPATH": f"{Path(fuzz.__file__).parent.parent}"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | paths)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1,000 inputs, 0 failures" in done.stdout
    assert all(kind in done.stdout for kind in KINDS)


def raises(error):
    def trial(rng):
        raise error

    return trial


@pytest.mark.parametrize(
    "trial, told",
    [
        (raises(ValueError("no")), "ValueError: no"),
        (lambda rng: both(lambda: raises(JaxsdError("two\nlines"))(rng)), "several lines"),
        (lambda rng: bytearray(fuzz.MOST_MEMORY), "bytes taken"),
        (lambda rng: open("/etc/hostname").close(), "open /etc/hostname"),
        (lambda rng: subprocess.run(["true"], check=True), "subprocess.Popen"),
    ],
)
def test_what_it_would_tell(trial, told):
    _, failures = fuzz.run(1, kinds={"a": (lambda folder: trial, 1)})
    assert len(failures) == 1 and told in failures[0]
