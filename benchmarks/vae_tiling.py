"""Peak memory of decoding a large picture in tiles: `python benchmarks/vae_tiling.py`.

Stable Diffusion's VAE at full size with random weights, float32, each row in a process of its own.
The peak is that of the resident memory, less what the process takes before it decodes (weights,
libraries), and beside it the whole.
"""

import argparse
import json
import resource
import subprocess
import sys
import time


def measure(size: int, tile: int) -> dict:
    import jax
    import numpy as np

    from jaxsd.models import AutoencoderKL, VAEConfig
    from jaxsd.nn import Net
    from jaxsd.tiling import tiled

    net = Net(AutoencoderKL(VAEConfig()))
    params = net.init(jax.random.key(0))
    jax.block_until_ready(params)
    decode = jax.jit(lambda params, x: net(params, x, method="decode"))
    latents = np.random.default_rng(0).standard_normal((1, size // 8, size // 8, 4), np.float32)
    before = resident()
    start = time.perf_counter()
    if tile:
        picture = tiled(lambda part: np.asarray(decode(params, part)), latents, tile, 8)
    else:
        picture = np.asarray(decode(params, latents))
    seconds = time.perf_counter() - start
    assert picture.shape == (1, size, size, 3) and np.isfinite(picture).all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"size": size, "tile": tile, "before": before, "peak": peak, "seconds": seconds}


def resident() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, type=int, help="SIZE TILE: measure one, print JSON")
    parser.add_argument("--sizes", nargs="*", type=int, default=[512, 1024, 2048])
    parser.add_argument("--tiles", nargs="*", type=int, default=[64, 32, 0])
    parser.add_argument("--whole-up-to", type=int, default=1024, help="the largest size at once")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    print("| px | tile (latents) | decoding GB | process GB | s, compiling included |")
    print("|---|---|---|---|---|")
    for size in options.sizes:
        for tile in options.tiles:
            if tile == 0 and size > options.whole_up_to:
                continue
            command = [sys.executable, __file__, "--one", str(size), str(tile)]
            row = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            more, whole = (x / 2**30 for x in (row["peak"] - row["before"], row["peak"]))
            name = tile or "whole"
            print(f"| {size} | {name} | {more:.2f} | {whole:.2f} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    main()
