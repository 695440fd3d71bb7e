"""Stable Diffusions of a few thousand random weights, as diffusers builds them, by family."""

import diffusers
import numpy as np
import torch
import transformers
from torch_reference import randomise

from jaxsd.tokenizer import train_tokenizer

WORDS = ["a red seven on white", "a blue three", "blue", "a green nine, tilted"]
SIZE = 16  # pixels; the VAE halves once
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
CHANNELS = {"inpaint": 9, "instruct": 8}


def scheduler():
    return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SD)


def unet(kind: str, family: str, **changes) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    options = dict(
        sample_size=SIZE // 2,
        in_channels=CHANNELS.get(kind, 4),
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    if family != "sd1":
        options |= dict(attention_head_dim=(1, 2), use_linear_projection=True)
    if family == "sd2":
        options |= dict(upcast_attention=True)
    if family in ("sdxl", "refiner"):
        count = 6 if family == "sdxl" else 5
        options |= dict(
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 + 8 * count,
            cross_attention_dim=18 if family == "sdxl" else 10,
        )
    return randomise(diffusers.UNet2DConditionModel(**options | changes), 1, 0.3)


def vae(drawn: bool = True) -> diffusers.AutoencoderKL:
    """With `drawn=False` the encoder is sure of itself: a draw is the mean."""
    torch.manual_seed(0)
    module = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIZE,
    )
    randomise(module, 2, 0.1)
    if not drawn:
        with torch.no_grad():
            module.quant_conv.weight[4:] = 0
            module.quant_conv.bias[4:] = -30
    return module


def tokenizer(folder, pad: str | None = None):
    train_tokenizer(WORDS, folder, 540)
    words = transformers.CLIPTokenizer.from_pretrained(str(folder))
    if pad is not None:
        words.pad_token = pad
    return words


def text_tower(size: int, width: int = 8, projection: int | None = None, act: str = "quick_gelu"):
    config = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act=act,
        projection_dim=projection or 512,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    torch.manual_seed(0)
    return randomise(kind(config), width, 0.3)


def components(folder, family: str = "sd1", kind: str = "", drawn: bool = True) -> dict:
    """Everything that a pipeline of diffusers takes; the tokenizers' files go into `folder`."""
    parts = dict(unet=unet(kind, family), vae=vae(drawn), scheduler=scheduler())
    words = tokenizer(folder / "tokenizer")
    if family in ("sd1", "sd2"):
        tower = text_tower(len(words), act="gelu" if family == "sd2" else "quick_gelu")
        none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        return parts | dict(text_encoder=tower, tokenizer=words) | none
    words_2 = tokenizer(folder / "tokenizer_2", pad="!")
    parts |= dict(tokenizer_2=words_2, text_encoder_2=text_tower(len(words_2), 10, 6, "gelu"))
    if family == "refiner":
        return parts | dict(text_encoder=None, tokenizer=None, requires_aesthetics_score=True)
    return parts | dict(tokenizer=words, text_encoder=text_tower(len(words)))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def whole(images) -> np.ndarray:
    """PIL images as whole numbers [n, h, w, c]."""
    return np.stack([np.asarray(image) for image in images]).astype(int)
