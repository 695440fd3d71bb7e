"""What the config.json of a UNet or a ControlNet may say: tables of fields, and their limits.

Three classes of diffusers are built of the same blocks: `UNet2DConditionModel` (Stable Diffusion),
`UNet2DModel` (DDPM, which reads no text) and `ControlNetModel`.
"""

import dataclasses
from typing import Any, ClassVar

from jaxsd.models.config import NetworkConfig

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
SELF = ("AttnDownBlock2D", "AttnUpBlock2D")
PLAIN = ("DownBlock2D", "UpBlock2D")
MID_CROSS, MID_PLAIN = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"
MOST_LAYERS = 40  # of transformers in a block; Stable Diffusion XL has 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig(NetworkConfig):
    """What the three classes have in common: the way down, the middle, and the time.

    A class enters the time embedding by `class_embed_type`: None with `num_class_embeds` for the
    labels 0 ... n - 1, "simple_projection" (a linear layer) or "projection" (two) for vectors of
    `projection_class_embeddings_input_dim` numbers such as a one-hot label, "timestep" for a number
    embedded as time is, "identity" for a vector that is added as it is.
    """

    in_channels: int = 4
    down_block_types: tuple[str, ...] = (CROSS[0],) * 3 + (PLAIN[0],)
    mid_block_type: str | None = MID_CROSS
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    downsample_padding: int = 1  # 0: below and right alone, as in the VAE
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    class_embed_type: str | None = None
    num_class_embeds: int | None = None

    # Fields in the classes that have a word for them; the others go without.
    attention_head_dim = None
    add_attention = False  # self-attention in a plain middle block
    attn_norm_num_groups = None
    cross_attention_dim = 0
    transformer_layers_per_block = 1
    only_cross_attention = False
    use_linear_projection = False
    addition_embed_type = None
    addition_time_embed_dim = None
    projection_class_embeddings_input_dim = None
    time_cond_proj_dim = None
    center_input_sample = False
    dropout = 0.0

    CLASS_NAME: ClassVar[str]  # diffusers' name
    KINDS: ClassVar[tuple[str, ...]] = (*CROSS, *SELF, *PLAIN)
    MID_KINDS: ClassVar[tuple[str | None, ...]] = (MID_CROSS, MID_PLAIN, None)
    CLASS_EMBEDDINGS = (None, "timestep", "identity", "projection", "simple_projection")
    MID_LAYERS: ClassVar[int] = 0  # ResNet blocks in a plain middle besides the first
    NEUTRAL = {
        "act_fn": ("silu", "swish"),
        "mid_block_scale_factor": (1,),
        "resnet_time_scale_shift": ("default",),
    }

    def __post_init__(self):
        super().__post_init__()
        channels = self.block_out_channels
        for name in ("down_block_types", "up_block_types", *_BY_BLOCK):
            value = getattr(self, name, None)
            if isinstance(value, tuple) and len(value) != len(channels):
                raise ValueError(f"{name} and block_out_channels differ in length")
        kinds = self.down_block_types + getattr(self, "up_block_types", ())
        if wrong := sorted({repr(kind) for kind in kinds if kind not in self.KINDS}):
            raise ValueError(f"unsupported blocks {', '.join(wrong)}")
        if self.mid_block_type not in self.MID_KINDS:
            raise ValueError(f"unsupported mid_block_type={self.mid_block_type!r}")
        if self.class_embed_type not in self.CLASS_EMBEDDINGS:
            raise ValueError(f"unsupported class_embed_type={self.class_embed_type!r}")
        if "projection" in str(self.class_embed_type):
            self._needs("class_embed_type", "projection_class_embeddings_input_dim")
        if channels[0] // 2 <= self.freq_shift:
            raise ValueError("block_out_channels are too few for an embedding of the time")
        self._check_divisions()

    def _check_divisions(self) -> None:
        channels, last = self.block_out_channels, len(self.block_out_channels) - 1
        if any(c % self.norm_num_groups for c in channels):
            raise ValueError("norm_num_groups does not divide block_out_channels")
        if channels[last] % (self.attn_norm_num_groups or 1):
            raise ValueError("attn_norm_num_groups does not divide block_out_channels")
        ups = getattr(self, "up_block_types", ())[::-1]
        middle = [(last, "Attn" if self.add_attention else str(self.mid_block_type))]
        for i, kind in [*enumerate(self.down_block_types), *enumerate(ups), *middle]:
            if "Attn" in kind and channels[i] % (self.of("attention_head_dim", i) or 1):
                raise ValueError("attention_head_dim does not divide block_out_channels")

    def _needs(self, name: str, other: str) -> None:
        if not getattr(self, other):
            raise ValueError(f"{name} needs {other}")

    def heads(self, block: int, kind: str) -> int:
        """The number of heads of the attention in a block of this kind.

        `attention_head_dim` is that number in cross-attention blocks (diffusers' legacy misnomer)
        and the size of a head elsewhere, where None means one head.
        """
        channels = self.block_out_channels[block]
        value = self.of("attention_head_dim", block) or channels
        return value if "CrossAttn" in kind else channels // value

    def of(self, name: str, block: int) -> Any:
        """The value for a block of a field that holds one for all blocks, or a tuple of them.

        A tuple is in the order of the way down; the middle has the last.
        """
        value = getattr(self, name)
        return value[block] if isinstance(value, tuple) else value

    @property
    def text_conditional(self) -> bool:
        """Whether the network reads `encoder_hidden_states`."""
        return any(
            "CrossAttn" in kind for kind in (*self.down_block_types, str(self.mid_block_type))
        )

    @property
    def class_conditional(self) -> bool:
        """Whether the network reads `class_labels`."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def num_classes(self) -> int:
        """How many classes there are to name; 0 where `class_labels` are none or no labels."""
        if self.class_embed_type == "simple_projection":
            return self.projection_class_embeddings_input_dim or 0
        return 0 if self.class_embed_type else self.num_class_embeds or 0

    def to_json(self) -> dict[str, Any]:
        return {"_class_name": self.CLASS_NAME, "act_fn": "silu", **super().to_json()}


_BY_BLOCK = ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionedConfig(BackboneConfig):
    """What UNets and ControlNets that read a text have in common.

    `upcast_attention` is for PyTorch in half precision: scores and softmax are in float32 here
    always. `addition_embed_type="text_time"` (Stable Diffusion XL) adds a pooled text and the sizes
    and crops of the picture, each embedded in `addition_time_embed_dim` numbers, together
    `projection_class_embeddings_input_dim`.
    """

    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    only_cross_attention: bool | tuple[bool, ...] = False
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    NEUTRAL = BackboneConfig.NEUTRAL | {
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),
    }
    IGNORED = ("addition_embed_type_num_heads",)  # read only with another addition_embed_type

    def __post_init__(self):
        super().__post_init__()
        blocks = range(len(self.block_out_channels))
        layers = max(self.of("transformer_layers_per_block", i) for i in blocks)
        if self.layers_per_block * layers > MOST_LAYERS:
            raise ValueError(
                f"layers_per_block and transformer_layers_per_block: over {MOST_LAYERS} in a block"
            )
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(f"unsupported addition_embed_type={self.addition_embed_type!r}")
        if self.addition_embed_type:
            self._needs("addition_embed_type", "addition_time_embed_dim")
            self._needs("addition_embed_type", "projection_class_embeddings_input_dim")
            if (self.addition_time_embed_dim or 0) // 2 <= self.freq_shift:
                raise ValueError("addition_time_embed_dim is too small")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(ConditionedConfig):
    """The fields of a `UNet2DConditionModel` that decide the architecture.

    `time_cond_proj_dim` is the size of the embedded guidance scale in a network that is distilled
    from guidance; `guidance_range`, least and most, are the scales (1 is none) it was taught.
    """

    sample_size: int
    out_channels: int = 4
    up_block_types: tuple[str, ...] = (PLAIN[1],) + (CROSS[1],) * 3
    dropout: float = 0.0
    center_input_sample: bool = False  # pictures in [0, 1] are brought to [-1, 1]
    time_cond_proj_dim: int | None = None
    guidance_range: tuple[float, ...] | None = None

    CLASS_NAME = "UNet2DConditionModel"
    OURS = ("guidance_range",)
    NEUTRAL = ConditionedConfig.NEUTRAL | {
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "dual_cross_attention": (False,),
        "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,),
        "reverse_transformer_layers_per_block": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    }
    # The second is read only with another mid_block_type.
    IGNORED = (*ConditionedConfig.IGNORED, "mid_block_only_cross_attention")

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_range is None:
            return
        self._needs("guidance_range", "time_cond_proj_dim")
        if len(self.guidance_range) != 2 or self.guidance_range[0] > self.guidance_range[1]:
            given = list(self.guidance_range)
            raise ValueError(f"guidance_range is the least and the most scale, not {given}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConfig(BackboneConfig):
    """The fields of a `UNet2DModel`: unconditional or class-conditional, over pixels."""

    sample_size: int
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (PLAIN[0],) + (SELF[0],) * 3
    mid_block_type: str | None = MID_PLAIN
    up_block_types: tuple[str, ...] = (SELF[1],) * 3 + (PLAIN[1],)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    attention_head_dim: int | None = 8
    attn_norm_num_groups: int | None = None  # of the middle; by default norm_num_groups
    add_attention: bool = True
    dropout: float = 0.0
    center_input_sample: bool = False

    CLASS_NAME = "UNet2DModel"
    KINDS = (*SELF, *PLAIN)
    MID_KINDS = (MID_PLAIN, None)
    CLASS_EMBEDDINGS = (None, "timestep", "identity")
    MID_LAYERS = 1
    NEUTRAL = BackboneConfig.NEUTRAL | {
        "downsample_type": ("conv",),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "upsample_type": ("conv",),
    }
    IGNORED = ("num_train_timesteps",)  # read only with another time_embedding_type


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetConfig(ConditionedConfig):
    """The fields of a `ControlNetModel`.

    `controlnet_conditioning_channel_order` "bgr" turns the picture's channels around before it is
    read. `global_pool_conditions` averages what is added to the UNet over space.
    """

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    CLASS_NAME = "ControlNetModel"
    MID_KINDS = (MID_CROSS, MID_PLAIN)
    CLASS_EMBEDDINGS = (None, "timestep", "identity", "projection")

    def __post_init__(self):
        super().__post_init__()
        if self.controlnet_conditioning_channel_order not in ("rgb", "bgr"):
            raise ValueError("controlnet_conditioning_channel_order is rgb or bgr")

    @classmethod
    def from_unet(cls, unet: UNetConfig) -> "ControlNetConfig":
        """The ControlNet for a UNet: the same way down, from latents alone."""
        ours = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            field.name: getattr(unet, field.name)
            for field in dataclasses.fields(unet)
            if field.name in ours
        }
        values["in_channels"] = unet.out_channels
        return cls(**values)
