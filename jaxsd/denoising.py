"""The program that samples: the networks, guidance, ControlNets and blending, inside one loop."""

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsd import shortcuts
from jaxsd.diffusion import samplers
from jaxsd.diffusion.denoise import Conditioning, Denoise, Network, asking, side_by_side
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import GuidanceClipped, JaxsdError
from jaxsd.models import UNetConfig, guidance_scale_embedding
from jaxsd.nn import Net, Params
from jaxsd.shortcuts import Way
from jaxsd.weights import lora
from jaxsd.weights.lora import Live

NO_UNCOND = (
    "this model was distilled from guidance: it is told the scale and has no unconditional half, "
    "so that a negative prompt (uncond) can do nothing: leave it out"
)
_KEYS = re.compile(r"\.attn2\.to_[kv]\.weight$")


class Start(NamedTuple):
    """Where image-to-image and inpainting begin.

    latents: of the pictures, [b, h, w, c]. strength: in (0, 1], the share of the steps that is
    taken. mask: [b, h, w, 1], 1 where the picture may change: the rest is put back after each step,
    and at strength 1 sampling begins at pure noise. noise: what it is noised with for that, where
    sampling does not begin with noise but goes on with another model's latents.
    """

    latents: jax.Array
    strength: float = 1.0
    mask: jax.Array | None = None
    noise: jax.Array | None = None


Traced = Any  # a NumPy array or scalar outside the program, traced inside it


class Inputs(NamedTuple):
    """What the program is given besides the latents: everything in here is traced."""

    params: tuple[Params, list[Params]]  # the UNet's, each ControlNet's
    loras: Live  # on the UNet
    lora_scales: Traced  # [LoRAs]
    conditions: list[Conditioning]  # from the least to the most told
    scales: Traced  # of guidance, [len(conditions) - 1, b]
    guidance_rescale: Traced
    control_scales: Traced  # [ControlNets]
    blend: tuple[jax.Array, jax.Array, jax.Array] | None  # clean latents, noise, mask
    keys: jax.Array  # of each image
    grid: samplers.Steps
    eta: Traced
    table: Traced | None = None  # [ROWS], where there are several ways: which one each step takes


def make_network(
    unet: Callable[..., jax.Array],
    unet_params: Params,
    controlnets: Sequence[Net] = (),
    control_params: Sequence[Params] = (),
    control_scales: Traced = (),
) -> Network:
    """The UNet with its ControlNets as `guided` calls it: computing in its weights' dtype."""
    dtype = unet_params["conv_in.weight"].dtype

    def network(x, t, concat=None, control=(), known=None, **conditioning):
        x, concat, control, known, conditioning = jax.tree.map(
            lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a,
            (x, concat, control, known or [{}] * (1 + len(controlnets)), conditioning),
        )
        residuals = None
        shared = {name: value for name, value in conditioning.items() if name != "timestep_cond"}
        scales = jnp.asarray(control_scales).astype(dtype)
        for net, params, seen, picture, scale in zip(
            controlnets, control_params, known[1:], control, scales, strict=True
        ):
            shared |= {"controlnet_cond": picture, "conditioning_scale": scale}
            said = net(params | seen, x, t, **shared)
            residuals = said if residuals is None else jax.tree.map(jnp.add, residuals, said)
        if residuals is not None:
            down, middle = residuals
            conditioning |= {"down_block_residuals": down, "mid_block_residual": middle}
        if concat is not None:  # for the UNet alone: a ControlNet knows latents only
            x = jnp.concatenate([x, concat], -1)
        return unet(unet_params | known[0], x, t, **conditioning).astype(jnp.float32)

    return network


def with_keys(
    condition: Conditioning, nets: Sequence[Net], params: Sequence[Params]
) -> Conditioning:
    """The same for the networks, the UNet and its ControlNets, with what no step changes.

    That is the keys and values of all `attn2`, of which XLA's compiler for GPUs would compute the
    same ones in every step.
    """
    states = condition.get("encoder_hidden_states")
    if states is None:
        return condition
    states = states.astype(params[0]["conv_in.weight"].dtype)
    known = [net.known(own, _KEYS, states) for net, own in zip(nets, params, strict=True)]
    return condition | {"known": known}


