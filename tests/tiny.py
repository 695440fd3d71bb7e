"""Objectives small enough to compile in seconds, and batches for them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxsd.components import Component, make_net
from jaxsd.data import digits
from jaxsd.diffusion.schedule import Schedule
from jaxsd.models import (
    CLIPTextConfig,
    CLIPTextProjectionConfig,
    CLIPVisionConfig,
    UNetConfig,
    VAEConfig,
)
from jaxsd.nn import Net
from jaxsd.objectives.clip import CLIP
from jaxsd.objectives.ddpm import DDPM
from jaxsd.objectives.text_to_image import TextToImage
from jaxsd.objectives.vae import VAE
from jaxsd.pictures import to_uint8
from jaxsd.pipeline import Pipeline
from jaxsd.tokenizer import Tokenizer, train_tokenizer
from jaxsd.towers import Towers

CLASSES = 10
CAPTIONS = ["a red seven", "a blue three", "a green one on white", "nine"]
SMALL = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}

# Without attention: the gradient of a key's bias is zero but for rounding, which Adam magnifies.
PIXEL_UNET = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    down_block_types=("DownBlock2D",),
    mid_block_type=None,
    up_block_types=("UpBlock2D",),
    dropout=0.1,
    class_embed_type="simple_projection",
    projection_class_embeddings_input_dim=CLASSES,
    **SMALL | {"block_out_channels": (8,)},
)
LATENT_UNET = UNetConfig(
    sample_size=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    mid_block_type=None,
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
    cross_attention_dim=8,
    **SMALL,
)
XL_CHANGES = {
    "cross_attention_dim": 8 + 16,  # the widths of the text encoders
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 + 6 * 4,  # pooled text, and six numbers
}
VAE_CONFIG = VAEConfig(
    sample_size=8,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    scaling_factor=0.7,
    **SMALL,
)
TOWER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 8,
}
TEXT = CLIPTextConfig(vocab_size=600, max_position_embeddings=16, **TOWER)
VISION = CLIPVisionConfig(image_size=8, patch_size=4, **TOWER)


def pictures(count: int, channels: int = 3) -> np.ndarray:
    """[count, 8, 8, channels] in [-1, 1], each with a colour of its own under the noise."""
    rng = np.random.default_rng(0)
    colours = rng.uniform(-0.8, 0.8, (count, 1, 1, channels))
    return (colours + rng.uniform(-0.2, 0.2, (count, 8, 8, channels))).astype(np.float32)


def parameters(net: Net, seed: int = 0) -> dict[str, jax.Array]:
    """Random parameters, none of them zero; `Net.init` would compile for each shape there is."""
    rng = np.random.default_rng(seed)
    scales = {name: (np.prod(shape[1:]) or 1) ** -0.5 for name, shape in net.shapes.items()}
    return {
        name: jnp.asarray(rng.normal(len(shape) == 1, scales[name], shape), jnp.float32)
        for name, shape in net.shapes.items()
    }


class Spy(Net):
    """Stands in for a UNet: remembers what it was asked and answers a known function of it."""

    def __init__(self):
        self.config, self.shapes = LATENT_UNET, {}

    def __call__(self, params, z, t, dropout_key=None, **conditioning):
        self.z, self.t, self.conditioning = z, t, conditioning
        return jnp.tanh(z) + (t / 1000)[:, None, None, None]


def ddpm(**kwargs) -> DDPM:
    kwargs = {"unet": PIXEL_UNET, "schedule": Schedule(beta_schedule="cosine")} | kwargs
    return DDPM(**kwargs)


def ddpm_batch(count: int = 8) -> dict[str, np.ndarray]:
    return {"image": pictures(count, 1), "label": np.arange(count) % CLASSES}


def vae(**kwargs) -> VAE:
    return VAE(VAE_CONFIG, pictures(100), **kwargs)


def tokenizer(folder) -> Tokenizer:
    return train_tokenizer(CAPTIONS, folder, TEXT.vocab_size)


def clip(words: Tokenizer) -> CLIP:
    return CLIP(TEXT, VISION, words)


def towers(words: Tokenizer, **changes) -> Towers:
    known = {"vocab_size": len(words), "eos_token_id": words.eos_token_id}
    text = dataclasses.replace(TEXT, **known | changes)
    vae, tower = make_net(VAE_CONFIG), make_net(text)
    components = {
        "vae": Component(vae, parameters(vae)),
        "text_encoder": Component(tower, parameters(tower)),
    }
    return Towers(components, {"tokenizer": words})


def xl_towers(words: Tokenizer) -> Towers:
    """Two text encoders, the second with a projection, as Stable Diffusion XL has."""
    first = towers(words, num_hidden_layers=2)  # of which the last is not read
    text = first.nets["text_encoder"].config
    config = CLIPTextProjectionConfig(**{**vars(text), "hidden_size": 16, "projection_dim": 6})
    net = make_net(config)
    components = first.components | {"text_encoder_2": Component(net, parameters(net, 1))}
    return Towers(components, {"tokenizer": words, "tokenizer_2": words})


def pipeline(words: Tokenizer, xl: bool = False) -> Pipeline:
    """A model that draws, of Stable Diffusion's parts or of XL's."""
    parts = xl_towers(words) if xl else towers(words)
    unet = make_net(dataclasses.replace(LATENT_UNET, **(XL_CHANGES if xl else {})))
    return Pipeline(
        Component(unet, parameters(unet)),
        Schedule(prediction_type="v_prediction", clip_sample=False),
        **parts.components,
        **parts.tokenizers,
        zero_empty_prompt=xl,
    )


def text_to_image(words: Tokenizer, xl: bool = False, **kwargs) -> TextToImage:
    if xl:
        unet = dataclasses.replace(LATENT_UNET, **XL_CHANGES)
        made = {"unet": unet, "towers": xl_towers(words), "zero_empty_prompt": True}
    else:
        made = {"unet": LATENT_UNET, "towers": towers(words)}
    return TextToImage(**made | {"schedule": Schedule(prediction_type="v_prediction")} | kwargs)


def captioned_batch(words: Tokenizer) -> dict[str, np.ndarray]:
    return {"image": pictures(4), "input_ids": words(CAPTIONS, TEXT.max_position_embeddings)}


def save_model(folder: Path, words: Tokenizer) -> Path:
    """The folder of `pipeline`."""
    pipeline(words).save(folder)
    return folder


def save_pictures(folder: Path, count: int = 3) -> Path:
    """PNG files without captions."""
    for i, picture in enumerate(pictures(count)):
        Image.fromarray(to_uint8(picture)).save(folder / f"{i}.png")
    return folder


def save_digits_model(folder: Path) -> Path:
    """As `save_model`, of one that draws 32x32 pictures and reads the digits' captions whole."""
    corpus = [*digits.COLOUR_NAMES, *digits.DIGIT_WORDS, "the number digit", "on a background"]
    words = train_tokenizer(corpus, folder.parent / "words", 800)
    objective = text_to_image(words, unet=dataclasses.replace(LATENT_UNET, sample_size=16))
    objective.export(parameters(objective.net), folder)
    return folder
