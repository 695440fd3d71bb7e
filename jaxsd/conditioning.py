"""What the UNet is told besides the latents: text from one or two towers, classes, sizes.

A conditioning is a dict of the UNet's keyword arguments, each [b, ...]. Two more keys belong to the
pipeline, which uses them up before the UNet is called: `concat`, latents [b, h, w, k] that the UNet
takes as further channels (inpainting, InstructPix2Pix), and `control`, a tuple of pictures
[b, H, W, 3], one for each ControlNet.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from jaxsd.errors import JaxsdError
from jaxsd.models import UNet2DConfig, UNetConfig, class_input
from jaxsd.nn import Net, Params
from jaxsd.programs import Programs
from jaxsd.sharding import split_rows
from jaxsd.tokenizer import Tokenizer
from jaxsd.weights import lora
from jaxsd.weights.lora import Live

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class TextEncoder:
    """Prompts to `encoder_hidden_states` and, with `pooled` (Stable Diffusion XL), `text_embeds`.

    towers and tokenizers go in pairs. `zero_empty`: no prompt at all (None) is zeros, not the
    states of "" (`force_zeros_for_empty_prompt` in model_index.json).
    """

    def __init__(
        self,
        towers: Sequence[Net],
        tokenizers: Sequence[Tokenizer],
        pooled: bool = False,
        zero_empty: bool = False,
        programs: Programs | None = None,
    ):
        self.towers, self.tokenizers = tuple(towers), tuple(tokenizers)
        self.pooled, self.zero_empty = pooled, zero_empty
        self._lengths = [net.config.max_position_embeddings for net in towers]
        self._compiled = (programs or Programs()).jit(
            "text", _encode, ("clip_skip",), of=("towers", "pooled")
        )

    @property
    def pooled_size(self) -> int:
        """The width of `text_embeds`."""
        return self.towers[-1].config.projection_dim

    def chunks(self, prompts: Sequence[str | None]) -> int:
        """How many times the towers' length the longest of the prompts takes."""
        texts = [prompt or "" for prompt in prompts]
        both = zip(self.tokenizers, self._lengths, strict=True)
        return max(tokenizer.chunks(texts, length) for tokenizer, length in both)

    def __call__(
        self,
        params: Sequence[Params],
        prompts: Sequence[str | None],
        clip_skip: int = 0,
        chunks: int = 1,
        loras: Sequence[Live] = (),
        lora_scales: Sequence[float] | np.ndarray = (),
        rows: NamedSharding | None = None,
    ) -> dict[str, jax.Array]:
        """The conditioning of each prompt; one too long for the chunks is cut, with a warning.

        loras: what changes each tower; their scales are values, as the prompts are. rows: how
        prompts are split over devices.
        """
        layers = min(net.config.num_hidden_layers for net in self.towers) - self.pooled
        if not 0 <= clip_skip < layers:
            raise JaxsdError(f"clip_skip must be from 0 to {layers - 1}, not {clip_skip}")
        if chunks < 1:
            raise JaxsdError(f"chunks must be at least 1, not {chunks}")
        unique = list(dict.fromkeys(prompt or "" for prompt in prompts))  # each is warned of once
        places = [unique.index(prompt or "") for prompt in prompts]
        tokens = []
        for tokenizer, length in zip(self.tokenizers, self._lengths, strict=True):
            ids, weights = tokenizer.weighted(unique, length, chunks)
            tokens.append((ids[places], weights[places]))
        given = np.array([prompt is not None or not self.zero_empty for prompt in prompts])
        tokens, given = split_rows((tokens, given), rows)
        live, scales = list(loras) or [{}] * len(self.towers), np.asarray(lora_scales, np.float32)
        states, projected = self._compiled(
            list(params),
            live,
            scales,
            tokens,
            given,
            clip_skip=clip_skip,
            towers=self.towers,
            pooled=self.pooled,
        )
        conditioning = {"encoder_hidden_states": states}
        return conditioning if projected is None else conditioning | {"text_embeds": projected}


def _encode(
    params, loras, scales, tokens, given, *, clip_skip: int, towers: tuple[Net, ...], pooled: bool
):
    pairs = zip(params, loras, strict=True)
    params = [lora.apply(weights, live, scales) for weights, live in pairs]
    states, projection = encode_text(towers, params, tokens, clip_skip, pooled)
    states = jnp.where(given[:, None, None], states, jnp.zeros_like(states))
    if projection is not None:
        projection = jnp.where(given[:, None], projection, jnp.zeros_like(projection))
    return states, projection


