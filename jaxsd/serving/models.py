"""A pipeline as it is served: what may be asked of it, and one batch size for all."""

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxsd import tasks
from jaxsd.conditioning import class_labels
from jaxsd.denoising import NO_UNCOND
from jaxsd.diffusion.samplers import SAMPLERS, get_sampler
from jaxsd.errors import JaxsdError
from jaxsd.pictures import read, to_uint8
from jaxsd.pipeline import Pipeline
from jaxsd.previews import previewer
from jaxsd.seeds import SEEDS
from jaxsd.serving.batching import Watch
from jaxsd.serving.limits import Limits, Refused
from jaxsd.shortcuts import Shortcuts

MOST_AT_A_TIME = 8  # one alone waits for the whole batch
MOST_GUIDANCE = 100.0
FEW = 4  # steps: as many as every sampler makes


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture, with nothing left open; `Served.request` makes it.

    image, mask: as large as the picture is to be. strength: None without an image.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int
    guidance_scale: float
    sampler: str
    width: int
    height: int
    image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float | None = None


class Served:
    """A model under its name, with the sizes (width, height) in which it draws.

    batch_size: how many pictures every run makes, wanted or not; by default up to 8. preview_with:
    as `previews.previewer` has it.
    """

    def __init__(
        self,
        name: str,
        pipe: Pipeline,
        limits: Limits = Limits(),  # noqa: B008
        *,
        sizes: Sequence[tuple[int, int]] = (),
        batch_size: int | None = None,
        shortcuts: Shortcuts = Shortcuts(),  # noqa: B008
        preview_with: str = "vae",
    ):
        self.name, self.pipe, self.limits, self.shortcuts = name, pipe, limits, shortcuts
        height, width = pipe.default_size
        self.sizes = tuple(sizes) or ((width, height),)
        for width, height in self.sizes:
            pipe.noise([0], height, width)  # refuses a size that cannot be
        width, height = self.sizes[0]
        self.batch_size = batch_size or min(MOST_AT_A_TIME, pipe.default_batch_size(height, width))
        pipe.check_shortcuts(shortcuts, pipe.default_sampler)
        self.preview = previewer(pipe, preview_with)
        self.samplers = [sampler for sampler in SAMPLERS if self._can_sample(sampler)]

    def _can_sample(self, sampler: str) -> bool:
        try:
            self.pipe.plan_steps(sampler, max(FEW, self.pipe.default_steps))
        except JaxsdError:
            return False
        return True

    @property
    def takes_negative_prompts(self) -> bool:
        return self.pipe.takes_prompts and not self.pipe.guidance_embedded

    @property
    def takes_strength(self) -> bool:
        """Whether a picture is where sampling starts from, not what the UNet is shown."""
        return self.pipe.unet.config.in_channels != 2 * self.pipe.latent_channels

    def request(
        self,
        prompt: str = "",
        *,
        seed: int = 0,
        negative_prompt: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        size: tuple[int, int] | None = None,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        strength: float | None = None,
    ) -> Request:
        """What is asked for, with the model's defaults where nothing is; Refused if it cannot be.

        size: (width, height). Everything is looked at here, so that no batch fails for one of it.
        """
        pipe = self.pipe
        steps = pipe.default_steps if steps is None else steps
        scale = pipe.default_guidance_scale if guidance_scale is None else guidance_scale
        sampler = sampler or pipe.default_sampler
        negative_prompt = negative_prompt or None
        size = size or self.sizes[0]

        self._check_words(prompt, negative_prompt)
        if not 0 <= seed < SEEDS:
            raise Refused(f"seed must be from 0 to {SEEDS - 1}, not {seed}", "seed")
        if not 1 <= steps <= self.limits.steps:
            raise Refused(f"steps must be from 1 to {self.limits.steps}, not {steps}", "steps")
        self._check_scale(scale)
        if size not in self.sizes:
            known = ", ".join(f"{width}x{height}" for width, height in self.sizes)
            raise Refused(f"{self.name} draws {known} here, not {size[0]}x{size[1]}", "size")
        image, mask = self._fitting(image, size), self._fitting(mask, size, mask=True)
        given = tasks.Given(image, mask, strength)
        for param, check in {
            "sampler": lambda: get_sampler(sampler),
            "image": lambda: tasks.check(pipe, given),
            "steps": lambda: pipe.plan_steps(sampler, steps, given.share),
        }.items():
            try:
                check()
            except JaxsdError as error:
                raise Refused(str(error), param) from None
        return Request(
            prompt,
            negative_prompt,
            seed,
            steps,
            float(scale),
            sampler,
            *size,
            image,
            mask,
            given.share if image is not None and self.takes_strength else None,
        )

    def _fitting(
        self, picture: Image.Image | None, size: tuple[int, int], mask: bool = False
    ) -> Image.Image | None:
        """What the pipeline would make of it, now: a queue of large pictures fills the memory."""
        if picture is None:
            return None
        grey = mask or (self.pipe.vae is None and self.pipe.latent_channels == 1)
        return read(picture).convert("L" if grey else "RGB").resize(size, Image.Resampling.LANCZOS)

    def _check_words(self, prompt: str, negative_prompt: str | None) -> None:
        if self.pipe.takes_prompts and not prompt.strip():
            raise Refused('give a prompt, such as "a red seven on a white background"', "prompt")
        if negative_prompt and self.pipe.guidance_embedded:
            raise Refused(NO_UNCOND, "negative_prompt")
        for param, text in {"prompt": prompt, "negative_prompt": negative_prompt}.items():
            if not text:
                continue
            if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise Refused(f"{param} is not Unicode text", param)
            if len(text) > (most := self.limits.prompt_length):
                raise Refused(f"{param} has {len(text)} characters; {most} are the most", param)
            if not self.pipe.tokenizers:
                try:
                    class_labels(self.pipe.unet.config, [text])
                except JaxsdError as error:
                    raise Refused(str(error), param) from None
            elif self.pipe.chunks([text]) > 1:
                raise Refused(f"{param} is longer than the model's text tower reads: shorten it",
                              param)  # fmt: skip

    def _check_scale(self, scale: float) -> None:
        if not (math.isfinite(scale) and 0 <= scale <= MOST_GUIDANCE):
            raise Refused(f"guidance_scale must be from 0 to {MOST_GUIDANCE:g}, not {scale:g}",
                          "guidance_scale")  # fmt: skip
        taught = self.pipe.unet.config.guidance_range if self.pipe.guidance_embedded else None
        if taught is not None and not taught[0] <= scale <= taught[1]:
            raise Refused(f"{self.name} was distilled for guidance scales from {taught[0]:g} to "
                          f"{taught[1]:g}, not {scale:g}", "guidance_scale")  # fmt: skip

    # --- What the worker calls ---

    def kind(self, request: Request) -> Hashable:
        """Prompts, seeds, pictures and guidance scales differ within a batch; these do not.

        The grid of steps is one for all rows. Guidance of 1 or less is another program, with half
        the work, and not the same bits as the one with two halves would give.
        """
        return (
            request.sampler,
            request.steps,
            request.strength,
            request.width,
            request.height,
            request.image is None,
            request.mask is None,
            request.guidance_scale > 1 or self.pipe.guidance_embedded,
        )

    def frames_at(self, request: Request) -> list[int]:
        """Evenly spread over the steps, the last left out: that is the picture."""
        share = request.strength or 1.0
        grid, stop = self.pipe.plan_steps(request.sampler, request.steps, share)
        first = int(grid.first)
        count = min(self.limits.frames, stop - first - 1)
        return [first + (stop - first) * k // (count + 1) - 1 for k in range(1, count + 1)]

    def draw(self, requests: Sequence[Request], watch: Watch | None = None) -> np.ndarray:
        """uint8 [n, h, w, c]: of a batch that has its full size, filled up with the same again."""
        full = (list(requests) * self.batch_size)[: self.batch_size]
        alike = full[0]
        pixels = self.pipe.start(
            [request.prompt for request in full],
            [request.seed for request in full],
            alike.steps,
            [request.guidance_scale for request in full],
            [request.negative_prompt for request in full],
            sampler=alike.sampler,
            height=alike.height,
            width=alike.width,
            image=_each(full, "image"),
            mask=_each(full, "mask"),
            strength=alike.strength,
            shortcuts=self.shortcuts,
            callback=watch,
        )
        return to_uint8(np.asarray(pixels)[: len(requests)])

    def warm_up(self, pictures: bool = True) -> None:
        """Compiles what the default sampler needs, for each size; pictures: for these, too."""

        def look(i: int, t: float, latents: Any) -> None:
            self.preview(latents)

        for size in self.sizes:
            for request in self._examples(size, pictures):
                self.draw([request], look)

    def _examples(self, size: tuple[int, int], pictures: bool) -> list[Request]:
        blank = functools.partial(Image.new, "RGB", size)
        forms: list[dict[str, Any]] = [{}]
        if pictures:
            forms += [{"image": blank()}, {"image": blank(), "mask": blank("white")}]
        found, prompt = [], "0" if self.pipe.takes_prompts else ""
        for form in forms:
            try:
                found.append(self.request(prompt, steps=FEW, size=size, **form))
            except JaxsdError:  # not what this model does, with pictures or without
                continue
        return found


def _each(requests: Sequence[Request], name: str) -> list[Image.Image] | None:
    values = [getattr(request, name) for request in requests]
    return None if values[0] is None else values
