"""LoRAs of a tiny model, and files that say what we like."""

import json
import struct

import ml_dtypes
import numpy as np
import tiny

from jaxsd.models import CLIPTextModel, UNet
from jaxsd.nn import Net
from jaxsd.weights.entries import open_tensors
from jaxsd.weights.headers import read_entries
from jaxsd.weights.lora import Layer, LoRA

NETS = {"unet": Net(UNet(tiny.LATENT_UNET)), "text_encoder": Net(CLIPTextModel(tiny.TEXT))}
Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.weight"  # linear
K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"  # tells the family
OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"
CONV = "down_blocks.1.resnets.0.conv1.weight"  # 3x3
PROJ = "down_blocks.1.attentions.0.proj_in.weight"  # 1x1
TEXT = "text_model.encoder.layers.0.self_attn.out_proj.weight"
PLACES = [("unet", name) for name in (Q, K, OUT, CONV, PROJ)] + [("text_encoder", TEXT)]


def factors(shape, rank=2, seed=0, **kwargs) -> Layer:
    rng = np.random.default_rng(seed)
    down, up = rng.normal(size=(rank, *shape[1:])), rng.normal(size=(shape[0], rank))
    return Layer(down.astype(np.float32), up.astype(np.float32), **{"alpha": float(rank)} | kwargs)


def example(rank=2, seed=0, **kwargs) -> LoRA:
    layers = {"unet": {}, "text_encoder": {}}
    for i, (component, name) in enumerate(PLACES):
        shape = NETS[component].shapes[name]
        layers[component][name] = factors(shape, rank, seed + i, **kwargs)
    return LoRA(layers)


def tensors_of(file) -> dict[str, np.ndarray]:
    entries = read_entries(file)
    with open_tensors(file) as mapped:
        return {name: np.array(mapped.get(entry)) for name, entry in entries.items()}


def write(path, tensors, metadata=None):
    """A safetensors file of any dtypes."""
    codes = {"f4": "F32", "f2": "F16", "i8": "I64", "f8": "F64", "i4": "I32", "V2": "BF16"}
    table, data = {"__metadata__": metadata or {}}, b""
    for name, value in tensors.items():
        value = np.asarray(value)
        code = "BF16" if value.dtype == ml_dtypes.bfloat16 else codes[value.dtype.str[1:]]
        table[name] = {
            "dtype": code,
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + value.nbytes],
        }
        data += value.tobytes()
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
