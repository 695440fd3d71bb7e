"""Steps in which less is computed than the network could say: faster, and other pictures.

Guidance on part of the noise levels (Kynkäänniemi et al. 2024, 2404.07724): elsewhere the network
is asked with the prompt alone. Kept features (DeepCache, Ma et al. 2023, 2312.00858): what the deep
blocks gave in one step stands in for them in the next ones, where only the outer blocks are
computed. Every kind of step that a run needs is a loop of its own inside the one program; which one
a step is stands in a table, a value: to move the interval or the number of steps compiles nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.diffusion import samplers
from jaxsd.diffusion.schedule import Schedule
from jaxsd.diffusion.steps import ROWS, Steps
from jaxsd.errors import JaxsdError
from jaxsd.models import branches, deep_shape
from jaxsd.nn import Net

# Samplers that noise a predicted picture anew in each step: the next one sees other features
JUMPING = ("lcm", "tcd", "ddim_stochastic")


@dataclasses.dataclass(frozen=True)
class Shortcuts:
    """What to leave out; by default nothing.

    guidance_interval: (lowest, highest) noise level sigma / alpha of the steps that are guided, as
    in the paper: from 0 to infinity, judged where a step begins. cache_every: how many steps deep
    features serve, the one in which they are computed included; 1 keeps none. cache_branch: around
    how many skip connections the outer blocks are computed in the other steps, less one: 0, the
    paper's choice, is the least work, up to the number of skips less one.
    """

    guidance_interval: tuple[float, float] | None = None
    cache_every: int = 1
    cache_branch: int = 0


class Way(NamedTuple):
    """How a step is computed: static, a loop in the program for each."""

    guided: bool = True  # with all conditions; else with the last alone
    fresh: bool = True  # the whole network; else its outer blocks around kept features
    branch: int | None = None  # where features are kept; None: nowhere


def check_shortcuts(
    wanted: Shortcuts,
    unet: Net,
    schedule: Schedule,
    sampler: str,
    controlnets: int,
    guidance_embedded: bool,
) -> None:
    """JaxsdError where a shortcut cannot be taken."""
    if wanted.guidance_interval is not None:
        low, high = wanted.guidance_interval
        if not 0 <= low <= high:
            raise JaxsdError(
                "guidance_interval is a lowest and a highest noise level (sigma / alpha), from 0 "
                f"to inf, not {low:g} and {high:g}"
            )
        if guidance_embedded:
            raise JaxsdError(
                "this model is told the guidance scale and asked once a step: there is no guidance "
                "for guidance_interval to leave out"
            )
    every, branch, skips = wanted.cache_every, wanted.cache_branch, branches(unet.config)
    if every < 1:
        raise JaxsdError(f"cache_every must be at least 1 (nothing is kept), not {every}")
    if not 0 <= branch < skips:
        raise JaxsdError(f"cache_branch must be from 0 to {skips - 1} in this UNet, not {branch}")
    if every == 1:
        return
    why = None
    if controlnets:
        why = "a ControlNet speaks to the deep blocks, which would not listen"
    elif sampler in JUMPING:
        why = f"{sampler} noises a new picture in each step, with features of its own"
    elif samplers.get_sampler(sampler).second is not None:
        why = f"{sampler} looks twice a step, at two noise levels: take a sampler that looks once"
    elif schedule.default_steps is not None:
        why = f"this model was distilled to {schedule.default_steps} steps, too far apart"
    if why:
        raise JaxsdError(f"cache_every cannot be had here: {why}")


def plan_ways(
    wanted: Shortcuts, grid: Steps, first: int, stop: int, conditions: int
) -> tuple[tuple[Way, ...], np.ndarray | None]:
    """The ways that a run of steps first ... stop - 1 takes, and which of them each step is.

    The table is int32 [ROWS], or None where there is one way only.
    """
    interval = wanted.guidance_interval if conditions > 1 else None
    cached = wanted.cache_every > 1
    branch = wanted.cache_branch if cached else None
    ways = tuple(
        Way(guided, fresh, branch)
        for guided in ((True,) if interval is None else (True, False))
        for fresh in ((True, False) if cached else (True,))
    )
    if len(ways) == 1:
        return ways, None
    table, was_guided = np.zeros(ROWS, np.int32), True
    for i in range(first, stop):
        alpha, sigma = float(grid.alpha[i]), float(grid.sigma[i])
        level = sigma / alpha if alpha > 0 else np.inf
        guided = interval is None or interval[0] <= level <= interval[1]
        # The features kept without guidance are of the last condition alone
        fresh = (i - first) % wanted.cache_every == 0 or (guided and not was_guided)
        table[i] = ways.index(Way(guided, fresh or not cached, branch))
        was_guided = guided
    return ways, table


def keeping(unet: Net, way: Way, kept: list[Any]) -> Callable[..., jax.Array]:
    """The UNet as its own function, which takes deep features from `kept[0]` or leaves them there.

    They have a row for each condition of each image, side by side, as guidance asks: what is asked
    with the last condition alone reads the last rows, and leaves the same in all.
    """
    if way.branch is None:
        return unet

    def ask(params: Any, x: jax.Array, t: jax.Array, **conditioning: Any) -> jax.Array:
        count = len(kept[0]) // len(x)
        told = {"branch": way.branch, **conditioning}
        if way.fresh:
            said, deep = unet(params, x, t, method="and_deep", **told)
            kept[0] = jnp.repeat(deep, count, 0)
            return said
        return unet(params, x, t, deep=kept[0][count - 1 :: count], method="around_deep", **told)

    return ask


def no_features(
    config: Any, branch: int | None, dtype: Any, shape: tuple[int, ...], conditions: int
) -> tuple[jax.Array, ...]:
    """What stands for kept features before there are any: one array, or none without a branch.

    config: of the UNet. shape: of the latents, [b, h, w, c]. conditions: of the guidance.
    """
    if branch is None:
        return ()
    rows, height, width, _ = shape
    kept = deep_shape(config, branch, height, width)
    return (jnp.zeros((rows * conditions, *kept), dtype),)


def run(
    bodies: Sequence[Callable[[jax.Array, Any], Any]],
    table: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    carry: Any,
) -> Any:
    """Steps start ... stop - 1, step i by bodies[table[i]](i, carry): as `lax.fori_loop`.

    A loop for each body, all of them inside one more. In a branch of `lax.cond` the compiler would
    not take out of the loop what does not change from step to step.
    """

    def stretch(which: int, now: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return jax.lax.while_loop(
            lambda now: (now[0] < stop) & (table[jnp.minimum(now[0], ROWS - 1)] == which),
            lambda now: (now[0] + 1, bodies[which](*now)),
            now,
        )

    def each(now: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        for which in range(len(bodies)):
            now = stretch(which, now)
        return now

    return jax.lax.while_loop(lambda now: now[0] < stop, each, (start, carry))[1]
