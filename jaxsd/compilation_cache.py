"""Compiled programs on disk, so that a second start compiles nothing: JAX's persistent cache."""

import os
from pathlib import Path

LIMIT = 4 << 30  # bytes; Stable Diffusion's programs take tens of millions a size


def default_folder() -> Path:
    """The user's cache folder of compiled programs."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home, "jaxsd", "programs")


def use_compilation_cache(folder: str | Path | None = None) -> None:
    """Keeps the compiled programs of this process in a folder, and finds there those of others.

    To be called before anything is compiled. By default the user's cache folder, as all commands
    use it (`$XDG_CACHE_HOME/jaxsd/programs` or `~/.cache/...`), which is kept below 4 GiB: what was
    not used for longest goes first. Where JAX_COMPILATION_CACHE_DIR is set nothing is changed: that
    is JAX's own. A program stands under the hash of its code, its options, jaxlib and the device.
    """
    if folder is None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    import jax

    if folder is None:
        folder = default_folder()
        prune(folder, LIMIT)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def prune(folder: Path, limit: int) -> None:
    """Removes the files that were read longest ago, until the rest take at most `limit` bytes.

    Not with JAX's own limit: that locks the folder for each program that is read, and once a
    process is killed as it writes, no other writes any more.
    """
    try:
        with os.scandir(folder) as entries:
            found = [(entry.path, entry.stat()) for entry in entries if entry.is_file()]
        held = sum(stat.st_size for _, stat in found)
        for path, stat in sorted(found, key=lambda each: max(each[1].st_atime, each[1].st_mtime)):
            if held <= limit:
                break
            os.unlink(path)
            held -= stat.st_size
    except OSError:  # of another user, not there yet, or just pruned by another process
        return