def encode_text(
    towers: Sequence[Net],
    params: Sequence[Params],
    tokens: Sequence[tuple[Int[Array, "n k t"], Float[Array, "n k t"]]],
    clip_skip: int,
    pooled: bool,
) -> tuple[Float[Array, "n kt d"], Float[Array, "n p"] | None]:
    """Hidden states of every tower, side by side, and the last tower's pooled projection.

    tokens: ids and weights for each tower. Chunks are read one by one and their states stand one
    after another. With `pooled` the states are those before the last layer, and the projection is
    that of the first chunk (2307.01952, section 2.1); else they are the last ones, after the norm.
    """
    states, projection = [], None
    for net, weights, (ids, emphasis) in zip(towers, params, tokens, strict=True):
        n, chunks, length = ids.shape
        rows = ids.reshape(n * chunks, length)
        if pooled:
            hidden, projected = net(weights, rows, clip_skip=clip_skip, method="penultimate")
            projection = None if projected is None else projected[::chunks]
        else:
            hidden = net(weights, rows, clip_skip=clip_skip)
        hidden = hidden.reshape(n, chunks * length, -1)
        states.append(emphasise(hidden, emphasis.reshape(n, chunks * length)))
    return jnp.concatenate(states, -1), projection


def emphasise(states: Float[Array, "n t d"], weights: Float[Array, "n t"]) -> Float[Array, "n t d"]:
    """Each token's state times its weight, then all of them scaled back to the mean they had.

    As AUTOMATIC1111's web UI does it; weights of 1 change nothing, to the last bit.
    """
    scaled = states * weights[:, :, None].astype(states.dtype)
    before, after = (x.astype(jnp.float32).mean((1, 2), keepdims=True) for x in (states, scaled))
    # Where the mean is nothing but rounding there is none to go back to.
    ratio = jnp.where(jnp.abs(after) > 1e-6, before / jnp.where(after == 0, 1.0, after), 1.0)
    return scaled * ratio.astype(states.dtype)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What Stable Diffusion XL is told of a picture's sizes, each (height, width) in pixels.

    original: of the training picture that it should be like; crop: where that was cut (top, left);
    target: after that. By default a picture of the size that is made, whole. The refiner is told
    an aesthetic score (0 to 10) instead of the target, another one for the negative prompt.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    def ids(
        self, config: UNetConfig, pooled: int, size: tuple[int, int], negative: bool
    ) -> list[float]:
        """The UNet's `time_ids` (2307.01952, section 2.2): six numbers, or a refiner's five.

        Which of the two, the UNet's width tells: `pooled` of it is the text embedding's.
        """
        width = (config.projection_class_embeddings_input_dim or 0) - pooled
        count = width // (config.addition_time_embed_dim or 1)
        start = [*(self.original or size), *self.crop]
        score = self.negative_aesthetic_score if negative else self.aesthetic_score
        known = {6: [*start, *(self.target or size)], 5: [*start, score]}
        if count not in known:
            raise JaxsdError(f"this UNet takes {count} size ids; XL's take 6, and its refiner's 5")
        return [float(number) for number in known[count]]


def class_labels(
    config: UNetConfig | UNet2DConfig, names: Sequence[str | None]
) -> dict[str, jax.Array]:
    """What a UNet is told of class names such as "7" or "seven", or "" for no class.

    Nothing at all if it knows no classes.
    """
    labels, count = [], config.num_classes
    if config.class_conditional and not count:
        raise JaxsdError(f"class_embed_type={config.class_embed_type!r} has no classes with names")
    for name in names:
        word = (name or "").strip().lower()
        label = str(DIGITS.index(word)) if word in DIGITS else word
        if word and not (label.isdecimal() and int(label) < count):
            known = f"knows 0 to {count - 1}" if count else "knows no classes"
            raise JaxsdError(f"no class {name!r}: this model {known}")
        labels.append(int(label or -1))
    if not config.class_conditional:
        return {}
    return {"class_labels": class_input(config, jnp.asarray(labels, jnp.int32))}
