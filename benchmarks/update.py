"""The update of a training step beside PyTorch's: clipping, AdamW, averages, and no loss.

    taskset -c 0 python benchmarks/update.py --threads 1

Gradients are given, arrays as large as a model's. In turns, in one process; prints ratios to
torch's fused AdamW, and what jaxsd's step works with besides state and gradients. XLA takes all
cores that it is left.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro

from jaxsd import training
from jaxsd.training.placement import compile_step, make_mesh, place_state


@dataclasses.dataclass(frozen=True)
class Options:
    arrays: int = 40
    size: int = 1 << 20
    """Numbers in each."""
    rounds: int = 9
    threads: int = os.cpu_count() or 1
    """Of torch."""


class Given:
    """A loss whose gradient is the batch."""

    aux = ()

    def __init__(self, options: Options):
        self.shapes = {f"{i}.weight": (options.size // 256, 256) for i in range(options.arrays)}

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        return {name: jax.random.normal(key, shape) for name, shape in self.shapes.items()}

    def loss(self, params, aux, batch, now):
        return _given(params, batch), {}


@jax.custom_vjp
def _given(params: dict[str, jax.Array], gradients: dict[str, jax.Array]) -> jax.Array:
    """0, and its gradients are those given: nothing is read to make them."""
    return jnp.float32(0)


def _backward(gradients: Any, one: jax.Array) -> tuple[Any, None]:
    return gradients, None


_given.defvjp(lambda params, gradients: (jnp.float32(0), gradients), _backward)


def jaxsds(options: Options) -> tuple[Callable[[], None], float]:
    """An update, and the memory it works with, in sizes of the parameters."""
    goal, settings = Given(options), training.Options(1000, batch_size=jax.device_count())
    optimizer = training.make_optimizer(settings)
    mesh = make_mesh(settings)
    state, aux = place_state(goal, optimizer, settings, mesh)
    rng = np.random.default_rng(0)
    batch = {
        name: jnp.asarray(1e-3 * rng.standard_normal(shape, np.float32))
        for name, shape in goal.shapes.items()
    }
    step = compile_step(training.make_step(goal, optimizer, settings), state, settings)
    made = step.lower(state, aux, batch).compile()
    held = [state]

    def once() -> None:
        held[0], _ = made(held[0], aux, batch)
        jax.block_until_ready(held[0])

    return once, made.memory_analysis().temp_size_in_bytes / (4 * options.arrays * options.size)


def torchs(options: Options) -> Callable[[], None]:
    torch.set_num_threads(options.threads)
    shape = (options.size // 256, 256)
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(options.arrays)]
    averages = [p.detach().clone() for p in params]
    for p in params:
        p.grad = 1e-3 * torch.randn(shape)
    optimizer = torch.optim.AdamW(params, 1e-4, (0.9, 0.99), weight_decay=0, fused=True)

    def once() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, [p.detach() for p in params], 1e-3)

    return once


def main(options: Options) -> None:
    ours, memory = jaxsds(options)
    sides, seconds = {"jaxsd": ours, "torch": torchs(options)}, {"jaxsd": [], "torch": []}
    for number in range(options.rounds + 1):
        for name, once in sides.items():
            start = time.perf_counter()
            once()
            if number:
                seconds[name].append(time.perf_counter() - start)
    ratios = np.asarray(seconds["jaxsd"]) / np.asarray(seconds["torch"])
    middle = np.median(ratios)
    print("| AdamW, jaxsd / torch | range | working memory / parameters |\n| --- | --- | --- |")
    print(f"| {middle:.2f} | {ratios.min():.2f} – {ratios.max():.2f} | {memory:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
