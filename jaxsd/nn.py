"""Layers with PyTorch's names and layouts, and `Net`, which applies them to a flat dict of arrays.

A module holds code and the *shapes* of its parameters, never arrays. Parameters travel as
`Params`, a flat dict keyed by the PyTorch name (`down_blocks.0.resnets.1.conv1.weight`) in the
PyTorch layout (Linear [out, in], Conv2d [out, in, kh, kw]); activations are NHWC. So a state dict
read from a file *is* the pytree that goes through `jax.jit`, `jax.grad`, optax and Orbax.
"""

import contextlib
import contextvars
import functools
import math
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxsd import eight_bits, kernels

Params = dict[str, jax.Array]
Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]
KNOWN = ".known"  # after a weight's name, in the parameters of a `Net`: see `Net.known`


# --- Initialisers: (key, shape) -> float32 array ---------------------------------------------


def fan_in_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default for Linear and Conv2d weights."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def normal(stddev: float) -> Initializer:
    """N(0, stddev^2)."""

    def init(key, shape):
        return stddev * jax.random.normal(key, shape, jnp.float32)

    return init


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """All 0."""
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """All 1."""
    return jnp.ones(shape, jnp.float32)


def parameter(shape: tuple[int, ...], initializer: Initializer) -> nnx.Param:
    """Declares a parameter by its shape alone; `Net.init` calls the initialiser."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), initializer=initializer)  # pyright: ignore


# --- Layers ----------------------------------------------------------------------------------


class Linear(nnx.Module):
    """[..., in] -> [..., out]; weight [out, in]."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool = True, init: Initializer = fan_in_uniform
    ):
        self.weight = parameter((outputs, inputs), init)
        self.bias = parameter((outputs,), zeros) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.parts(x, 1)[0]

    def parts(self, x: jax.Array, count: int) -> list[jax.Array]:
        """The outputs in equal parts: where these have different uses."""
        if isinstance(known := self.weight[...], Known):
            return jnp.split(known.outputs, count, -1)
        y = kernels.linear(x, weight_at_work(self.weight, x), count)
        if self.bias is None:
            return y
        biases = jnp.split(self.bias[...], count)
        return [part + _per_channel(bias, part) for part, bias in zip(y, biases, strict=True)]


class Conv2d(nnx.Module):
    """[b, h, w, in] -> [b, h', w', out]; weight [out, in, kh, kw]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[tuple[int, int], tuple[int, int]] = 0,
        bias: bool = True,
        init: Initializer = fan_in_uniform,
    ):
        self.outputs, self.kernel, self.stride = outputs, kernel, stride
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        self.padding = padding
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.weight = parameter((outputs, inputs, *sides), init)
        self.bias = parameter((outputs,), zeros) if bias else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        weight = weight_at_work(self.weight, x)
        y = kernels.convolution(x, weight, bias, self.stride, self.padding, for_gradients())
        return checkpoint_name(y, "convolution")


class GroupNorm(nnx.Module):
    """Normalises [b, ..., c] over space and each group of channels; statistics in float32."""

    def __init__(self, groups: int, channels: int, eps: float):
        self.groups, self.eps = groups, eps
        self.weight = parameter((channels,), ones)
        self.bias = parameter((channels,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)  # once: of two the gradients would be added up rounded
        scale, shift = self.affine(y)
        return (y * scale + shift).astype(x.dtype)

    def affine(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The scale and the shift [b, 1 ..., c], in float32, that normalise this x."""
        y = x.astype(jnp.float32)
        mean, variance = (
            jnp.repeat(moment, y.shape[-1] // self.groups, axis=-1).reshape(
                len(y), *[1] * (y.ndim - 2), -1
            )
            for moment in kernels.moments(y, self.groups)
        )
        # As y a + b: with y - mean used again, compilers would keep it, as large as x.
        scale = jax.lax.rsqrt(variance + self.eps) * _last_axis(self.weight, y)
        return scale, _last_axis(self.bias, y) - mean * scale


