"""Whole pipelines with LoRAs and new words added: the same pictures as diffusers makes."""

import diffusers
import numpy as np
import pytest
import tiny_torch
import torch
from lora_reference import random_lora
from tiny_torch import SIZE, quiet, whole
from torch_reference import nchw

import jaxsd
from jaxsd.weights import embeddings, lora_files
from jaxsd.weights.embeddings import Embedding

TOLERANCE = 1  # of 255, from rounding to whole numbers on both sides
PROMPTS, SEEDS = ["a red <cat> on white", "<cat>, a blue three"], [3, 4]
PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}

pytestmark = [
    # Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_same_pictures(tmp_path, family):
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    theirs = quiet(PIPELINES[family](**tiny_torch.components(tmp_path / "words", family)))
    theirs.save_pretrained(tmp_path / "model", safe_serialization=True)
    ours = jaxsd.load(tmp_path / "model")
    noise = nchw(np.array(ours.noise(SEEDS)))

    def pictures() -> tuple[np.ndarray, np.ndarray]:
        options = {"num_inference_steps": 5, "height": SIZE, "width": SIZE, "latents": noise}
        there = whole(theirs(PROMPTS, guidance_scale=5.0, **options).images)
        here = whole(ours(PROMPTS, SEEDS, steps=5, guidance_scale=5.0, sampler="ddim"))
        print("greatest difference", np.abs(here - there).max())
        assert here.std() > 10 and np.abs(here - there).max() <= TOLERANCE
        return here, there

    plain, _ = pictures()

    rng = np.random.default_rng(0)
    widths = {"text_encoder": 8} | ({"text_encoder_2": 10} if family == "sdxl" else {})
    vectors = {name: rng.normal(size=(2, n)).astype(np.float32) for name, n in widths.items()}
    file = embeddings.save(
        Embedding("<cat>", vectors), tmp_path, "sdxl" if family == "sdxl" else "diffusers"
    )
    ours.add_embedding(file)
    for name, value in vectors.items():
        tower, words = (
            getattr(theirs, name),
            getattr(theirs, name.replace("text_encoder", "tokenizer")),
        )
        tensor = torch.from_numpy(value)
        theirs.load_textual_inversion(tensor, token="<cat>", text_encoder=tower, tokenizer=words)
    worded, _ = pictures()
    assert np.abs(worded - plain).max() > 10

    scales = [0.05, 0.1]
    for i, form in enumerate(("peft", "kohya")):
        made = random_lora(theirs, rank=2 + i, alpha=2.0, seed=i)
        file = lora_files.save(made, tmp_path / f"{form}.safetensors", form)
        theirs.load_lora_weights(str(file), adapter_name=form)
        ours.add_lora(file, scales[i])
    theirs.set_adapters(["peft", "kohya"], scales)
    changed, _ = pictures()
    assert np.abs(changed - worded).max() > 10
    ours.merge_loras()
    pictures()
