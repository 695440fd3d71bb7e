"""What the options that trade exactness for speed save, and what they cost, on one machine.

    python benchmarks/options.py digits          # time for each picture, and how good pictures are
    python benchmarks/options.py sd1 --size 256  # time of a step, memory, at full size

`digits` is measured as `jaxsd evaluate` measures it, with the same prompts and seeds in each row;
RMSE is to the pictures without options, in pixels from -1 to 1. A family of jaxsd/families.py gets
random weights: its times and sizes are real, its pictures are not, so that its error is that of one
prediction. Rounds are interleaved; a time is a share of the first row's in the same round, median
and tenths.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxsd import Shortcuts, eight_bits, families, load
from jaxsd.components import make_net
from jaxsd.evaluation import report
from jaxsd.evaluation.models import full_prompts
from jaxsd.models import deep_shape
from jaxsd.nn import Params


@dataclasses.dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[str] = "digits"
    """digits, or a family: sd1, sd2, ..."""
    count: int = 500
    """Of `digits`: pictures in each row."""
    steps: int = 50
    guidance_scale: float = 3.0
    batch_size: int = 50
    size: int = 256
    """Of a family: height and width, in pixels."""
    rounds: int = 5
    dtype: str = "float32"


SHORTCUTS = {
    "plain": Shortcuts(),
    "interval .2 – 2": Shortcuts((0.2, 2.0)),
    "interval .5 – 10": Shortcuts((0.5, 10.0)),
    "cache every 2": Shortcuts(cache_every=2),
    "cache every 3": Shortcuts(cache_every=3),
    "cache every 5": Shortcuts(cache_every=5),
    "cache every 3, branch 1": Shortcuts(cache_every=3, cache_branch=1),
    "both: .2 – 2, every 3": Shortcuts((0.2, 2.0), 3),
}
COLUMNS = {
    "time": ("time / plain", 2),
    "rmse": ("RMSE", 3),
    **{key: report.COLUMNS[key] for key in ("fd_features", "judge_accuracy", "all_right")},
}


def of_digits(options: Options) -> None:
    """A table of `digits`."""
    prompts, wanted = full_prompts(options.count, seed=0)
    pipes = {None: load("digits")} | {form: load("digits", quantize=form) for form in FORMS}
    rows = {name: (None, shortcuts) for name, shortcuts in SHORTCUTS.items()}
    rows |= {form: (form, Shortcuts()) for form in FORMS}

    seconds: dict[str, list[float]] = {name: [] for name in rows}
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    for start in range(0, len(prompts) - options.batch_size + 1, options.batch_size):
        seeds = list(range(start, start + options.batch_size))
        for name, (form, shortcuts) in rows.items():
            began = time.perf_counter()
            latents = pipes[form].sample(
                [prompts[i] for i in seeds],
                seeds,
                steps=options.steps,
                guidance_scale=options.guidance_scale,
                sampler="ddim",
                shortcuts=shortcuts,
            )
            pictures[name].append(np.clip(pipes[form].decode_pixels(latents), -1, 1))
            seconds[name].append(time.perf_counter() - began)

    table: dict[str, dict] = {}
    plain = np.concatenate(pictures["plain"])
    for name in rows:
        own = np.concatenate(pictures[name])
        table[name] = dict(report.evaluate_pictures((own + 1) / 2, wanted[: len(own)]))
        table[name]["rmse"] = float(np.sqrt(np.mean((own - plain) ** 2)))
    # The first batch was compiled for
    table = {n: row | {"time": shares(seconds, n)} for n, row in table.items()}
    how = f"{options.steps} steps of DDIM, guidance {options.guidance_scale:g}"
    print(f"{len(plain)} pictures, {how}\n")
    print(report.format_table(table, COLUMNS))


def shares(seconds: Mapping[str, list[float]], name: str) -> float:
    """The median share of a row's time in the first row's, without the first round."""
    first = next(iter(seconds.values()))
    return float(np.median(np.divide(seconds[name][1:], first[1:])))


# --- At full size ------------------------------------------------------------------------------

FORMS = ("int8", "fp8")


def of_family(options: Options) -> None:
    """A table of a family's UNet: guided steps, and the weights."""
    family = families.get_family(options.model)
    net = make_net(family.unet)
    dtype = getattr(jnp, options.dtype)
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(
            rng.standard_normal(shape, np.float32) * max(np.prod(shape[1:]), 4) ** -0.5
            + float(name.endswith("weight") and len(shape) == 1),
            dtype,
        )
        for name, shape in net.shapes.items()
    }
    side = options.size // 8
    x = jax.random.normal(jax.random.key(0), (2, side, side, family.unet.in_channels), dtype)
    text = jax.random.normal(jax.random.key(1), (2, 77, family.unet.cross_attention_dim), dtype)
    t = jnp.full(2, 500.0)

    whole = jax.jit(lambda params, x: net(params, x, t, text))
    rows: dict[str, Callable[[], jax.Array]] = {"guided step": lambda: whole(params, x)}
    single = jax.jit(lambda params, x: net(params, x[:1], t[:1], text[:1]))
    rows["outside the interval"] = lambda: single(params, x)
    for branch in (0, 3):
        deep = jnp.zeros((2, *deep_shape(family.unet, branch, side, side)), dtype)
        told = {"branch": branch, "method": "around_deep"}
        around = jax.jit(
            lambda params, x, deep, told=told: net(params, x, t, text, deep=deep, **told)
        )
        rows[f"around kept features, branch {branch}"] = functools.partial(around, params, x, deep)
    print_times(rows, options)

    plain = np.asarray(whole(params, x), np.float32)
    size = sum(value.nbytes for value in params.values())
    rows = {f"{options.dtype}": lambda: whole(params, x)}
    print(f"| weights | GiB | temporaries, GiB | error of a prediction |\n| --- {'| --- ' * 3}|")
    print(f"| {options.dtype} | {size / 2**30:.2f} | {temporaries(net, params, x, text)} | – |")
    for form in FORMS:
        small = eight_bits.quantised(params, form)
        size = sum(value.nbytes for value in small.values())
        said = np.asarray(whole(small, x), np.float32)
        error = np.sqrt(np.mean((said - plain) ** 2) / np.mean(plain**2))
        shown = f"{size / 2**30:.2f} | {temporaries(net, small, x, text)} | {error:.4f}"
        print(f"| {form} | {shown} |")
        rows[form] = lambda small=small: whole(small, x)
    print()
    print_times(rows, options)


def temporaries(net, params: Params, x: jax.Array, text: jax.Array) -> str:
    """GiB that a loop over steps works with besides its arguments."""

    def steps(params, x, count):
        t = jnp.full(2, 500.0)
        return jax.lax.fori_loop(0, count, lambda i, x: net(params, x, t, text), x)

    found: Any = jax.jit(steps).lower(params, x, 3).compile().memory_analysis()
    return f"{found.temp_size_in_bytes / 2**30:.2f}"


def print_times(rows: Mapping[str, Callable[[], jax.Array]], options: Options) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(options.rounds + 1):
        for name, call in rows.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(rows))
    print(f"| {options.model}, {options.size} px | time / {first} | 10 – 90 % |")
    print("| --- | --- | --- |")
    for name, found in seconds.items():
        ratios = np.divide(found[1:], seconds[first][1:])
        low, high = np.quantile(ratios, (0.1, 0.9))
        print(f"| {name} | {np.median(ratios):.2f} | {low:.2f} – {high:.2f} |")
    print()


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    of_digits(options) if options.model == "digits" else of_family(options)