class BatchNorm2d(nnx.Module):
    """As torch's in `eval()`: [b, ..., c] by the mean and variance that training left behind."""

    def __init__(self, channels: int, eps: float = 1e-5):
        self.eps = eps
        self.weight = parameter((channels,), ones)
        self.bias = parameter((channels,), zeros)
        self.running_mean = parameter((channels,), zeros)
        self.running_var = parameter((channels,), ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.weight[...] * jax.lax.rsqrt(self.running_var[...] + self.eps)
        shift = self.bias[...] - self.running_mean[...] * scale
        return x * _per_channel(scale, x) + _per_channel(shift, x)


class LayerNorm(nnx.Module):
    """Normalises the last axis; statistics in float32."""

    def __init__(self, channels: int, eps: float = 1e-5):
        self.eps = eps
        self.weight = parameter((channels,), ones)
        self.bias = parameter((channels,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * _last_axis(self.weight, y) + _last_axis(self.bias, y)).astype(x.dtype)


class Embedding(nnx.Module):
    """Integer ids [...] -> vectors [..., channels]; weight [rows, channels]."""

    def __init__(self, rows: int, channels: int, init: Initializer):
        self.weight = parameter((rows, channels), init)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.weight[...][ids]


class Dropout(nnx.Module):
    """Zeroes a share `rate` of the entries inside `dropout_keys`; the identity elsewhere."""

    def __init__(self, rate: float):
        self.rate = rate

    @property
    def active(self) -> bool:
        """Whether it is more than the identity, here and now."""
        return self._keys() is not None

    def _keys(self) -> Iterator[jax.Array] | None:
        return _dropout_keys.get() if self.rate > 0 else None

    def __call__(self, x: jax.Array) -> jax.Array:
        keys = self._keys()
        if keys is None:
            return x
        kept = jax.random.bernoulli(next(keys), 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros_like(x))


_dropout_keys: contextvars.ContextVar[Iterator[jax.Array] | None] = contextvars.ContextVar(
    "dropout_keys", default=None
)


@contextlib.contextmanager
def dropout_keys(key: jax.Array | None):
    """While a module is traced inside this context, each `Dropout` call gets a key of its own."""
    count = iter(range(1 << 31))
    token = _dropout_keys.set(None if key is None else (jax.random.fold_in(key, i) for i in count))
    try:
        yield
    finally:
        _dropout_keys.reset(token)


_REMAT: dict[str, Callable | None] = {
    "none": None,
    # By name and not by operation: kernels make a layer's result of several, or of one of their
    # own. Norms, activations and attention's scores are computed again.
    "selective": jax.checkpoint_policies.save_only_these_names(
        "attention", "convolution", "linear"
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
_remat: contextvars.ContextVar[str | None] = contextvars.ContextVar("remat", default=None)


@contextlib.contextmanager
def rematerialise(mode: str):
    """What gradients of the blocks traced in this context find stored, to compute the rest again.

    "none": everything. "full": a block's inputs. "selective": also what was costly to compute.
    """
    token = _remat.set(mode)
    try:
        yield
    finally:
        _remat.reset(token)


def remat() -> str | None:
    """The mode of `rematerialise`; None outside of it."""
    return _remat.get()


def for_gradients() -> bool:
    """Whether this is traced for a training, inside of `rematerialise`."""
    return remat() is not None


def block(call: Callable) -> Callable:
    """Marks a module's method as a unit of `rematerialise`; blocks do not lie in each other."""

    @functools.wraps(call)
    def marked(*arguments: Any) -> Any:
        policy = _REMAT[remat() or "none"]
        if policy is None:
            return call(*arguments)
        # A function of nothing, anew each time: jax.checkpoint remembers what it has traced, and
        # here parameters and dropout keys come in by closure.
        return jax.checkpoint(lambda: call(*arguments), policy=policy)()

    return marked


class Known:
    """In the place of a linear layer's weight: what the layer gives, whatever it is asked."""

    def __init__(self, outputs: jax.Array):
        self.outputs = outputs

    def __getitem__(self, index: object) -> "Known":
        return self  # as an array answers to [...]


def weight_at_work(variable: nnx.Param, x: jax.Array) -> jax.Array:
    """A matrix or kernel in the dtype of what it is to meet."""
    value: Any = variable[...]
    return value.at_work(x) if isinstance(value, eight_bits.Eight) else value.astype(x.dtype)


def _last_axis(variable: nnx.Param, like: jax.Array) -> jax.Array:
    return _per_channel(variable[...], like)


def _per_channel(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A per-channel vector with the dtype and (explicitly, not by promotion) the rank of `like`."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


# --- Functions -------------------------------------------------------------------------------


def attention(
    q: Float[Array, "b t hd"],
    k: Float[Array, "b s hd"],
    v: Float[Array, "b s hd"],
    heads: int,
    causal: bool = False,
) -> Float[Array, "b t hd"]:
    """softmax(q k^T / sqrt(d)) v for each head, the heads side by side in the last axis."""
    split = [x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v)]  # [b, t, h, d]
    x = kernels.attention(*split, causal=causal)
    return checkpoint_name(x.reshape(q.shape).astype(q.dtype), "attention")


def upsample_nearest(
    x: Float[Array, "b h w c"], size: tuple[int, int]
) -> Float[Array, "b h2 w2 c"]:
    """Nearest-neighbour resizing with torch's index rule, floor(i * in / out)."""
    b, h, w, c = x.shape
    if size == (2 * h, 2 * w):  # a broadcast is cheaper than a gather
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
        return x.reshape(b, 2 * h, 2 * w, c)
    rows, columns = (np.arange(out) * n // out for n, out in zip((h, w), size, strict=True))
    return x[:, rows][:, :, columns]


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU, as in GEGLU, computed in float32; the tanh form is off by 1e-4."""
    return kernels.gelu(x)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), as in OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu": gelu, "quick_gelu": quick_gelu}


# --- Net -------------------------------------------------------------------------------------


class Net:
    """A module as a pure function of a flat parameter dict.

    net = Net(UNet(config))
    params = net.init(jax.random.key(0))        # or read from a file
    out = net(params, sample, timestep, encoder_hidden_states)

    `shapes` maps every parameter name to its shape. Calling with a dict that lacks a name raises
    KeyError; loading checks names and shapes with every mismatch listed (`jaxsd.weights`).
    """

    def __init__(self, module: nnx.Module):
        self.config: Any = getattr(module, "config", None)
        self._graph, state = nnx.split(module)
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(
            state, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
        self._initializers: dict[str, Initializer] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._metadata = []
        for path, variable in leaves:
            name = ".".join(str(getattr(p, "key", getattr(p, "idx", p))) for p in path)
            self._initializers[name] = variable.get_metadata()["initializer"]
            self.shapes[name] = tuple(variable.get_raw_value().shape)
            self._metadata.append(variable)

    def __call__(
        self,
        params: Params,
        *inputs: Any,
        method: str = "__call__",
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """Applies the module (or its `method`); dropout is active only with a `dropout_key`."""
        with dropout_keys(dropout_key):
            return getattr(self.bind(params), method)(*inputs, **kwargs)

    def bind(self, params: Params) -> Any:
        """A new module with these arrays in place, for a caller who wants to look inside it."""

        def value(name: str) -> Any:
            if (outputs := params.get(name + KNOWN)) is not None:
                return Known(outputs)
            scale = params.get(name + eight_bits.SUFFIX)
            return params[name] if scale is None else eight_bits.Eight(params[name], scale)

        variables = [
            variable.replace(value(name))
            for name, variable in zip(self.shapes, self._metadata, strict=True)
        ]
        return nnx.merge(self._graph, jax.tree_util.tree_unflatten(self._tree, variables))

    def known(self, params: Params, layers: re.Pattern[str], x: jax.Array) -> Params:
        """What linear layers give for an x that never changes: to be added to the parameters.

        layers: finds the names of their weights. With such an entry a layer computes nothing.
        """
        names = [name for name in self.shapes if layers.search(name)]
        module, found = self.bind(params) if names else None, {}
        for name in names:
            layer: Any = module
            for part in name.split(".")[:-1]:
                layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
            found[name + KNOWN] = layer(x)
        return found

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters; each depends on the key and its own name only."""

        def draw(key: jax.Array) -> Params:
            keys = {n: jax.random.fold_in(key, zlib.crc32(n.encode())) for n in self.shapes}
            return {n: self._initializers[n](keys[n], shape) for n, shape in self.shapes.items()}

        return jax.jit(draw)(key)  # as one program: op by op, every new shape compiles

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())
