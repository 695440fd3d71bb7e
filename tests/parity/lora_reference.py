"""Tiny pipelines of diffusers, LoRAs of all their layers, and how weights are held together."""

import copy
import functools
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from torch_reference import randomise, relative_error

from jaxsd.weights import lora, lora_files
from jaxsd.weights.lora import Layer, LoRA

WEIGHTS, OUTPUTS = 1e-6, 1e-4  # relative errors allowed

UNET = {
    "sample_size": 8,
    "block_out_channels": (4, 8),
    "layers_per_block": 2,  # LDM's names count blocks of this many, plus one
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}
XL = UNET | {
    "cross_attention_dim": 16,
    "attention_head_dim": (1, 2),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 20,
}
TEXT = {
    "vocab_size": 99,
    "eos_token_id": 98,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 8,
}


def text_tower(cls):
    return randomise(cls(transformers.CLIPTextConfig(**TEXT, bos_token_id=97)))


@functools.cache
def _sd1() -> diffusers.StableDiffusionPipeline:
    torch.manual_seed(0)
    return diffusers.StableDiffusionPipeline(
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        unet=randomise(diffusers.UNet2DConditionModel(**UNET)),
        text_encoder=text_tower(transformers.CLIPTextModel),
        requires_safety_checker=False,
        **dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor")),
    )


@functools.cache
def _sdxl() -> diffusers.StableDiffusionXLPipeline:
    torch.manual_seed(0)
    return diffusers.StableDiffusionXLPipeline(
        unet=randomise(diffusers.UNet2DConditionModel(**XL)),
        text_encoder=text_tower(transformers.CLIPTextModel),
        text_encoder_2=text_tower(transformers.CLIPTextModelWithProjection),
        scheduler=diffusers.DDIMScheduler(),
        **dict.fromkeys(("vae", "tokenizer", "tokenizer_2")),
    )


def pipeline(family: str):
    """ "sd1" or "sdxl"; one for all tests, which must not change it."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    return {"sd1": _sd1, "sdxl": _sdxl}[family]()


COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def our_name(name: str, component: str) -> str:
    """Text towers have the prefix here, whatever transformers' version."""
    name = name.replace(".base_layer.", ".")
    bare = component != "unet" and not name.startswith(("text_model.", "text_projection."))
    return f"text_model.{name}" if bare else name


def weights(pipe) -> dict[str, dict[str, jax.Array]]:
    return {
        component: {
            our_name(name, component): jnp.array(value.detach().numpy())
            for name, value in module.state_dict().items()
            if "lora_" not in name
        }
        for component in COMPONENTS
        if (module := getattr(pipe, component, None)) is not None
    }


def shapes(pipe) -> dict[str, dict[str, tuple[int, ...]]]:
    return {c: {n: v.shape for n, v in found.items()} for c, found in weights(pipe).items()}


def random_lora(pipe, rank=4, alpha=2.0, seed=0, without="embedding", layers=r"") -> LoRA:
    """A change of every linear layer and convolution but those whose names contain `without`."""
    rng = np.random.default_rng(seed)
    changed = {
        component: {
            name: Layer(
                rng.normal(size=(rank, *shape[1:])).astype(np.float32),
                rng.normal(size=(shape[0], rank)).astype(np.float32),
                alpha,
            )
            for name, shape in found.items()
            if name.endswith(".weight") and len(shape) in (2, 4)
            if without not in name and re.search(layers, name)
        }
        for component, found in shapes(pipe).items()
    }
    return LoRA(changed)


def loaded(pipe, *files_and_scales):
    """diffusers' pipeline with these LoRAs, several at once."""
    pipe = copy.deepcopy(pipe)
    names = [f"a{i}" for i in range(len(files_and_scales))]
    for name, (file, _) in zip(names, files_and_scales, strict=True):
        pipe.load_lora_weights(str(file), adapter_name=name)
    pipe.set_adapters(names, [scale for _, scale in files_and_scales])
    return pipe


def merged(pipe, *files_and_scales) -> dict[str, dict[str, jax.Array]]:
    loras = [(lora_files.read(file, shapes(pipe)), scale) for file, scale in files_and_scales]
    return lora.merge(weights(pipe), loras)


def assert_same(ours, theirs, base, changed: int):
    """Every weight agrees, and as many as we think differ from the model without LoRA."""
    assert ours.keys() == theirs.keys()
    different = 0
    for component, params in ours.items():
        assert params.keys() == theirs[component].keys()
        for name, value in params.items():
            assert relative_error(value, np.asarray(theirs[component][name])) <= WEIGHTS, name
            different += bool(np.abs(value - base[component][name]).max() > 1e-3)
    assert different == changed


def assert_fuses_alike(pipe, *files_and_scales, changed: int):
    theirs = loaded(pipe, *files_and_scales)
    theirs.fuse_lora(components=list(weights(pipe)))
    assert_same(merged(pipe, *files_and_scales), weights(theirs), weights(pipe), changed)
