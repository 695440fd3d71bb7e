"""What the denoising loop computes anew in every step though no step changes it.

    python benchmarks/hoisting.py --model sd1 --size 256

compiles the loop as `Pipeline` does, random weights, one picture with guidance, and prints whether
the products of cross-attention's keys and values are inside the loop or before it, and which large
arrays of weights are still copied or converted inside. Then, in turns, the time of a step and of
what can be computed once: keys and values for each prompt, as it is, and time embeddings and their
projections for each step, which are not, as shares of the step.
"""

import dataclasses
import functools
import re
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import programs
import tyro

from jaxsd import denoising, families, kernels, shortcuts
from jaxsd.components import make_net
from jaxsd.nn import Net, Params

ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class Options:
    model: str = "sd1"
    """A family of latent models without sizes: sd1, sd2, ..."""
    size: int = 256
    dtype: Literal["float32", "bfloat16"] = "float32"
    rounds: int = ROUNDS
    hlo: Path | None = None
    """Where to write the compiled program, for a closer look."""


def main(options: Options) -> None:
    family = families.get_family(options.model)
    net, dtype = make_net(family.unet), jnp.dtype(options.dtype)
    params = {n: jax.ShapeDtypeStruct(s, dtype) for n, s in net.shapes.items()}
    states = jax.ShapeDtypeStruct((1, 77, net.config.cross_attention_dim), dtype)
    arguments = loop_arguments(family, options.size, params, states)

    def loop(inputs, x, begin, end):
        schedule = family.schedule.for_run()
        ways = (shortcuts.Way(),)
        return denoising.loop(net, [], schedule, "ddim", ways, inputs, x, (), begin, end)[0]

    compiled = kernels.jit(loop).lower(*arguments).compile()
    print(f"{options.model}, {options.size} px, {options.dtype}, {jax.default_backend()}")
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"temporaries: {temporary / 2**30:.2f} GiB")
    if options.hlo is not None:
        options.hlo.write_text(compiled.as_text())
    report(compiled.as_text(), net)
    compare(compiled, arguments, net, options.rounds)


def loop_arguments(family, size: int, params, states) -> tuple:
    side = size // 8
    conditions = [{"encoder_hidden_states": states}] * 2
    scales = np.full((1, 1), 7.5, np.float32)
    inputs = programs.loop_inputs(family, params, conditions, scales, 20)
    return inputs, np.zeros((1, side, side, 4), np.float32), np.int32(0), np.int32(1)


# --- Where the compiler left what ------------------------------------------------------------


def report(text: str, net: Net) -> None:
    loop, before = parts(text)
    wide = {s[0] for n, s in net.shapes.items() if re.search(r"attn2\.to_[kv]\.weight", n)}
    for where, lines in (("inside the loop", loop), ("before it", before)):
        products = [shape(line) for line in lines if re.search(r" (dot|convolution)\(", line)]
        rows = [s for s in products if s and set(s[1]) & {154, 77} and set(s[1]) & wide]
        print(f"products of keys and values {where}: {len(rows)}")
    weights = {tuple(sorted(s)) for s in net.shapes.values() if np.prod(s) >= 1 << 18}
    moved: Counter[str] = Counter()
    for line in loop:
        found = shape(line)
        kind = re.search(r" (copy|transpose|convert)\(", line)
        if kind and found and tuple(sorted(n for n in found[1])) in weights:
            moved[f"{kind[1]} {found[0]}{list(found[1])}"] += 1
    print(f"weights moved inside the loop: {dict(moved) or 'none'}")


def shape(line: str) -> tuple[str, tuple[int, ...]] | None:
    found = re.search(r"= ([a-z]+\d+)\[([\d,]+)\]", line)
    return found and (found[1], tuple(int(n) for n in found[2].split(",")))  # pyright: ignore


def parts(text: str) -> tuple[list[str], list[str]]:
    """The lines of the program inside its largest loop, with all that is called, and the rest."""
    computations: dict[str, list[str]] = {}
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = computations[start[1]] = []
        elif line.startswith(" "):
            lines.append(line)

    def reached(name: str) -> set[str]:
        seen, waiting = set(), [name]
        while waiting:
            if (name := waiting.pop()) in seen or name not in computations:
                continue
            seen.add(name)
            for line in computations[name]:
                called = re.findall(r"(?:calls|to_apply|body|condition)=\{?%?([\w.\-]+)", line)
                waiting += called
        return seen

    bodies = [reached(name) for name in set(re.findall(r"body=%?([\w.\-]+)", text))]
    inside = max(bodies, key=len)
    loop = [line for name in inside for line in computations[name]]
    rest = [line for name in computations.keys() - inside for line in computations[name]]
    return loop, rest


# --- What it would save ----------------------------------------------------------------------


def compare(compiled, arguments: tuple, net: Net, rounds: int) -> None:
    params = random_params(net, arguments[0].params[0]["conv_in.weight"].dtype)
    states = jnp.ones(
        arguments[0].conditions[0]["encoder_hidden_states"].shape, params["conv_in.weight"].dtype
    )
    inputs = arguments[0]._replace(
        params=(params, []), conditions=[{"encoder_hidden_states": states}] * 2
    )
    told = jnp.concatenate([states] * 2)
    vector = jnp.ones((2, net.config.block_out_channels[0]), states.dtype)
    candidates = {
        "keys and values": (
            jax.jit(keys_and_values),
            (weights(params, "attn2.to_k", "attn2.to_v"), told),
        ),
        "time embedding and projections": (
            jax.jit(time_vectors),
            (weights(params, "time_embedding", "time_emb_proj"), vector),
        ),
    }
    step = functools.partial(compiled, inputs, *arguments[1:])
    jax.block_until_ready(step())
    for function, given in candidates.values():
        jax.block_until_ready(function(*given))
    shares: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        whole = seconds(step)
        for name, (function, given) in candidates.items():
            shares[name].append(seconds(lambda f=function, g=given: f(*g)) / whole)
    print(
        "| computed once instead of in each step | share of a step | range |\n| --- | --- | --- |"
    )
    for name, values in shares.items():
        low, middle, high = np.quantile(values, (0, 0.5, 1))
        print(f"| {name} | {middle:.2%} | {low:.2%} – {high:.2%} |")


def weights(params: Params, *kinds: str) -> Params:
    return {n: p for n, p in params.items() if any(kind in n for kind in kinds)}


def keys_and_values(params: Params, states: jax.Array) -> list[jax.Array]:
    flat = states.reshape(-1, states.shape[-1])
    return [flat @ weight.T for weight in params.values()]


def time_vectors(params: Params, x: jax.Array) -> list[jax.Array]:
    def linear(name: str, x: jax.Array) -> jax.Array:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    x = linear("time_embedding.linear_2", jax.nn.silu(linear("time_embedding.linear_1", x)))
    names = [n.removesuffix(".weight") for n in params if n.endswith("time_emb_proj.weight")]
    return [linear(name, jax.nn.silu(x)) for name in names]


def random_params(net: Net, dtype) -> Params:
    """Cheap: slices of one pool of normal numbers, of the size that initialisers give."""
    pool = np.random.default_rng(0).normal(size=1 << 24).astype(np.float32)
    params = {}
    for name, shape in net.shapes.items():
        scale = (np.prod(shape[1:]) or 1) ** -0.5
        params[name] = jnp.asarray(np.resize(pool, shape) * np.float32(scale), dtype)
    return params


def seconds(function) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Options))
