"""What the latents look like on the way, without the VAE's cost: TAESD, or a linear map."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import kernels
from jaxsd.components import load_component
from jaxsd.errors import JaxsdError
from jaxsd.networks import Networks
from jaxsd.pictures import to_uint8

Preview = Callable[[jax.Array], np.ndarray]


def previewer(pipe: Networks, how: str) -> Preview:
    """A function from latents [n, h, w, c] to uint8 pictures [n, H, W, 3].

    how: "vae" (the model's own decoder), "linear" (one pixel a latent), or the folder of a TAESD
    (a decoder a twentieth as large, Bohan 2023). JaxsdError if it does not suit the latents.
    """
    if how == "vae":
        return pipe.decode_array
    if pipe.vae is None:
        raise JaxsdError(f"a pixel model's latents are pictures: leave out {how!r}")
    if how == "linear":
        return linear(pipe)
    return tiny(pipe, Path(how))


def linear(pipe: Networks, seed: int = 0) -> Preview:
    """The linear map from a latent to the mean of the pixels it becomes, by least squares.

    Fitted to what the model's own decoder makes of smooth random latents, so it suits any VAE.
    """
    assert pipe.vae is not None
    channels, downscale = pipe.vae.config.latent_channels, pipe.vae.config.downscale
    rng = np.random.default_rng(seed)
    # Patches of one colour: at a patch's edge a pixel depends on the neighbours as well.
    patches = rng.standard_normal((64, 2, 2, channels)).astype(np.float32)
    latents = patches.repeat(4, 1).repeat(4, 2)  # 8x8
    with pipe.programs.tracing():  # of no request's shape
        pixels = pipe.decode_array(jnp.asarray(latents)) / np.float32(127.5) - 1
    n, h, w, _ = pixels.shape
    pooled = pixels.reshape(n, h // downscale, downscale, w // downscale, downscale, -1).mean(
        (2, 4)
    )
    rows = np.append(latents.reshape(-1, channels), np.ones((latents.size // channels, 1)), 1)
    matrix = np.linalg.lstsq(rows, pooled.reshape(len(rows), -1), rcond=None)[0]

    def preview(latents: jax.Array) -> np.ndarray:
        return to_uint8(np.asarray(latents) @ matrix[:-1] + matrix[-1])

    return preview


def tiny(pipe: Networks, folder: Path) -> Preview:
    """The decoder of an `AutoencoderTiny` folder."""
    assert pipe.vae is not None
    component = load_component(folder, np.float32, kind="vae")
    wanted = pipe.vae.config.latent_channels
    if getattr(component.net.config, "latent_channels", None) != wanted:
        raise JaxsdError(f"{folder} is no VAE for latents of {wanted} channels")
    decode = kernels.jit(lambda params, x: component.net(params, x, method="decode"))

    def preview(latents: jax.Array) -> np.ndarray:
        scale = component.net.config.scaling_factor
        return to_uint8(np.asarray(decode(component.params, latents / scale)))

    return preview