def loop(
    unet: Net,
    controlnets: Sequence[Net],
    schedule: Schedule,
    sampler: str,
    ways: tuple[Way, ...],
    inputs: Inputs,
    x: Float[Array, "b h w c"],
    history: tuple[jax.Array, ...],
    begin: jax.Array,
    end: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Steps begin ... end - 1: the latents after them, and what is remembered.

    That is the sampler's, and where ways keep features, these after it.
    """
    unet_params, control_params = inputs.params
    unet_params = lora.apply(unet_params, inputs.loras, inputs.lora_scales)

    def put_back(x: jax.Array, i: jax.Array) -> jax.Array:
        """What the mask protects, as noisy as the next step expects it."""
        assert inputs.blend is not None
        clean, noise, mask = inputs.blend
        rows = (inputs.grid.alpha, inputs.grid.sigma)
        alpha, sigma = (jnp.asarray(row)[jnp.minimum(i + 1, len(row) - 1)] for row in rows)
        last = i + 1 >= inputs.grid.count
        alpha, sigma = jnp.where(last, 1.0, alpha), jnp.where(last, 0.0, sigma)
        return mask * x + (1 - mask) * (alpha * clean + sigma * noise)

    nets, params = [unet, *controlnets], [unet_params, *control_params]
    conditions = [with_keys(condition, nets, params) for condition in inputs.conditions]
    told = {True: side_by_side(conditions), False: conditions[-1]}  # by whether it is guided
    row = samplers.SAMPLERS[sampler]
    after = None if inputs.blend is None else put_back

    def denoise(way: Way, kept: list[jax.Array]) -> Denoise:
        asked = shortcuts.keeping(unet, way, kept)
        network = make_network(
            asked, unet_params, controlnets, control_params, inputs.control_scales
        )
        count = len(conditions) if way.guided else 1
        return asking(network, told[way.guided], count, inputs.scales, inputs.guidance_rescale)

    run = (inputs.keys, inputs.grid)
    if inputs.table is None:
        said = denoise(ways[0], [])
        return samplers.run(row, schedule, said, x, history, *run, begin, end, inputs.eta, after)

    def step(way: Way, i: jax.Array, carry: Any) -> Any:
        x, remembered = carry
        own, kept = remembered[: row.remembers], list(remembered[row.remembers :])
        body = samplers.make_body(row, schedule, denoise(way, kept), *run, inputs.eta, after)
        x, own = body(i, (x, own))
        return x, (*own, *kept)

    bodies = [functools.partial(step, way) for way in ways]
    return shortcuts.run(bodies, inputs.table, begin, end, (x, history))


def part(
    grid: samplers.Steps,
    timesteps: int,
    denoising_start: float | None,
    denoising_end: float | None,
) -> tuple[int, int]:
    """The first step to take and the one to stop before.

    denoising_start, denoising_end: shares of the schedule's `timesteps` at which this model takes
    over from another, and hands over to one, as in diffusers. JaxsdError if no step is left.
    """
    count = int(grid.count)
    t = np.asarray(grid.t)[:count]
    first, stop = int(grid.first), count
    for name, share in (("denoising_start", denoising_start), ("denoising_end", denoising_end)):
        if share is not None and not 0 <= share <= 1:
            raise JaxsdError(f"{name} must be from 0 to 1, not {share}")
    if denoising_start is not None:
        first = int((t >= round(timesteps * (1 - denoising_start))).sum())
    if denoising_end is not None:
        stop = int((t >= round(timesteps * (1 - denoising_end))).sum())
    if first >= stop:
        raise JaxsdError(
            f"of {count} steps none is left between {first} (by strength or denoising_start) and "
            f"{stop} (by denoising_end): move these apart, or take more steps"
        )
    return first, stop


def chain(
    cond: Conditioning,
    uncond: Conditioning | None,
    scales: np.ndarray,
    image_cond: Conditioning | None,
    image_guidance_scale: float,
) -> tuple[list[Conditioning], np.ndarray]:
    """The conditions and scales of `guided`: only `cond` where there is no guidance.

    None is: without `uncond`, if every scale [b] is at most 1, or (InstructPix2Pix) the picture's
    scale is below 1, as in diffusers.
    """
    alone = [cond], np.zeros((0, len(scales)), np.float32)
    if not uncond or (scales <= 1).all():
        return alone
    scales = np.maximum(scales, 1)[None]  # those at most 1: the condition as it is
    if image_cond is None:
        return [uncond, cond], scales
    if image_guidance_scale < 1:
        return alone
    pictures = np.full_like(scales, image_guidance_scale)
    return [uncond, image_cond, cond], np.concatenate([pictures, scales])


def within_range(config: UNetConfig, scales: np.ndarray) -> np.ndarray:
    """Guidance scales, those outside a student's `guidance_range` as its nearest end.

    With one `GuidanceClipped` warning, which names them.
    """
    if config.guidance_range is None:
        return scales
    least, most = config.guidance_range
    taken = np.asarray(np.clip(scales, least, most))
    if beyond := sorted({*scales[taken != scales].tolist()}):
        warnings.warn(
            f"this model was distilled for guidance scales from {least:g} to {most:g}; "
            f"{', '.join(f'{scale:g}' for scale in beyond)} is taken as the nearest of them",
            GuidanceClipped,
            stacklevel=3,
        )
    return taken


def told_scale(
    config: UNetConfig, cond: Conditioning, uncond: Conditioning | None, scales: np.ndarray
) -> Conditioning:
    """What a network distilled from guidance is told: the condition, and the scales [b] with it.

    JaxsdError if there is an unconditional half, of which it knows nothing.
    """
    if uncond is not None:
        raise JaxsdError(NO_UNCOND)
    size = config.time_cond_proj_dim
    assert size is not None
    return cond | {"timestep_cond": _embedded(scales - 1, size)}


# As one program: op by op, there would be one for each
_embedded = jax.jit(guidance_scale_embedding, static_argnums=1)
