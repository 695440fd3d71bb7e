"""CLIP (Radford et al. 2021): a text tower and a picture tower that meet in one space.

Names as in transformers' `CLIPModel`. Stable Diffusion reads the text tower's last hidden states,
XL the last but one and a pooled, projected state; the picture tower is there to train the text
tower with (`jaxsd.objectives.clip`).
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsd.models.config import NetworkConfig
from jaxsd.nn import (
    ACTIVATIONS,
    Conv2d,
    Embedding,
    LayerNorm,
    Linear,
    attention,
    block,
    normal,
    parameter,
)


class _CLIPConfig(NetworkConfig):
    # Old transformers wrote its whole PretrainedConfig (generation defaults, label maps ...) into
    # the file, so for CLIP an unknown name is no warning sign.
    @classmethod
    def from_json(cls, values: dict[str, Any], where: str = "config.json"):
        names = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore
        return super().from_json({k: v for k, v in values.items() if k in names}, where)

    hidden_size: int
    num_attention_heads: int
    hidden_act: str

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"unsupported hidden_act={self.hidden_act!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads does not divide hidden_size")


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(_CLIPConfig):
    """The fields of `text_encoder/config.json`."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    eos_token_id: int = 49407

    architecture: ClassVar[str] = "CLIPTextModel"

    def to_json(self) -> dict[str, Any]:
        fixed = {"architectures": [self.architecture], "model_type": "clip_text_model"}
        return {
            **fixed,
            **super().to_json(),
            "bos_token_id": self.vocab_size - 2,
            "pad_token_id": 1,
        }


@dataclasses.dataclass(frozen=True)
class CLIPTextProjectionConfig(CLIPTextConfig):
    """As CLIPTextConfig, for a tower that ends in a projection to `projection_dim`."""

    architecture: ClassVar[str] = "CLIPTextModelWithProjection"


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(_CLIPConfig):
    """The fields of a CLIP picture tower's config."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self):
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise ValueError("patch_size exceeds image_size")

    def to_json(self) -> dict[str, Any]:
        return {"model_type": "clip_vision_model", **super().to_json()}


class SelfAttention(nnx.Module):
    """[b, t, c] -> [b, t, c]; causal in the text tower."""

    def __init__(self, channels: int, heads: int):
        self.heads = heads
        self.k_proj = Linear(channels, channels)
        self.v_proj = Linear(channels, channels)
        self.q_proj = Linear(channels, channels)
        self.out_proj = Linear(channels, channels)

    def __call__(self, x: Float[Array, "b t c"], causal: bool) -> Float[Array, "b t c"]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.heads, causal))


class MLP(nnx.Module):
    """[..., c] -> [..., c] by way of `intermediate_size`."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        self.act = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Attention and MLP, each behind its norm and beside its input: [b, t, c] -> [b, t, c]."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)

    @block
    def __call__(self, x: Float[Array, "b t c"], causal: bool) -> Float[Array, "b t c"]:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The layers of a tower."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        self.layers = nnx.List([EncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: jax.Array, causal: bool, depth: int | None = None) -> list[jax.Array]:
        """Every hidden state up to that of layer `depth` (by default the last), the input first."""
        depth = len(self.layers) if depth is None else depth
        if not 0 <= depth <= len(self.layers):
            raise ValueError(f"no layer {depth}: this tower has {len(self.layers)}")
        states = [x]
        for layer in list(self.layers)[:depth]:
            states.append(layer(states[-1], causal))
        return states


class TextEmbeddings(nnx.Module):
    """Ids [b, t] to vectors of tokens and places [b, t, c]."""

    def __init__(self, config: CLIPTextConfig):
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, normal(0.02))
        self.position_embedding = Embedding(
            config.max_position_embeddings, config.hidden_size, normal(0.01)
        )

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t c"]:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))[None]


class TextTransformer(nnx.Module):
    """The text tower up to its last norm: ids [b, t] -> [b, t, c]."""

    def __init__(self, config: CLIPTextConfig):
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def hidden_states(self, ids: Int[Array, "b t"], depth: int | None = None) -> list[jax.Array]:
        """The embeddings and what each layer gives, [b, t, c] each, up to layer `depth`."""
        return self.encoder(self.embeddings(ids), True, depth)

    def __call__(self, ids: Int[Array, "b t"], clip_skip: int = 0) -> Float[Array, "b t c"]:
        depth = len(self.encoder.layers) - clip_skip
        return self.final_layer_norm(self.hidden_states(ids, depth)[-1])


def pool(
    states: Float[Array, "b t c"], ids: Int[Array, "b t"], eos_token_id: int
) -> Float[Array, "b c"]:
    """The state at the first end-of-text token."""
    # Configs from before 2023 say eos_token_id 2 and mean the highest id (transformers #24773).
    ends = ids if eos_token_id == 2 else (ids == eos_token_id)
    last = jnp.argmax(ends.astype(jnp.int32), -1)
    return jnp.take_along_axis(states, last[:, None, None], 1)[:, 0]


