"""A loaded model: prompts in, pictures out, and every step between open to the caller.

pipe = jaxsd.load("digits")
images = pipe(["a red seven on a white background"], seeds=[0], steps=30)
"""

import dataclasses
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxsd import pictures, tasks
from jaxsd.components import Component, Parts, load_component, load_parts, make_index, save_parts
from jaxsd.conditioning import Sizes
from jaxsd.denoising import NO_UNCOND
from jaxsd.diffusion.denoise import Conditioning
from jaxsd.errors import JaxsdError
from jaxsd.families import size_unit
from jaxsd.hub import find
from jaxsd.networks import Callback, Networks
from jaxsd.pictures import Picture, Pictures
from jaxsd.shortcuts import Shortcuts

# The options of a request that concern a refiner, too.
HANDED_OVER = ("sampler", "eta", "guidance_rescale", "chunks", "sizes", "shortcuts", "callback")


class Pipeline(Networks):
    """A model that makes pictures from prompts (latent) or from class names (pixel space)."""

    def __call__(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        *,
        refiner: "Pipeline | None" = None,
        refiner_start: float = 0.8,
        **options: Any,
    ) -> list[Image.Image]:
        """PIL images, one for each seed: `sample`, which tells the other options, and `decode`.

        refiner, refiner_start: see `start`.
        """
        options |= {"refiner": refiner, "refiner_start": refiner_start}
        started = self.start(prompts, seeds, steps, guidance_scale, negative_prompt, **options)
        return [pictures.to_pil(picture) for picture in pictures.to_uint8(np.asarray(started))]

    def start(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        *,
        refiner: "Pipeline | None" = None,
        refiner_start: float = 0.8,
        **options: Any,
    ) -> jax.Array | np.ndarray:
        """What a call rounds to pictures (`pictures.to_uint8`): float32 [n, h, w, c].

        It returns when all is under way: jax computes while the caller does something else, until
        it looks at the array.

        refiner: a second model (Stable Diffusion XL's refiner) that takes the latents over at the
        share `refiner_start` of the schedule. It hears of prompts, guidance and sizes, not of
        ControlNets, LoRAs, or a picture to start from; a mask holds in both.
        """
        request = dict(
            prompts=prompts,
            seeds=seeds,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
        )
        if refiner is None:
            return self.start_decoding(self.sample(**request, **options))
        kept = {name: options[name] for name in HANDED_OVER if name in options}
        if options.get("mask") is not None:
            kept |= {"image": options["image"], "mask": options["mask"]}
        name = options.get("sampler") or refiner.default_sampler
        steps = request["steps"] = self.default_steps if steps is None else steps
        refiner.plan_steps(name, steps, denoising_start=refiner_start)  # refused before any work
        refiner.check_shortcuts(options.get("shortcuts", Shortcuts()), name)
        half = self.sample(**request, **options, denoising_end=refiner_start)
        latents = refiner.sample(**request, **kept, latents=half, denoising_start=refiner_start)
        return refiner.start_decoding(latents)

    def sample(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        *,
        cond: Conditioning | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        clip_skip: int = 0,
        chunks: int | None = 1,
        height: int | None = None,
        width: int | None = None,
        image: Pictures | None = None,
        strength: float | None = None,
        mask: Pictures | None = None,
        image_guidance_scale: float = 1.5,
        control_images: Pictures | Sequence[Pictures] = (),
        control_scales: float | Sequence[float] = 1.0,
        latents: jax.Array | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        sizes: Sizes | None = None,
        shortcuts: Shortcuts = Shortcuts(),  # noqa: B008
        callback: Callback | None = None,
    ) -> jax.Array:
        """Clean latents [n, h, w, c], one for each seed.

        prompts: one for all seeds, or one for each; "(word:1.3)" weighs a word. A pixel model takes
        the names of its classes ("7" or "seven"). chunks: how many times the text tower's length is
        read of each prompt; what is longer is cut with a warning. None: as often as the longest
        prompt of the call needs. steps: by default 30, or what a student is made for.
        cond: what the UNet is told in place of the prompts, such as `encode` gives: one row for all
        images, or one for each.
        guidance_scale: one, or one for each image; 1 follows the prompt as trained (at half the
        cost), more follows it harder; by default 7.5, or what a student is made for.

        image: what to start from, or what an InstructPix2Pix model edits. strength: how far to
        leave it, in (0, 1], by default .8, or 1 with a mask. mask: light where the picture is to be
        painted anew. image_guidance_scale: how closely InstructPix2Pix follows the picture.
        control_images, control_scales: one for each ControlNet. Pictures, like prompts, are one for
        all seeds or one for each.

        latents, denoising_start, denoising_end: a refiner takes another model's latents over, at
        the share of the schedule where that one ended. sizes: what Stable Diffusion XL is told.
        shortcuts: `jaxsd.Shortcuts`, what to leave out to be faster, at some loss.
        callback(i, t, latents) sees the latents after step i, which began at time t.

        Each image depends on its own seed, not on its neighbours. JaxsdError for arguments that
        cannot be.
        """
        seeds = [int(seeds)] if np.ndim(seeds) == 0 else list(seeds)  # pyright: ignore
        count, name = len(seeds), sampler or self.default_sampler
        texts = _one_each(prompts, count, "prompts")
        negative = _one_each(negative_prompt, count, "negative prompts")
        control = self._control(control_images, count)
        given = tasks.Given(image, mask, strength, control, taken_over=latents is not None)
        size = self._size(height, width, image, control, latents)
        # First what can be refused at once
        noise = self.noise(seeds, *size)
        tasks.check(self, given)
        steps = self.default_steps if steps is None else steps
        self.plan_steps(name, steps, given.share, denoising_start, denoising_end)
        self.check_shortcuts(shortcuts, name)
        if latents is not None and latents.shape != noise.shape:
            raise JaxsdError(f"latents are {list(latents.shape)}, not {list(noise.shape)}")
        if self.guidance_embedded and any(negative):
            raise JaxsdError(NO_UNCOND)
        chunks = self.chunks([*texts, *negative]) if chunks is None else chunks
        # Its text is read to the last layer, as in diffusers
        uncond = self.encode(negative, 0, chunks, self.size_ids(size, sizes, negative=True))
        size_ids = self.size_ids(size, sizes)
        if cond is None:
            cond = self.encode(texts, clip_skip, chunks, size_ids)
        else:
            cond = _rows_like(uncond, cond, size_ids)
        plan = tasks.plan(
            self,
            cond,
            uncond,
            dataclasses.replace(given, noise=noise),
            count,
            size,
        )
        return self.denoise(
            noise if latents is None else latents,
            plan.cond,
            None if self.guidance_embedded else plan.uncond,
            image_cond=plan.image_cond,
            start=plan.start,
            steps=steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            guidance_rescale=guidance_rescale,
            control_scales=control_scales,
            sampler=name,
            eta=eta,
            seeds=seeds,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
            shortcuts=shortcuts,
            callback=callback,
        )

    def _control(self, given: Any, count: int) -> list[Pictures]:
        """A picture, or one for each image, for every ControlNet."""
        if isinstance(given, Picture):
            return [given]
        several = list(given)
        return [several] if len(self.controlnets) == 1 and len(several) == count > 1 else several

    def _size(
        self,
        height: int | None,
        width: int | None,
        image: Pictures | None,
        control: Sequence[Pictures],
        latents: jax.Array | None,
    ) -> tuple[int, int]:
        """(height, width): as asked for; else of the picture's shape and the model's area."""
        if latents is not None and height is None and width is None:
            return latents.shape[1] * self._downscale, latents.shape[2] * self._downscale
        default = self.default_size
        shown = next(iter(control), None) if image is None else image
        if shown is None or (height is not None and width is not None):
            return default[0] if height is None else height, default[1] if width is None else width
        first = shown if isinstance(shown, Picture) else next(iter(shown), None)
        if first is None:
            raise JaxsdError("no pictures were given: leave the argument out")
        unit = size_unit(self.unet.config, self._downscale)
        area = default[0] * default[1]
        return pictures.fitting_size(first, area, unit, height, width)

    # --- Files ---

    def save(self, folder: str | PurePath, dtype: Any = None) -> None:
        """Writes a folder that diffusers opens; what stood there under the same names is replaced.

        LoRAs are not part of it, unless they were merged. The folder appears whole: until the last
        file is written it has another name. dtype: float32, float16 or bfloat16, by default each
        array's own; or int8, a quarter of float32's size, which jaxsd alone opens.
        """
        if self.quantised:
            raise JaxsdError("what computes in eight bits cannot be saved: save before quantize(), "
                             "with dtype int8 for small files")  # fmt: skip
        configs = {name: component.net.config for name, component in self.components.items()}
        index = make_index(configs, self.schedule)
        if "force_zeros_for_empty_prompt" in index:
            index["force_zeros_for_empty_prompt"] = self.zero_empty_prompt
        save_parts(Parts(self.components, self.schedule, self.tokenizers, index), folder, dtype)


