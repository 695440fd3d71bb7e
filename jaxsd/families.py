"""The model families whose configs come with the package: a table."""

import dataclasses

from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError
from jaxsd.models import (
    CLIPTextConfig,
    CLIPTextProjectionConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    TinyVAEConfig,
    UNet2DConfig,
    UNetConfig,
    VAEConfig,
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Configs of one kind of model; a pixel model has neither VAE nor text towers."""

    unet: UNetConfig | UNet2DConfig
    schedule: Schedule
    vae: VAEConfig | None = None
    text_encoder: CLIPTextConfig | None = None
    image_encoder: CLIPVisionConfig | None = None  # trains the text tower; sampling needs it not
    text_encoder_2: CLIPTextConfig | None = None  # Stable Diffusion XL's; its refiner's only one
    tiny_vae: TinyVAEConfig | None = None  # TAESD, for previews
    controlnet: ControlNetConfig | None = None


# The noise levels of every Stable Diffusion; each model names the sampler it was published with.
SD_SCHEDULE = Schedule(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
PNDM = dataclasses.replace(SD_SCHEDULE, class_name="PNDMScheduler")
EULER = dataclasses.replace(SD_SCHEDULE, class_name="EulerDiscreteScheduler")
EULER_ANCESTRAL = dataclasses.replace(
    SD_SCHEDULE, class_name="EulerAncestralDiscreteScheduler", timestep_spacing="linspace"
)
V_PREDICTION = dataclasses.replace(SD_SCHEDULE, prediction_type="v_prediction")

SD1_UNET = UNetConfig(sample_size=64, cross_attention_dim=768)
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

SDXL_UNET = UNetConfig(
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),  # heads
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,  # 1280 of the pooled text, 6 numbers of 256
)
REFINER_UNET = dataclasses.replace(
    SDXL_UNET,
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    block_out_channels=(384, 768, 1536, 1536),
    transformer_layers_per_block=4,
    attention_head_dim=(6, 12, 24, 24),  # heads
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560,  # one number fewer: an aesthetic score for a size
)
SDXL_VAE = VAEConfig(sample_size=1024, scaling_factor=0.13025)
# OpenCLIP's ViT-bigG
BIG_TEXT = CLIPTextProjectionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)

SD1 = Family(
    SD1_UNET,
    PNDM,
    VAEConfig(),
    CLIPTextConfig(),
    tiny_vae=TinyVAEConfig(),
    controlnet=ControlNetConfig.from_unet(SD1_UNET),
)
SD2 = Family(
    SD2_UNET,
    PNDM,
    VAEConfig(),
    SD2_TEXT,
    tiny_vae=TinyVAEConfig(),
    controlnet=ControlNetConfig.from_unet(SD2_UNET),
)
SDXL = Family(
    SDXL_UNET,
    EULER,
    SDXL_VAE,
    CLIPTextConfig(),
    text_encoder_2=BIG_TEXT,
    tiny_vae=TinyVAEConfig(),  # TAESDXL: other weights
    controlnet=ControlNetConfig.from_unet(SDXL_UNET),
)

# As in the models' config files
FAMILIES = {
    # Stable Diffusion 1.1 to 1.5
    "sd1": SD1,
    # The input is latents 4, mask 1, latents of the masked picture 4
    "sd1-inpaint": dataclasses.replace(
        SD1, unet=dataclasses.replace(SD1_UNET, in_channels=9), schedule=SD_SCHEDULE
    ),
    # Brooks et al. 2022: latents 4, latents of the picture to edit 4
    "instruct-pix2pix": dataclasses.replace(
        SD1, unet=dataclasses.replace(SD1_UNET, in_channels=8), schedule=EULER_ANCESTRAL
    ),
    # Luo et al. 2023: told the guidance scale, sampled in 4 steps
    "sd1-lcm": dataclasses.replace(
        SD1,
        unet=dataclasses.replace(SD1_UNET, time_cond_proj_dim=256),
        schedule=dataclasses.replace(
            SD_SCHEDULE, class_name="LCMScheduler", set_alpha_to_one=True, steps_offset=0
        ),
    ),
    # Stable Diffusion 2.0-base and 2.1-base: 512 px
    "sd2": SD2,
    # Stable Diffusion 2.0 and 2.1: 768 px
    "sd2-v": dataclasses.replace(
        SD2,
        unet=dataclasses.replace(SD2_UNET, sample_size=96),
        schedule=V_PREDICTION,
        vae=VAEConfig(sample_size=768),
    ),
    "sd2-inpaint": dataclasses.replace(SD2, unet=dataclasses.replace(SD2_UNET, in_channels=9)),
    # Sauer et al. 2023: Stable Diffusion 2.1 in 1 to 4 steps, without guidance
    "sd-turbo": dataclasses.replace(
        SD2, schedule=dataclasses.replace(EULER, timestep_spacing="trailing")
    ),
    # Stable Diffusion XL 1.0 (Podell et al. 2023): 1024 px
    "sdxl": SDXL,
    "sdxl-refiner": dataclasses.replace(
        SDXL, unet=REFINER_UNET, text_encoder=None, controlnet=None
    ),
    "sdxl-inpaint": dataclasses.replace(SDXL, unet=dataclasses.replace(SDXL_UNET, in_channels=9)),
    "sdxl-turbo": dataclasses.replace(
        SDXL,
        unet=dataclasses.replace(SDXL_UNET, sample_size=64),
        schedule=dataclasses.replace(EULER_ANCESTRAL, timestep_spacing="trailing"),
    ),
    # Ho et al. 2020: 32 px, without conditions
    "ddpm-cifar10": Family(
        UNet2DConfig(
            sample_size=32,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(128, 256, 256, 256),
            attention_head_dim=None,  # one head
            norm_eps=1e-6,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
        ),
        Schedule(class_name="DDPMScheduler"),
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
        # 7.5 is for large pictures: a prompt that is followed so hard breaks strokes of these
        dataclasses.replace(V_PREDICTION, default_guidance_scale=3.0),
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
        Schedule(
            beta_schedule="cosine",
            prediction_type="v_prediction",
            # Cut pixels do not go with guided noise, which DDIM keeps: more draws other digits
            default_guidance_scale=1.0,
        ),
    ),
}


def get_family(name: str) -> Family:
    """Looks a family up; JaxsdError names the ones there are."""
    if name not in FAMILIES:
        raise JaxsdError(f"unknown family {name!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def size_unit(unet: UNetConfig | UNet2DConfig, downscale: int) -> int:
    """What height and width must be multiples of."""
    # In pixel space the UNet itself halves the picture; latents may be of any size.
    return downscale if downscale > 1 else 2 ** (len(unet.block_out_channels) - 1)


def latent_shape(
    unet: UNetConfig | UNet2DConfig, downscale: int, height: int, width: int, predicted: int = 1
) -> tuple[int, int, int]:
    """[h, w, c] of the latents of a picture; JaxsdError if the size does not divide.

    downscale: 1 for a pixel model, 8 for Stable Diffusion. predicted: the schedule's
    `pictures_predicted`.
    """
    unit = size_unit(unet, downscale)
    if height < unit or width < unit or height % unit or width % unit:
        near = [max(unit, round(side / unit) * unit) for side in (height, width)]
        raise JaxsdError(
            f"height and width must be multiples of {unit}, not {height}x{width}; "
            f"{near[0]}x{near[1]} is near"
        )
    return height // downscale, width // downscale, unet.out_channels // predicted