class VisionEmbeddings(nnx.Module):
    """Pictures [b, h, w, 3] to a class token and patches [b, 1 + n, d]."""

    def __init__(self, config: CLIPVisionConfig):
        channels, patch = config.hidden_size, config.patch_size
        positions = (config.image_size // patch) ** 2 + 1
        self.class_embedding = parameter((channels,), normal(channels**-0.5))
        self.patch_embedding = Conv2d(3, channels, patch, stride=patch, bias=False)
        self.position_embedding = Embedding(positions, channels, normal(0.02))

    def __call__(self, pictures: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        x = self.patch_embedding(pictures)
        b, h, w, c = x.shape
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (b, 1, c))
        x = jnp.concatenate([first, x.reshape(b, h * w, c)], 1)
        return x + self.position_embedding(jnp.arange(x.shape[1]))[None].astype(x.dtype)


class VisionTransformer(nnx.Module):
    """The picture tower: [b, h, w, 3], normalised as CLIP's are -> the class token's [b, d]."""

    def __init__(self, config: CLIPVisionConfig):
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)  # sic
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pictures: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        states = self.encoder(self.pre_layrnorm(self.embeddings(pictures)), causal=False)
        return self.post_layernorm(states[-1][:, 0])


class CLIPTextModel(nnx.Module):
    """Token ids -> hidden states: what conditions the UNet."""

    def __init__(self, config: CLIPTextConfig):
        self.config = config
        self.text_model = TextTransformer(config)

    def __call__(self, input_ids: Int[Array, "b t"], clip_skip: int = 0) -> Float[Array, "b t c"]:
        """Hidden states after the final LayerNorm; `clip_skip` leaves out that many last layers."""
        return self.text_model(input_ids, clip_skip)

    def penultimate(
        self, input_ids: Int[Array, "b t"], clip_skip: int = 0
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b p"] | None]:
        """What Stable Diffusion XL reads: states without the final LayerNorm, and the pooled one.

        The states are those before the last 1 + `clip_skip` layers. The pooled state is the
        projected one of the whole tower, None for a tower without a projection.
        """
        depth = len(self.text_model.encoder.layers) - 1 - clip_skip
        return self.text_model.hidden_states(input_ids, depth)[-1], None


class CLIPTextModelWithProjection(CLIPTextModel):
    """The text tower with a projection of its end-of-text state: XL's second text encoder."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def penultimate(
        self, input_ids: Int[Array, "b t"], clip_skip: int = 0
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b p"] | None]:
        """What Stable Diffusion XL reads: the last but one hidden state, without the last norm.

        And the pooled projection [b, p]. ValueError if clip_skip leaves no layer.
        """
        states = self.text_model.hidden_states(input_ids)
        depth = len(states) - 2 - clip_skip
        if not 0 <= depth < len(states):
            raise ValueError(f"clip_skip must be from 0 to {len(states) - 2}, not {clip_skip}")
        last = self.text_model.final_layer_norm(states[-1])
        pooled = pool(last, input_ids, self.config.eos_token_id)
        return states[depth], self.text_projection(pooled)


class CLIPModel(nnx.Module):
    """Both towers, their projections to one space, and the log temperature."""

    def __init__(self, text: CLIPTextConfig, vision: CLIPVisionConfig):
        if text.projection_dim != vision.projection_dim:
            raise ValueError("the towers' projection_dim differ")
        self.config = (text, vision)
        self.eos_token_id = text.eos_token_id
        self.text_model = TextTransformer(text)
        self.vision_model = VisionTransformer(vision)
        self.text_projection = Linear(text.hidden_size, text.projection_dim, bias=False)
        self.visual_projection = Linear(vision.hidden_size, vision.projection_dim, bias=False)
        # ln(1 / 0.07), the paper's initial temperature
        self.logit_scale = parameter((), lambda key, shape: jnp.full(shape, 2.6592))

    def text_features(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b p"]:
        """The projected state at the first end-of-text token, not normalised."""
        pooled = pool(self.text_model(input_ids), input_ids, self.eos_token_id)
        return self.text_projection(pooled)

    def image_features(self, pictures: Float[Array, "b h w c"]) -> Float[Array, "b p"]:
        """The projected class state, not normalised, of pictures as the tower's statistics say.

        Those of jaxsd's own towers are in [-1, 1]: `objectives.clip.PixelStatistics`.
        """
        return self.visual_projection(self.vision_model(pictures))

    def __call__(
        self, input_ids: Int[Array, "b t"], pictures: Float[Array, "n h w c"]
    ) -> tuple[Float[Array, "b p"], Float[Array, "n p"], Float[Array, ""]]:
        """Unit text and image features, float32, and the factor exp(logit_scale)."""
        text, image = self.text_features(input_ids), self.image_features(pictures)
        text, image = (x.astype(jnp.float32) for x in (text, image))
        text, image = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (text, image))
        return text, image, jnp.exp(self.logit_scale[...])