def _rows_like(
    uncond: Conditioning, cond: Conditioning, size_ids: Sequence[float] | None
) -> Conditioning:
    """What a caller has the UNet told, a row for each image, with the picture's own sizes."""
    if size_ids is not None:
        cond = cond | {"time_ids": jnp.asarray([size_ids], jnp.float32)}
    found = {name: list(value.shape) for name, value in cond.items()}
    wanted = {name: list(value.shape) for name, value in uncond.items()}
    if found.keys() != wanted.keys() or any(
        shape[0] not in (1, wanted[n][0]) or shape[1:] != wanted[n][1:]
        for n, shape in found.items()
    ):
        raise JaxsdError(f"cond is {found}, and must be {wanted}, or one row of it")
    return {name: jnp.broadcast_to(value, wanted[name]) for name, value in cond.items()}


def _one_each(text: str | Sequence[str | None] | None, count: int, name: str) -> list[Any]:
    texts = [text] * count if text is None or isinstance(text, str) else list(text)
    if len(texts) == 1:
        texts = texts * count
    if len(texts) != count:
        raise JaxsdError(f"{len(texts)} {name} for {count} seeds: give one, or one for each seed")
    return texts


def load(
    model: str | PurePath,
    dtype: Any = jnp.float32,
    variant: str | None = None,
    *,
    controlnets: Sequence[str | PurePath] = (),
    compiled: str | PurePath | None = None,
    quantize: str | None = None,
    **options: Any,
) -> Pipeline:
    """Opens a model: one that ships, a diffusers folder, a single file, or a Hub id ("owner/name").

    dtype: of the weights and of the computation; None keeps each file's own. variant: "fp16", say:
    which of several files to read, in the components that have it. controlnets: folders or Hub ids.
    compiled: a folder that `jaxsd compile` made of this model; nothing is traced then, and what is
    not in it is refused.
    quantize: "int8" or "fp8": the UNet's weights in eight bits (`Pipeline.quantize`).
    options: `family`, `config`, `tokenizer`, `use_ema` and `sharding`, as `components.load_parts`
    tells. JaxsdError says what is missing or wrong.
    """
    parts = load_parts(model, dtype, variant, **options)
    folders = [find(name, variant) for name in controlnets]
    nets = [load_component(folder, dtype, variant, kind="controlnet") for folder in folders]
    pipe = of_parts(parts, nets)
    if quantize is not None:
        pipe.quantize(quantize)
    if compiled is not None:
        pipe.programs.read(compiled, pipe.compiled_for)
    return pipe


def of_parts(parts: Parts, controlnets: Sequence[Component] = ()) -> Pipeline:
    """The pipeline of a model that was read."""
    everything: dict[str, Any] = {**parts.components, **parts.tokenizers}
    xl = str(parts.index.get("_class_name")).startswith("StableDiffusionXL")
    return Pipeline(
        schedule=parts.schedule,
        controlnets=controlnets,
        zero_empty_prompt=bool(parts.index.get("force_zeros_for_empty_prompt", xl)),
        **everything,
    )
