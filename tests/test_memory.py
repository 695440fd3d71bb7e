"""What compiling leaves in the C heap goes back to the system."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from jaxsd import memory

PIECE, PIECES = 1000, 200_000  # too small for glibc to map each by itself


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return 4096 * pages


def test_pieces_that_glibc_keeps_go_back():
    try:
        heap = ctypes.CDLL("libc.so.6")
    except OSError:
        pytest.skip("the C library is not glibc")
    heap.malloc.restype, heap.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    heap.free.argtypes = [ctypes.c_void_p]
    pieces = [heap.malloc(PIECE) for _ in range(PIECES)]
    for piece in pieces:
        ctypes.memset(piece, 1, PIECE)
    last = pieces.pop()  # which keeps those before it from the end of the heap
    for piece in pieces:
        heap.free(piece)
    held = resident()
    memory.give_back()
    given = held - resident()
    heap.free(last)
    assert given > 0.9 * PIECE * PIECES


ALONE = """
import jax
from jaxsd import memory

times = []
memory.LONG, memory.give_back = 0, lambda: times.append(1)
memory.give_back_after_compiling()
memory.give_back_after_compiling()
x = jax.block_until_ready(jax.numpy.ones(7))
times.clear()
program = jax.jit(lambda x: 3 * x + 1)
program(x)
assert times == [1], times
program(x)
assert times == [1], times
memory.LONG = 1000
program(jax.numpy.ones(3))
assert times == [1], times
"""


def test_after_each_program_that_took_long():
    """In a process of its own: listeners stay, and commands of other tests leave theirs."""
    subprocess.run([sys.executable, "-c", ALONE], check=True)
