"""Inception-v3 (Szegedy et al. 2015, arXiv:1512.00567) as the FID wants it: features of pictures.

The network of Heusel et al. 2017 (arXiv:1706.08500), which is TensorFlow's of 2015-12-05, under the
names of torchvision's `inception_v3` and pytorch-fid's weights. It differs from torchvision's in
the pooling branches: averages leave the padding out of the count, and the last block takes maxima.
Distances are comparable with published ones only with these very weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxsd.nn import BatchNorm2d, Conv2d

SIZE = 299  # pixels a side, to which pictures are resized
FEATURES = 2048
# The classifier on top, which the file of weights holds and no feature needs.
CLASSIFIER = {"fc.weight": (1008, FEATURES), "fc.bias": (1008,)}

Kernel = int | tuple[int, int]
Maps = jax.Array  # [b, h, w, c]


class ConvBN(nnx.Module):
    """Convolution, batch norm, ReLU. Padded to keep the size, unless it strides or is `valid`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, valid: bool = False
    ):
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        y, x = (0, 0) if valid or stride > 1 else (height // 2, width // 2)
        self.conv = Conv2d(inputs, outputs, kernel, stride, ((y, y), (x, x)), bias=False)
        self.bn = BatchNorm2d(outputs, eps=1e-3)

    def __call__(self, x: Maps) -> Maps:
        return jax.nn.relu(self.bn(self.conv(x)))


def max_pool(x: Maps, stride: int, padding: int = 0) -> Maps:
    """The greatest of each 3x3 window."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), pads
    )


def mean_pool(x: Maps) -> Maps:
    """The mean of each 3x3 window's pixels: at the edge there are fewer of them."""
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), pads)
    rows, columns = (np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3])
    return total / jnp.asarray(np.outer(rows, columns)[None, :, :, None], x.dtype)


def _in_turn(x: Maps, *layers: nnx.Module) -> Maps:
    for layer in layers:
        x = layer(x)  # pyright: ignore
    return x


class InceptionA(nnx.Module):
    """[b, h, w, inputs] -> [b, h, w, 224 + pooled], as pytorch-fid's FIDInceptionA."""

    def __init__(self, inputs: int, pooled: int):
        self.branch1x1 = ConvBN(inputs, 64, 1)
        self.branch5x5_1 = ConvBN(inputs, 48, 1)
        self.branch5x5_2 = ConvBN(48, 64, 5)
        self.branch3x3dbl_1 = ConvBN(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3)
        self.branch_pool = ConvBN(inputs, pooled, 1)

    def __call__(self, x: Maps) -> Maps:
        branches = [
            self.branch1x1(x),
            _in_turn(x, self.branch5x5_1, self.branch5x5_2),
            _in_turn(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            self.branch_pool(mean_pool(x)),
        ]
        return jnp.concatenate(branches, -1)


class InceptionB(nnx.Module):
    """Halves the size."""

    def __init__(self, inputs: int):
        self.branch3x3 = ConvBN(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBN(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, stride=2)

    def __call__(self, x: Maps) -> Maps:
        branches = [
            self.branch3x3(x),
            _in_turn(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            max_pool(x, 2),
        ]
        return jnp.concatenate(branches, -1)


class InceptionC(nnx.Module):
    """Wide kernels, each as a row and a column."""

    def __init__(self, inputs: int, middle: int):
        row, column = (1, 7), (7, 1)
        self.branch1x1 = ConvBN(inputs, 192, 1)
        self.branch7x7_1 = ConvBN(inputs, middle, 1)
        self.branch7x7_2 = ConvBN(middle, middle, row)
        self.branch7x7_3 = ConvBN(middle, 192, column)
        self.branch7x7dbl_1 = ConvBN(inputs, middle, 1)
        self.branch7x7dbl_2 = ConvBN(middle, middle, column)
        self.branch7x7dbl_3 = ConvBN(middle, middle, row)
        self.branch7x7dbl_4 = ConvBN(middle, middle, column)
        self.branch7x7dbl_5 = ConvBN(middle, 192, row)
        self.branch_pool = ConvBN(inputs, 192, 1)

    def __call__(self, x: Maps) -> Maps:
        double = (getattr(self, f"branch7x7dbl_{i}") for i in range(1, 6))
        branches = [
            self.branch1x1(x),
            _in_turn(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            _in_turn(x, *double),
            self.branch_pool(mean_pool(x)),
        ]
        return jnp.concatenate(branches, -1)


class InceptionD(nnx.Module):
    """Halves the size."""

    def __init__(self, inputs: int):
        self.branch3x3_1 = ConvBN(inputs, 192, 1)
        self.branch3x3_2 = ConvBN(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBN(inputs, 192, 1)
        self.branch7x7x3_2 = ConvBN(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvBN(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvBN(192, 192, 3, stride=2)

    def __call__(self, x: Maps) -> Maps:
        wide = (getattr(self, f"branch7x7x3_{i}") for i in range(1, 5))
        branches = [
            _in_turn(x, self.branch3x3_1, self.branch3x3_2),
            _in_turn(x, *wide),
            max_pool(x, 2),
        ]
        return jnp.concatenate(branches, -1)


class InceptionE(nnx.Module):
    """Branches that fork into a row and a column. `maxima`: what the pooling branch takes."""

    def __init__(self, inputs: int, maxima: bool):
        self.maxima = maxima
        self.branch1x1 = ConvBN(inputs, 320, 1)
        self.branch3x3_1 = ConvBN(inputs, 384, 1)
        self.branch3x3_2a = ConvBN(384, 384, (1, 3))
        self.branch3x3_2b = ConvBN(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvBN(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvBN(448, 384, 3)
        self.branch3x3dbl_3a = ConvBN(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvBN(384, 384, (3, 1))
        self.branch_pool = ConvBN(inputs, 192, 1)

    def __call__(self, x: Maps) -> Maps:
        single = self.branch3x3_1(x)
        double = _in_turn(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(max_pool(x, 1, padding=1) if self.maxima else mean_pool(x)),
        ]
        return jnp.concatenate(branches, -1)


class InceptionV3(nnx.Module):
    """Pictures [b, h, w, 3] in [-1, 1] -> features [b, 2048], those below the classifier."""

    def __init__(self):
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, valid=True)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, maxima=False)
        self.Mixed_7c = InceptionE(FEATURES, maxima=True)

    def __call__(self, pictures: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        shape = (len(pictures), SIZE, SIZE, 3)
        # Without antialiasing, even where it shrinks, as in pytorch-fid
        return self.features(jax.image.resize(pictures, shape, "bilinear", antialias=False))

    def features(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        """Features of pictures as large as they are, 75 pixels a side at least."""
        x = _in_turn(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)
        x = _in_turn(max_pool(x, 2), self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)
        x = _in_turn(max_pool(x, 2), self.Mixed_5b, self.Mixed_5c, self.Mixed_5d)
        x = _in_turn(x, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)
        x = _in_turn(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c)
        return x.mean((1, 2))
