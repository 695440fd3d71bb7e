"""Memory and time of opening a full-size Stable Diffusion 1.5, beside diffusers in the same run.

python benchmarks/loading.py                    # float16 and float32; about 7 GB of disk

A folder of random weights is made in a temporary place, then each library opens it in fresh
processes, in turns, from a warm disk. Peak memory is the process's own (ru_maxrss), the libraries
included, over the size of the weights on disk. Seconds are those of the call alone, with what it
needs imported before ("call"), then with every page of the weights read once, because files are
mapped and read, or copied, while the program goes on ("read"); and of the whole process, imports
included ("start").
"""

import argparse
import itertools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LIBRARIES = ("jaxsd", "diffusers")
# safetensors is what diffusers writes with; it aligns tensors to 8 bytes, ours to 64.
WRITERS = ("jaxsd", "safetensors")


def make_model(folder: Path, dtype: str, writer: str) -> int:
    """Writes Stable Diffusion 1.5 with random weights; returns their bytes."""
    from safetensors.numpy import save_file

    from jaxsd import weights
    from jaxsd.components import make_index, make_net
    from jaxsd.families import get_family
    from jaxsd.hub import FOLDERS, PRETRAINED
    from jaxsd.weights.tensors import write

    family, total, nets = get_family("sd1"), 0, {}
    rng = np.random.default_rng(0)
    for name in FOLDERS:
        if (config := getattr(family, name)) is None:
            continue
        nets[name] = net = make_net(config)
        weights.write_json(folder / name / "config.json", config.to_json())
        text = name.startswith("text_encoder")
        file = folder / name / (weights.TRANSFORMERS_FILE if text else weights.DIFFUSERS_FILE)
        kinds = {key: (np.dtype(dtype), shape) for key, shape in net.shapes.items()}
        if writer == "jaxsd":
            write(file, kinds, lambda key, net=net: _random(rng, net.shapes[key], dtype))
        else:
            arrays = {key: _random(rng, shape, dtype) for key, shape in net.shapes.items()}
            save_file(arrays, file, metadata={"format": "pt"})
            del arrays
        total += file.stat().st_size
    schedule = family.schedule.to_json()
    weights.write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    shutil.copytree(PRETRAINED / "digits" / "tokenizer", folder / "tokenizer")
    weights.write_json(
        folder / "model_index.json", make_index({n: nets[n].config for n in nets}, family.schedule)
    )
    return total


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return (0.02 * rng.standard_normal(shape, np.float32)).astype(dtype)


def open_once(library: str, folder: str) -> None:
    """In a process of its own: prints seconds of the call, seconds with reading, and peak bytes."""
    if library == "jaxsd":
        import jax
        import tokenizers  # noqa: F401

        from jaxsd.components import load_parts

        jax.block_until_ready(jax.numpy.zeros(1))  # the backend starts once for a process
        start = time.perf_counter()
        parts = load_parts(folder)
        arrays = [a for c in parts.components.values() for a in c.params.values()]
        called = time.perf_counter() - start
        views = [np.asarray(array) for array in arrays]
    else:
        import torch
        from diffusers import StableDiffusionPipeline
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

        dtype = torch.float16 if "float16" in folder else torch.float32
        start = time.perf_counter()
        pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype)
        called = time.perf_counter() - start
        parts = (pipe.unet, pipe.vae, pipe.text_encoder)
        views = [p.detach().numpy() for part in parts for p in part.parameters()]
    pages = sum(
        int(v.view(np.uint8).reshape(-1)[::4096].sum(dtype=np.uint64)) for v in views if v.size
    )
    read = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"call": called, "read": read, "peak": peak, "sum": pages}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of opening Stable Diffusion 1.5.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"])
    parser.add_argument("--writers", nargs="+", default=WRITERS, choices=WRITERS)
    parser.add_argument("--folder", help="where to make the models, which are removed at the end")
    parser.add_argument("--open-once", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open_once:
        open_once(*options.open_once)
        return
    for dtype, writer in itertools.product(options.dtypes, options.writers):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            size = make_model(Path(folder) / dtype, dtype, writer)
            title = f"{dtype}, {size / 1e9:.2f} GB of weights written by {writer}"
            measure(str(Path(folder) / dtype), title, size, options.repeats)


def measure(folder: str, title: str, size: int, repeats: int) -> None:
    """Opens the folder in turns and prints medians, [least, most] and ratios."""
    runs: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    for turn in range(repeats + 1):
        for library in LIBRARIES:
            command = [sys.executable, __file__, "--open-once", library, folder]
            start = time.perf_counter()
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            whole = time.perf_counter() - start
            if turn:  # the first turn warms the disk
                runs[library].append(json.loads(out.splitlines()[-1]) | {"start": whole})
    print(f"{title}; {repeats} runs of each in turns")
    rows = (("call", 1, "s"), ("read", 1, "s"), ("start", 1, "s"), ("peak", size, "x weights"))
    for what, scale, unit in rows:
        values = {library: [run[what] / scale for run in runs[library]] for library in LIBRARIES}
        medians = {library: statistics.median(values[library]) for library in LIBRARIES}
        for library in LIBRARIES:
            low, high = min(values[library]), max(values[library])
            print(f"  {what:5} {library:10} {medians[library]:6.2f} [{low:.2f}, {high:.2f}] {unit}")
        print(f"  {what:5} jaxsd / diffusers = {medians['jaxsd'] / medians['diffusers']:.2f}")


if __name__ == "__main__":
    main()
