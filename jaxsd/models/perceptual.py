"""LPIPS (Zhang et al. 2018): how different two pictures look, by the features of VGG16.

Names as torchvision gives them to VGG16 (Simonyan & Zisserman 2015) and lpips to the weights that
were fitted to people's judgements. Nothing here is trained; `jaxsd.weights.lpips` reads them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsd.nn import Conv2d

CHANNELS = (64, 128, 256, 512, 512)  # of VGG16's stages; each ends before its pooling
LAYERS = (2, 2, 3, 3, 3)
SMALLEST = 16  # pixels along a side: four poolings must leave one
# From [-1, 1] to what VGG16 was trained on, ImageNet's statistics rounded as lpips has them
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Head(nnx.Module):
    """[b, h, w, c] -> [b, h, w, 1], a weight for each channel."""

    def __init__(self, channels: int):
        self.model = nnx.Dict({"1": Conv2d(channels, 1, 1, bias=False)})  # 0 is a dropout

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 1"]:
        return self.model["1"](x)


class LPIPS(nnx.Module):
    """Pictures are [b, h, w, 3] in [-1, 1], at least 16 pixels high and wide."""

    def __init__(self, channels: Sequence[int] = CHANNELS):
        convolutions, inputs, place = {}, 3, 0
        self.stages: tuple[tuple[str, ...], ...] = ()
        for layers, outputs in zip(LAYERS, channels, strict=True):
            names = tuple(str(place + 2 * i) for i in range(layers))  # ReLUs take numbers as well
            for name in names:
                convolutions[name] = Conv2d(inputs, outputs, 3, padding=1)
                inputs = outputs
            self.stages += (names,)
            place += 2 * layers + 1  # and so does the pooling
        self.features = nnx.Dict(convolutions)
        for i, count in enumerate(channels):
            setattr(self, f"lin{i}", Head(count))

    def stage_features(self, pictures: Float[Array, "b h w 3"]) -> list[jax.Array]:
        """What each stage ends with, its vector at each place of unit length."""
        shift, scale = (jnp.asarray(v, pictures.dtype)[None, None, None] for v in (SHIFT, SCALE))
        x, features = (pictures - shift) / scale, []
        for i, names in enumerate(self.stages):
            x = _max_pool(x) if i else x
            for name in names:
                x = jax.nn.relu(self.features[name](x))
            features.append(_unit(x.astype(jnp.float32)))
        return features

    def __call__(
        self, pictures: Float[Array, "b h w 3"], others: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        """The distance of each pair: zero for equal ones, about 0.5 for unlike ones."""
        distance = jnp.zeros(len(pictures))
        pairs = zip(self.stage_features(pictures), self.stage_features(others), strict=True)
        for i, (a, b) in enumerate(pairs):
            distance += getattr(self, f"lin{i}")(jnp.square(a - b)).mean((1, 2, 3))
        return distance


def _unit(x: jax.Array) -> jax.Array:
    square = jnp.square(x).sum(-1, keepdims=True)
    # sqrt has no slope at zero, and all features of a place may be zero
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (length + 1e-10)


def _max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2x2; what is left over at the edges is dropped."""
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
