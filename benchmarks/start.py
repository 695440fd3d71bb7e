"""From a command to its pictures, in fresh processes: one picture, and a thousand.

python benchmarks/start.py                             # warm: programs are compiled before
python benchmarks/start.py --against path/to/another   # a checkout, in turns with this one

Seconds are those of the whole command, imports included; "CPU" is what its threads took together,
which other work on the machine changes less. Median and range.
"""

import argparse
import collections
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent.parent
PROMPT = "a red seven on a white background"
SHOWN = 8  # packages


def seconds(
    checkout: Path, arguments: list[str], python: tuple[str, ...] = ()
) -> tuple[float, float, str]:
    """(wall, CPU) of one `sample.py`, and what it said on stderr."""
    command = [sys.executable, *python, "sample.py", *arguments]
    env = os.environ | {"PYTHONPATH": str(checkout)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stderr)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


def imports(stderr: str) -> collections.Counter[str]:
    """Microseconds that each package's own modules took to import, of `python -X importtime`."""
    packages = collections.Counter()
    for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", stderr):
        packages[name.split(".")[0]] += int(own)
    return packages


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--count", type=int, default=1000, help="pictures of digits-4step")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    checkouts = {"this": HERE} | ({"other": options.against.resolve()} if options.against else {})
    many = [PROMPT, "--model", "digits-4step", "-n", str(options.count)]
    rows = {"one picture of digits": [PROMPT], f"{options.count} of digits-4step": many}
    found: dict[str, dict[str, list]] = {}
    for row, arguments in rows.items():
        for turn in range(options.runs + 1):
            for name, checkout in checkouts.items():
                with tempfile.TemporaryDirectory(prefix="jaxsd-start-") as out:
                    wall, cpu, _ = seconds(checkout, [*arguments, "--out", out])
                if turn:  # before, programs may have been compiled
                    times = found.setdefault(f"{row}, {name}", {"wall": [], "cpu": []})
                    times["wall"].append(wall)
                    times["cpu"].append(cpu)
    with tempfile.TemporaryDirectory(prefix="jaxsd-start-") as out:
        *_, said = seconds(HERE, [PROMPT, "--out", out], ("-X", "importtime"))
    packages = imports(said)
    if options.json:
        print(json.dumps({"seconds": found, "imports_us": packages}))
        return
    print("| | seconds | CPU |\n| --- | --- | --- |")
    for row, times in found.items():
        print(f"| {row} | {spread(times['wall'])} | {spread(times['cpu'])} |")
    most = sorted(packages.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {took / 1e6:.2f}" for name, took in most[:SHOWN])
    print(f"\nimports: {sum(packages.values()) / 1e6:.2f} s, of which {told}")


if __name__ == "__main__":
    main()
