"""Memory of the host that nothing in this process uses, given back to the system."""

import ctypes
import functools

LONG = 0.2  # seconds of compiling or reading a program, from which on it leaves much behind


def give_back() -> None:
    """Gives free pages of the C heap back; nothing happens where glibc is not the C library."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass


@functools.cache  # a listener stays for good
def give_back_after_compiling() -> None:
    """From now on gives memory back after each program that took long to compile, or to read.

    The compiler's memory is free then, up to gigabytes for a training, but in small pieces that
    glibc keeps, beside weights and state. All commands do this; a listener of JAX's is the whole
    process's, so `import jaxsd` alone does not.
    """
    import jax

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs > LONG:
            give_back()

    jax.monitoring.register_event_duration_secs_listener(listen)
