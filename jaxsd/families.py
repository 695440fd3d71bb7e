"""The model families whose configs come with the package: a table."""

import dataclasses

from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError
from jaxsd.models import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """Configs of one kind of model; a pixel model has neither VAE nor text tower."""

    unet: UNetConfig
    schedule: Schedule
    vae: VAEConfig | None = None
    text_encoder: CLIPTextConfig | None = None
    image_encoder: CLIPVisionConfig | None = None  # trains the text tower; sampling needs it not


SD1_SCHEDULE = Schedule(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
SD2_UNET = UNetConfig(
    sample_size=64,
    attention_head_dim=(5, 10, 20, 20),  # heads
    cross_attention_dim=1024,
    use_linear_projection=True,
)
# OpenCLIP's ViT-H without its last layer, whose output Stable Diffusion 2 does not read
SD2_TEXT = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    projection_dim=512,
)

FAMILIES = {
    # Stable Diffusion 1.1 to 1.5, as in the models' config files
    "sd1": Family(
        UNetConfig(sample_size=64, cross_attention_dim=768),
        SD1_SCHEDULE,
        VAEConfig(),
        CLIPTextConfig(),
    ),
    # Stable Diffusion 2.0-base and 2.1-base: 512 px
    "sd2": Family(SD2_UNET, SD1_SCHEDULE, VAEConfig(), SD2_TEXT),
    # Stable Diffusion 2.0 and 2.1: 768 px
    "sd2-v": Family(
        dataclasses.replace(SD2_UNET, sample_size=96),
        dataclasses.replace(SD1_SCHEDULE, prediction_type="v_prediction"),
        VAEConfig(sample_size=768),
        SD2_TEXT,
    ),
    # Stable Diffusion at a thousandth of the size: 32 px pictures of handwritten digits
    "digits": Family(
        UNetConfig(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 96),
            layers_per_block=1,
            attention_head_dim=2,  # heads
            cross_attention_dim=64,
            norm_num_groups=16,
        ),
        dataclasses.replace(SD1_SCHEDULE, prediction_type="v_prediction"),
        VAEConfig(
            sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            scaling_factor=1.0,  # measured when the VAE is trained
        ),
        CLIPTextConfig(
            vocab_size=1024,  # at most: the tokenizer decides
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=64,
        ),
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            projection_dim=64,
        ),
    ),
    # 8 px scans of digits in pixel space, the digit given as a one-hot vector
    "digits-ddpm": Family(
        UNetConfig(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(48, 96),
            layers_per_block=1,
            attention_head_dim=48,
            norm_num_groups=16,
            dropout=0.1,
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=10,
        ),
        Schedule(beta_schedule="cosine", prediction_type="v_prediction"),
    ),
}


def get_family(name: str) -> Family:
    """Looks a family up; JaxsdError names the ones there are."""
    if name not in FAMILIES:
        raise JaxsdError(f"unknown family {name!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def latent_shape(unet: UNetConfig, downscale: int, height: int, width: int) -> tuple[int, int, int]:
    """[h, w, c] of the UNet's input for a picture; JaxsdError if the size does not divide.

    `downscale` is 1 for a pixel model, 8 for Stable Diffusion.
    """
    # In pixel space the UNet itself halves the picture; latents may be of any size.
    unit = downscale if downscale > 1 else 2 ** (len(unet.block_out_channels) - 1)
    if height < unit or width < unit or height % unit or width % unit:
        near = [max(unit, round(side / unit) * unit) for side in (height, width)]
        raise JaxsdError(
            f"height and width must be multiples of {unit}, not {height}x{width}; "
            f"{near[0]}x{near[1]} is near"
        )
    return height // downscale, width // downscale, unet.in_channels
