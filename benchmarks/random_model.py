"""A model of random weights at full size, for comparing and timing without a checkpoint.

`python benchmarks/random_model.py sd1 /tmp/sd1` writes a diffusers folder of a family of
jaxsd/families.py: networks made and saved by diffusers and transformers, one after the other, with
a small tokenizer. Needs pip install "jaxsd[torch]".
"""

import dataclasses
import gc
from pathlib import Path
from typing import Literal

import diffusers
import torch
import transformers
import tyro

from jaxsd import weights
from jaxsd.components import make_index
from jaxsd.families import Family, get_family
from jaxsd.hub import FOLDERS
from jaxsd.models.config import Config
from jaxsd.tokenizer import train_tokenizer

CAPTIONS = ["a red seven on a white background", "a blue three", "a photograph of an astronaut"]
TOKENS = 540  # 256 bytes, 256 that end a word, a few merges, start and end


@dataclasses.dataclass(frozen=True)
class Options:
    """Write a diffusers folder of random weights."""

    family: tyro.conf.Positional[str]
    """A row of jaxsd/families.py, such as sd1, sd2-v, sdxl."""
    folder: tyro.conf.Positional[Path]
    dtype: Literal["float32", "float16"] = "float32"
    """Of the weights in the files."""


def write(family: Family, folder: Path, dtype: str = "float32", noise: float = 0.005) -> None:
    """Writes the folder; `noise` is the deviation of what is added to torch's initial weights.

    It keeps norms from being ones and zeros, and activations at a natural size.
    """
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    configs = {name: getattr(family, name, None) for name in FOLDERS}
    configs = {name: config for name, config in configs.items() if config is not None}
    for name, config in configs.items():
        if name.startswith("text_encoder"):
            words = name.replace("text_encoder", "tokenizer")
            end = train_tokenizer(CAPTIONS, folder / words, TOKENS).eos_token_id
            config = dataclasses.replace(config, eos_token_id=end)
        module = make(config)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(noise * torch.randn(parameter.shape))
        module.to(getattr(torch, dtype)).save_pretrained(folder / name)
        del module
        gc.collect()
    weights.write_json(folder / "scheduler" / "scheduler_config.json", family.schedule.to_json())
    index = make_index(configs, family.schedule)
    weights.write_json(folder / "model_index.json", index)


def make(config: Config) -> torch.nn.Module:
    """The network of diffusers or transformers that a config of ours describes."""
    torch.manual_seed(0)
    values = config.to_json()
    if "_class_name" in values:
        return getattr(diffusers, values["_class_name"]).from_config(values)
    (name,) = values["architectures"]
    return getattr(transformers, name)(transformers.CLIPTextConfig.from_dict(values))


if __name__ == "__main__":
    options = tyro.cli(Options)
    write(get_family(options.family), options.folder, options.dtype)
