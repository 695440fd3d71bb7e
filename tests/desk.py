"""What readers bring to the commands of the docs, in small: models, LoRAs, words, pictures, lists.

Each lies where the docs say, relative to the folder that they are put on: `path/to/sd15` is a tiny
model of Stable Diffusion's parts with random weights, and so on.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import tiny
from PIL import Image

from jaxsd.components import Component, make_net, save_component
from jaxsd.diffusion.schedule import Schedule
from jaxsd.models import ControlNetConfig, TinyVAEConfig
from jaxsd.pipeline import Pipeline
from jaxsd.tokenizer import train_tokenizer
from jaxsd.weights import edits, embeddings, lora_files
from jaxsd.weights.edits import Edit
from jaxsd.weights.embeddings import Embedding
from jaxsd.weights.lora import Layer, LoRA

SENTENCES = ["a photo of a cat", "a lighthouse on a beach", "a castle in winter", "a bird", "cat"]
SD = "path/to/sd15"
SAME = ("path/to/stable-diffusion-v1-5", "path/to/model", "my-folder", "run/model")
PICTURES = ("bird", "castle", "edges", "seven", "street")
FOLDERS = ("cat", "pictures", "captioned")
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.weight"


def pipeline(words, xl: bool = False, **changes) -> Pipeline:
    """As `tiny.pipeline`, but it reads prompts of 77 tokens; changes: of the UNet's config."""
    towers = tiny.xl_towers(words) if xl else tiny.towers(words, max_position_embeddings=77)
    changes |= {"mid_block_type": "UNetMidBlock2DCrossAttn", **(tiny.XL_CHANGES if xl else {})}
    config = dataclasses.replace(tiny.LATENT_UNET, **changes)
    unet = make_net(config)
    schedule = Schedule(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    parts = {**towers.components, **towers.tokenizers}
    return Pipeline(Component(unet, tiny.parameters(unet)), schedule, **parts, zero_empty_prompt=xl)


def lay_out(desk: Path) -> None:
    """Makes everything, in an empty folder."""
    words = train_tokenizer(SENTENCES * 4 + tiny.CAPTIONS, desk / "words", 600)
    sd = pipeline(words)
    for place in (SD, *SAME):
        sd.save(desk / place)
    students = {"time_cond_proj_dim": 8, "guidance_range": (2.0, 14.0)}
    for place in ("guided/model", "fast/4-steps/model", "path/to/lcm"):
        pipeline(words, **students).save(desk / place)
    pipeline(words, in_channels=9).save(desk / "path/to/inpainting")
    pipeline(words, in_channels=8).save(desk / "path/to/instruct-pix2pix")
    pipeline(words, xl=True).save(desk / "path/to/sdxl")
    shutil.copytree(desk / "path/to/sdxl", desk / "path/to/sdxl-refiner")
    _small_networks(sd, desk)
    _additions(sd, desk)
    _pictures(desk)
    (desk / "prompts.txt").write_text("a castle\na lighthouse on a beach\n")
    (desk / "run/config.json").write_text('{"recipe": "TextToImage", "steps": 10000}')
    (desk / "run/metrics.jsonl").write_text('{"step": 50, "loss": 0.5}\n')


def _small_networks(sd: Pipeline, desk: Path) -> None:
    downscale = {"conditioning_embedding_out_channels": (4, 4)}
    control = dataclasses.replace(ControlNetConfig.from_unet(sd.unet.config), **downscale)
    tiny_vae = TinyVAEConfig(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    for place, config in (("path/to/canny", control), ("path/to/taesd", tiny_vae)):
        net = make_net(config)
        save_component(desk / place, net, tiny.parameters(net))


def _additions(sd: Pipeline, desk: Path) -> None:
    """LoRAs, a new word, an edit."""
    rng = np.random.default_rng(0)
    rows, columns = sd.unet.shapes[QUERY]
    down = rng.normal(size=(2, columns)).astype(np.float32)
    up = rng.normal(size=(rows, 2)).astype(np.float32)
    lora = LoRA({"unet": {QUERY: Layer(down, up, 2.0)}})
    (desk / "style/model").mkdir(parents=True)
    lora_files.save(lora, desk / "style/model/pytorch_lora_weights.safetensors")
    for name in ("style", "detail", "castle"):
        lora_files.save(lora, desk / f"{name}.safetensors")
    vector = rng.normal(size=(1, tiny.TEXT.hidden_size)).astype(np.float32)
    word = Embedding("<cat>", {"text_encoder": vector})
    (desk / "cat-word/model").mkdir(parents=True)
    embeddings.save(word, desk / "cat.safetensors")
    embeddings.save(word, desk / "cat-word/model/learned_embeds.safetensors")
    told = {k: np.asarray(v) for k, v in sd.encode(["a bird"]).items()}
    shutil.copytree(desk / SD, desk / "wings")
    edits.save(Edit("a bird spreading its wings", told, told, sd.default_size), desk / "wings")


def _pictures(desk: Path) -> None:
    rng = np.random.default_rng(0)
    for name in PICTURES:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(desk / f"{name}.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(desk / "mask.png")
    for folder in FOLDERS:
        (desk / folder).mkdir()
        for i in range(8):
            array = rng.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(array).save(desk / folder / f"{i}.png")
            if folder != "cat":
                (desk / folder / f"{i}.txt").write_text("a castle")
