"""A model's networks, each part of sampling one compiled program: encode, noise, denoise, decode.

Prompts, seeds, scales and the number of steps go in as values; another shape, sampler, schedule or
number of conditions compiles anew.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxsd import denoising, pictures, sharding
from jaxsd.compiled import Compiled
from jaxsd.conditioning import Sizes, class_labels
from jaxsd.denoising import Inputs, Start
from jaxsd.diffusion import samplers
from jaxsd.diffusion.denoise import Conditioning
from jaxsd.errors import JaxsdError
from jaxsd.families import latent_shape
from jaxsd.seeds import SEEDS
from jaxsd.shortcuts import Shortcuts, check_shortcuts, no_features, plan_ways
from jaxsd.tiling import tiled

Callback = Callable[[int, float, jax.Array], None]


class Networks(Compiled):
    """What each part of a model does; `Pipeline` makes pictures with them."""

    def encode(
        self,
        prompts: Sequence[str | None],
        clip_skip: int = 0,
        chunks: int = 1,
        size_ids: Sequence[float] | None = None,
    ) -> Conditioning:
        """What the UNet is told: text states [n, 77 chunks, d], or one-hot classes [n, k].

        The empty prompt is the unconditional one; so is None, no prompt at all, which Stable
        Diffusion XL takes as zeros. XL is also told sizes, `size_ids`, by default those of the
        pictures it makes. A longer prompt than the chunks is cut, with a `PromptTruncated` warning.
        """
        if not self.tokenizers:
            if clip_skip or chunks != 1:
                raise JaxsdError("clip_skip and chunks are for text: this model reads none")
            return class_labels(self.unet.config, prompts)
        conditioning = self._text(
            [self.components[name].params for name in self._towers],
            prompts,
            clip_skip,
            chunks,
            [self._live[name] for name in self._towers],
            _one_or_each(self.lora_scales, len(self.loras), "lora_scales"),
            self.rows,
        )
        if self.xl:
            ids = self.size_ids(self.default_size) if size_ids is None else size_ids
            rows = np.tile(np.asarray(ids, np.float32), (len(prompts), 1))
            conditioning["time_ids"] = jnp.asarray(rows)
        return conditioning

    def size_ids(
        self, size: tuple[int, int], sizes: Sizes | None = None, negative: bool = False
    ) -> list[float] | None:
        """What Stable Diffusion XL is told of a picture of `size` (height, width); else None."""
        if not self.xl:
            return None
        return (sizes or Sizes()).ids(self.unet.config, self._text.pooled_size, size, negative)

    def encode_pictures(self, pictures: np.ndarray, scaled: bool = True) -> jax.Array:
        """Latents [n, h, w, c] of pictures [n, H, W, 3] in [-1, 1]: the mean, not a draw.

        Scaled as the UNet knows them, or (InstructPix2Pix) as the VAE gives them.
        """
        if self.vae is None:
            return jnp.asarray(pictures)
        params, downscale = self.params["vae"], self._downscale

        def encode(x: np.ndarray) -> jax.Array:
            return self._compiled_encode(params, x, vae=self.vae, split=self.rows)

        if self.vae_tile:
            latents = tiled(encode, pictures, self.vae_tile * downscale, 1 / downscale)
        else:
            latents = encode(pictures)
        return jnp.asarray(latents) * (self.vae.config.scaling_factor if scaled else 1.0)

    def noise(
        self, seeds: Sequence[int], height: int | None = None, width: int | None = None
    ) -> jax.Array:
        """N(0, 1) latents [n, h, w, c]; row i depends on seeds[i] and on nothing else."""
        default = self.default_size
        shape = latent_shape(
            self.unet.config,
            self._downscale,
            default[0] if height is None else height,
            default[1] if width is None else width,
            self.schedule.pictures_predicted,
        )
        return sharding.split_rows(self._compiled_noise(_keys(seeds), shape=shape), self.rows)

    def denoise(
        self,
        latents: jax.Array,
        cond: Conditioning,
        uncond: Conditioning | None,
        *,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        sampler: str | None = None,
        eta: float = 0.0,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
        image_cond: Conditioning | None = None,
        image_guidance_scale: float = 1.5,
        control_scales: float | Sequence[float] = 1.0,
        start: Start | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        shortcuts: Shortcuts = Shortcuts(),  # noqa: B008
    ) -> jax.Array:
        """Runs the sampler from N(0, 1) `latents` [n, h, w, c] to clean ones.

        Without `uncond`, with every guidance scale at most 1, or for a model that is told nothing,
        there is no guidance, and half the work. A model that is told the scale has no `uncond`.
        `seeds` (default 0 ... n-1) feed the noise that some samplers add on the way. `start`: begin
        at noised pictures. With `denoising_start` the latents are taken as another model left them
        at its `denoising_end`. shortcuts: what to leave out to be faster. See `sample` for the
        rest.
        """
        name = sampler or self.default_sampler
        uses_eta = samplers.get_sampler(name).uses_eta
        if not 0 <= eta <= (1 if uses_eta else 0):
            known = ", ".join(n for n, row in samplers.SAMPLERS.items() if row.uses_eta)
            raise JaxsdError(f"eta must be from 0 to 1, not {eta}, and 0 except with {known}")
        if not 0 <= guidance_rescale <= 1:
            raise JaxsdError(f"guidance_rescale must be from 0 to 1, not {guidance_rescale}")
        steps = self.default_steps if steps is None else steps
        strength = start.strength if start else 1.0
        grid, stop = self.plan_steps(name, steps, strength, denoising_start, denoising_end)
        first, count = int(grid.first), len(latents)

        conditions, scales = self._chain(
            cond, uncond, guidance_scale, count, image_cond, image_guidance_scale
        )
        self.check_shortcuts(shortcuts, name)
        ways, table = plan_ways(shortcuts, grid, first, stop, len(conditions))
        blend = None
        if start is not None and start.mask is not None:
            blend = (start.latents, latents if start.noise is None else start.noise, start.mask)
        lora_scales = _one_or_each(self.lora_scales, len(self.loras), "lora_scales")
        unet_params, loras = self.params["unet"], self._live["unet"]
        if callback is not None and loras:  # added once, not once a step
            unet_params, loras = self._compiled_lora(unet_params, loras, lora_scales), {}
        inputs = Inputs(
            params=(unet_params, [net.params for net in self.controlnets]),
            loras=loras,
            lora_scales=lora_scales,
            conditions=conditions,
            scales=scales,
            guidance_rescale=np.float32(guidance_rescale),
            control_scales=_one_or_each(control_scales, len(self.controlnets), "control_scales"),
            blend=blend,
            keys=_keys(range(count) if seeds is None else seeds),
            grid=grid,
            eta=np.float32(eta),
            table=table,
        )

        if denoising_start is not None:
            x = latents
        elif start is None or (blend is not None and strength == 1):
            x = latents if grid.init_scale == 1 else latents * grid.init_scale
        else:
            x = grid.alpha[first] * start.latents + grid.sigma[first] * latents
        history = tuple(jnp.zeros_like(x) for _ in range(samplers.SAMPLERS[name].remembers))
        dtype = unet_params["conv_in.weight"].dtype
        history += no_features(self.unet.config, ways[0].branch, dtype, x.shape, len(conditions))

        def advance(x, history, begin, end):
            return self._compiled_denoise(
                inputs,
                x,
                history,
                np.int32(begin),
                np.int32(end),
                schedule=self.schedule.for_run(),
                sampler=name,
                ways=ways,
                unet=self.unet,
                nets=tuple(component.net for component in self.controlnets),
                split=self.rows,
            )

        if callback is None:
            return advance(x, history, first, stop)[0]
        for i in range(first, stop):  # the same program, a step at a time
            x, history = advance(x, history, i, i + 1)
            callback(i, float(grid.t[i]), x)
        return x

    def check_shortcuts(self, wanted: Shortcuts, sampler: str) -> None:
        """JaxsdError where a shortcut cannot be taken by this model with this sampler."""
        check_shortcuts(
            wanted,
            self.unet,
            self.schedule,
            sampler,
            len(self.controlnets),
            self.guidance_embedded,
        )

    def taught_scales(self, scales: np.ndarray) -> np.ndarray:
        """The guidance scales, but those beyond what a student was taught as the nearest it knows.

        With a `GuidanceClipped` warning.
        """
        if not self.guidance_embedded:
            return scales
        return denoising.within_range(self.unet.config, scales)

    def predict(
        self,
        latents: jax.Array,
        t: float,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        guidance_scale: float | Sequence[float] | None = None,
    ) -> jax.Array:
        """What the UNet says of noisy latents [n, h, w, c] at time t, guidance inside; one step's.

        It is of the schedule's prediction type. For loops of one's own: `denoise` is one program.
        """
        conditions, scales = self._chain(cond, uncond, guidance_scale, len(latents))
        lora_scales = _one_or_each(self.lora_scales, len(self.loras), "lora_scales")
        params, loras = self.params["unet"], self._live["unet"]
        return self._compiled_predict(
            params,
            loras,
            lora_scales,
            conditions,
            scales,
            latents,
            np.float32(t),
            unet=self.unet,
            split=self.rows,
        )

    def _chain(
        self,
        cond: Conditioning,
        uncond: Conditioning | None,
        guidance_scale: float | Sequence[float] | None,
        count: int,
        image_cond: Conditioning | None = None,
        image_guidance_scale: float = 1.5,
    ) -> tuple[list[Conditioning], np.ndarray]:
        """The conditions and scales of `diffusion.denoise.guided`."""
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        scales = _one_or_each(scale, count, "guidance_scale")
        if self.guidance_embedded:
            scales = self.taught_scales(scales)
            cond = denoising.told_scale(self.unet.config, cond, uncond, scales)
        return denoising.chain(cond, uncond, scales, image_cond, image_guidance_scale)

    def plan_steps(
        self,
        sampler: str,
        steps: int,
        strength: float = 1.0,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
    ) -> tuple[samplers.Steps, int]:
        """The grid, which says where to start, and the step to stop before.

        With lcm or tcd a model that is told the guidance takes all its steps on the part of the
        schedule that `strength` leaves, any other the last of them: as diffusers' pipelines do.
        JaxsdError for what cannot be.
        """
        whole = sampler in ("lcm", "tcd") and not self.guidance_embedded
        share = 1.0 if whole else strength
        grid = samplers.make_steps(self.schedule, sampler, steps, strength=share)
        if whole:
            count = int(grid.count)
            grid = grid._replace(first=np.int32(count - min(int(count * strength), count)))
        train = self.schedule.num_train_timesteps
        first, stop = denoising.part(grid, train, denoising_start, denoising_end)
        return grid._replace(first=np.int32(first)), stop

    def decode(self, latents: jax.Array) -> list[Image.Image]:
        """PIL images from latents (from pixels in [-1, 1], for a pixel model)."""
        return [pictures.to_pil(picture) for picture in self.decode_array(latents)]

    def decode_array(self, latents: jax.Array) -> np.ndarray:
        """As `decode`, but a uint8 array [n, h, w, c]."""
        return pictures.to_uint8(self.decode_pixels(latents))

    def decode_pixels(self, latents: jax.Array) -> np.ndarray:
        """What `decode_array` clips to [-1, 1] and rounds: float32 [n, h, w, c]."""
        return np.asarray(self.start_decoding(latents))

    def start_decoding(self, latents: jax.Array) -> jax.Array | np.ndarray:
        """As `decode_pixels`, but of an array that need not be there yet, except with tiles."""
        params = self.params["vae"] if self.vae else {}

        def decode(part: Any) -> Any:
            return self._compiled_decode(params, part, vae=self.vae, split=self.rows)

        if self.vae is None or not self.vae_tile:
            return decode(latents)
        return tiled(decode, np.asarray(latents), self.vae_tile, self._downscale)


def _keys(seeds: Sequence[int]) -> jax.Array:
    if not len(seeds):
        raise JaxsdError("give at least one seed: there is an image for each")
    if any(not 0 <= seed < SEEDS for seed in seeds):
        raise JaxsdError(f"seeds must be from 0 to {SEEDS - 1}")
    return _compiled_keys(np.asarray(seeds, np.uint32))


# As one program: op by op, there would be one for each
_compiled_keys = jax.jit(jax.vmap(jax.random.key))


def _one_or_each(values: float | Sequence[float], count: int, name: str) -> np.ndarray:
    array = np.asarray(values, np.float32)
    if array.shape not in ((), (1,), (count,)):
        raise JaxsdError(f"{name}: {array.size} values for {count}: give one, or one for each")
    if not np.isfinite(array).all():
        raise JaxsdError(f"{name} must be finite, not {values}")
    return np.broadcast_to(array, count)
