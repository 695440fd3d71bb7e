"""What pictures add to a request: image-to-image, inpainting, InstructPix2Pix, ControlNet.

Which of them a picture means is told by the channels that the UNet takes besides the latents': none
(image-to-image; with a mask, inpainting by putting the rest back after each step), a picture's
(InstructPix2Pix), or a mask's and a picture's (inpainting models).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import pictures
from jaxsd.denoising import Start
from jaxsd.diffusion.denoise import Conditioning
from jaxsd.errors import JaxsdError
from jaxsd.networks import Networks
from jaxsd.pictures import Pictures


class Plan(NamedTuple):
    """The conditions of one request, in the order of guidance, and where it starts."""

    cond: Conditioning
    uncond: Conditioning
    image_cond: Conditioning | None = None  # InstructPix2Pix: the picture without the prompt
    start: Start | None = None


@dataclasses.dataclass(frozen=True)
class Given:
    """The pictures of a request.

    image: what to start from, or to edit. strength: how far to leave it, in (0, 1]; by default .8,
    and 1 with a mask. mask: light where it is to be painted anew. control: one (or one for each
    image) for every ControlNet. noise: what images begin with. taken_over: whether they begin with
    another model's latents instead.
    """

    image: Pictures | None = None
    mask: Pictures | None = None
    strength: float | None = None
    control: Sequence[Pictures] = ()
    noise: jax.Array | None = None
    taken_over: bool = False

    @property
    def share(self) -> float:
        """Of the steps, what is taken: the strength, where sampling starts from a picture."""
        if self.image is None or self.taken_over:
            return 1.0
        return self.strength or (0.8 if self.mask is None else 1.0)


def plan(
    pipe: Networks,
    cond: Conditioning,
    uncond: Conditioning,
    given: Given,
    count: int,
    size: tuple[int, int],
) -> Plan:
    """Adds to the conditions of `count` images of `size` (height, width) what the pictures say."""
    extra = check(pipe, given)
    if given.control:
        # In [0, 1], as ControlNets were trained
        arrays = [_arrays(pictures, count, size) / 2 + 0.5 for pictures in given.control]
        control = tuple(jnp.asarray(_repeat(array, count)) for array in arrays)
        cond, uncond = cond | {"control": control}, uncond | {"control": control}
    if given.image is None or (given.taken_over and given.mask is None and not extra):
        return Plan(cond, uncond)

    latent = pipe.latent_channels
    image = _arrays(given.image, count, size, latent if pipe.vae is None else 3)
    if extra == latent:
        concat = _repeat(pipe.encode_pictures(image, scaled=False), count)
        nothing = uncond | {"concat": jnp.zeros_like(concat)}
        return Plan(cond | {"concat": concat}, nothing, uncond | {"concat": concat})
    clean = _repeat(pipe.encode_pictures(image), count)
    if given.mask is None:
        return Plan(cond, uncond, start=Start(clean, given.share))
    masks = [pictures.to_mask(one, *size) for one in pictures.one_or_each(given.mask, count)]
    mask = np.stack(masks)
    small = _repeat(jnp.asarray(_nearest(mask, clean.shape[1:3])), count)
    if extra == 0:
        return Plan(cond, uncond, start=Start(clean, given.share, small, given.noise))
    hidden = _repeat(pipe.encode_pictures(image * (mask < 0.5)), count)
    concat = jnp.concatenate([small, hidden], -1)
    return Plan(
        cond | {"concat": concat},
        uncond | {"concat": concat},
        # Pure noise at strength 1; the UNet itself keeps what is not masked.
        start=Start(clean, given.share) if given.share < 1 else None,
    )


def check(pipe: Networks, given: Given) -> int:
    """The channels that the UNet takes beside latents; JaxsdError for pictures it cannot use."""
    latent = pipe.latent_channels
    extra = pipe.unet.config.in_channels - latent
    if len(given.control) != len(pipe.controlnets):
        raise JaxsdError(
            f"{len(given.control)} control pictures for {len(pipe.controlnets)} ControlNets: give "
            "one for each"
        )
    if extra not in (0, latent, latent + 1):
        raise JaxsdError(f"this UNet takes {extra} channels more than latents: not a known task")
    needed = {"a picture": extra > 0 and given.image is None}
    needed["a mask"] = extra == latent + 1 and given.mask is None
    if missing := [name for name, lacks in needed.items() if lacks]:
        raise JaxsdError(f"this model edits pictures: give it {' and '.join(missing)}")
    if given.mask is not None and given.image is None:
        raise JaxsdError("a mask says where a picture may change: give the picture, too")
    if given.mask is not None and extra == latent:
        raise JaxsdError("InstructPix2Pix edits the whole picture: leave out the mask")
    if given.strength is not None:
        if given.image is None or extra == latent:
            raise JaxsdError("strength says how far to leave a picture that sampling starts from")
        if not 0 < given.strength <= 1:
            raise JaxsdError(f"strength must be above 0 and at most 1, not {given.strength}")
    if given.image is not None and pipe.vae is None and latent not in (1, 3):
        raise JaxsdError(f"this model's pictures have {latent} channels, and none can be read so")
    return extra


def _arrays(given: Pictures, count: int, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """[1, h, w, c] of one picture for all images, [count, h, w, c] of one for each."""
    several = pictures.one_or_each(given, count)
    return np.stack([pictures.to_model(one, *size, channels) for one in several])


def _repeat(array: Any, count: int) -> Any:
    """One row for each image; encoded once where they share a picture."""
    return jnp.broadcast_to(array, (count, *array.shape[1:]))


def _nearest(mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Nearest-neighbour resizing by torch's rule, floor(i * in / out)."""
    rows, columns = (
        np.arange(out) * n // out for out, n in zip(size, mask.shape[1:3], strict=True)
    )
    return mask[:, rows][:, :, columns]
