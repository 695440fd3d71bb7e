"""What the options that trade exactness for speed save, and what they cost, on one machine.

    python benchmarks/options.py digits          # time for each picture, and how good pictures are
    python benchmarks/options.py sd1             # arithmetic of a step, memory, time, at full size

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

from jaxsd import Shortcuts, eight_bits, families, kernels, load
from jaxsd.components import make_net
from jaxsd.evaluation import report
from jaxsd.evaluation.models import full_prompts
from jaxsd.models import deep_shape
from jaxsd.nn import Net, Params


@dataclasses.dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[str] = "digits"
    """digits, or a family: sd1, sd2, ..."""
    count: int = 500
    """Of `digits`: pictures in each row."""
    rows: tuple[str, ...] = ()
    """Of `digits`: which rows, beside "plain"; by default all."""
    steps: int = 50
    guidance_scale: float = 3.0
    batch_size: int = 50
    size: int = 256
    """Of a family: height and width, in pixels."""
    time: bool = True
    """Of a family: also time it, in float32; else only count arithmetic and bytes, in seconds."""
    rounds: int = 5


SHORTCUTS = {
    "plain": Shortcuts(),
    "interval .2 – 2": Shortcuts((0.2, 2.0)),
    "cache every 2": Shortcuts(cache_every=2),
    "cache every 3": Shortcuts(cache_every=3),
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
    wanted_rows = ("plain", *options.rows) if options.rows else tuple(rows)
    rows = {name: row for name, row in rows.items() if name in wanted_rows}

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
BRANCHES = (0, 3)


def of_family(options: Options) -> None:
    """Tables of a family's UNet: what a step computes, what the weights take."""
    config = families.get_family(options.model).unet
    net, side = make_net(config), options.size // 8
    shapes = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in net.shapes.items()}

    def inputs(rows: int) -> dict[str, jax.Array]:
        text = (rows, 77, config.cross_attention_dim)
        return {
            "sample": jax.random.normal(jax.random.key(0), (rows, side, side, config.in_channels)),
            "timestep": jnp.full(rows, 500.0),
            "encoder_hidden_states": jax.random.normal(jax.random.key(1), text),
        }

    def around(branch: int) -> dict[str, Any]:
        deep = jnp.zeros((2, *deep_shape(config, branch, side, side)))
        return inputs(2) | {"deep": deep}

    def whole(params: Params, told: dict[str, jax.Array]) -> jax.Array:
        return net(params, **told)

    steps = {"guided": (whole, inputs(2)), "outside the interval": (whole, inputs(1))}
    for branch in BRANCHES:
        how = {"branch": branch, "method": "around_deep"}
        steps[f"around kept features, branch {branch}"] = (
            lambda params, told, how=how: net(params, **told, **how),
            around(branch),
        )
    with kernels.compiling_for("gpu"):  # plain forms: of a loop, such as CPUs take, one turn counts
        lowered = {name: program(ask).lower(shapes, told) for name, (ask, told) in steps.items()}
    counts = {name: found.cost_analysis()["flops"] for name, found in lowered.items()}
    print(f"| {options.model}, {options.size} px, a step | TFLOP | share |\n| --- | --- | --- |")
    for name, count in counts.items():
        print(f"| {name} | {count / 1e12:.3f} | {count / counts['guided']:.3f} |")

    print(f"\n| {options.model}, weights of the UNet | GiB |\n| --- | --- |")
    kept = {"float32": shapes}
    for form in FORMS:
        kept[form] = jax.eval_shape(lambda p, form=form: eight_bits.quantised(p, form), shapes)
    for name, params in kept.items():
        size = sum(value.size * value.dtype.itemsize for value in params.values())
        print(f"| {name} | {size / 2**30:.2f} |")
    if not options.time:
        return

    rng = np.random.default_rng(0)
    params = {name: random_weight(rng, name, shape) for name, shape in net.shapes.items()}
    print()
    calls = {n: functools.partial(program(a), params, told) for n, (a, told) in steps.items()}
    print_times(calls, options)
    guided = program(whole)
    plain = np.asarray(guided(params, inputs(2)))
    print("| weights | temporaries of a loop, GiB | error of a prediction |\n| --- | --- | --- |")
    print(f"| float32 | {temporaries(net, params, inputs(2))} | – |")
    calls = {"float32": calls["guided"]}
    for form in FORMS:
        small = eight_bits.quantised(params, form)
        calls[form] = functools.partial(guided, small, inputs(2))
        error = relative_error(calls[form](), plain)
        print(f"| {form} | {temporaries(net, small, inputs(2))} | {error:.4f} |")
    print()
    print_times(calls, options)
    print_errors_by_block(params, lambda small: guided(small, inputs(2)), plain)


def print_errors_by_block(
    params: Params, ask: Callable[[Params], jax.Array], plain: np.ndarray
) -> None:
    """Each block of a UNet in eight bits alone, and what becomes of the prediction `plain`."""
    blocks = sorted({block_of(name) for name in params if name.startswith(eight_bits.PARTS)})
    print(f"| error of a prediction with one block in eight bits | {' | '.join(FORMS)} |")
    print("| --- |" + " --- |" * len(FORMS))
    for block in blocks:
        small = (in_eight_bits(params, block, form) for form in FORMS)
        errors = (f"{relative_error(ask(one), plain):.4f}" for one in small)
        print(f"| {block} | {' | '.join(errors)} |")


def block_of(name: str) -> str:
    """down_blocks.0, mid_block, up_blocks.3"""
    parts = name.split(".")
    return parts[0] if parts[0] == "mid_block" else ".".join(parts[:2])


def in_eight_bits(params: Params, block: str, form: str) -> Params:
    """All in float32, those of one block as eight bits have rounded them."""
    own = {name: weight for name, weight in params.items() if block_of(name) == block}
    small = eight_bits.quantised(own, form)
    kept = (name for name in own if name + eight_bits.SUFFIX in small)
    restored = {
        name: eight_bits.Eight(small[name], small[name + eight_bits.SUFFIX]).at_work(own[name])
        for name in kept
    }
    return {**params, **restored}


def relative_error(found: jax.Array, wanted: np.ndarray) -> float:
    """RMS of the difference as a share of the RMS of what was wanted."""
    return float(np.sqrt(np.mean((np.asarray(found) - wanted) ** 2) / np.mean(wanted**2)))


def program(ask: Callable) -> Any:
    """Its own, traced anew: what was traced for another platform is not to be run here."""
    return jax.jit(lambda params, told: ask(params, told))


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Of a size that keeps activations as they are; the weights of norms are around one."""
    drawn = rng.standard_normal(shape, np.float32) * max(np.prod(shape[1:]), 4) ** -0.5
    return jnp.asarray(drawn + (name.endswith("weight") and len(shape) == 1), jnp.float32)


def temporaries(net: Net, params: Params, told: dict[str, jax.Array]) -> str:
    """GiB that a loop over steps works with besides its arguments."""

    def steps(params: Params, told: dict[str, jax.Array], count: int) -> jax.Array:
        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            return net(params, **told | {"sample": x})

        return jax.lax.fori_loop(0, count, step, told["sample"])

    found: Any = jax.jit(steps).lower(params, told, 3).compile().memory_analysis()
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
