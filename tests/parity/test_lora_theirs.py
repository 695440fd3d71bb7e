"""LoRA files of every spelling, as diffusers and peft write or read them: same weights here."""

import copy
import itertools
from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from lora_reference import (
    COMPONENTS,
    assert_fuses_alike,
    assert_same,
    merged,
    pipeline,
    random_lora,
    shapes,
    weights,
)

from jaxsd.errors import JaxsdError
from jaxsd.weights import lora_files
from jaxsd.weights.ldm import unet_names
from jaxsd.weights.lora import LoRA

# peft, about the second adapter of a model
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


@pytest.fixture
def sd1():
    return pipeline("sd1")


@pytest.fixture
def sdxl():
    return pipeline("sdxl")


# --- What they write -------------------------------------------------------------------------

LCM = (  # what the LCM-LoRAs change
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
).split()
CONFIGS = {
    "alpha": {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_out.0", "conv1"]},
    "all layers": {"r": 2, "lora_alpha": 2, "target_modules": LCM},
    "ranks": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["to_q", "to_k", "proj_in"],
        "rank_pattern": {"^mid_block.attentions.0.proj_in": 2, "attn1.to_k": 3},
        "alpha_pattern": {"^mid_block.attentions.0.proj_in": 5, "attn1.to_k": 1},
    },
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": ["to_q"], "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "conv2"], "use_dora": True},
}
TEXT_CONFIG = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "out_proj", "fc1"]}


def with_adapters(pipe, config):
    """The pipeline with random factors added to its UNet and its text towers."""
    pipe = copy.deepcopy(pipe)
    for component in weights(pipe):
        module = getattr(pipe, component)
        module.add_adapter(peft.LoraConfig(**(config if component == "unet" else TEXT_CONFIG)))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, value in module.named_parameters():
                if "lora_" in name:
                    value.add_(0.5 * torch.randn(value.shape, generator=generator))
    return pipe


def adapters(pipe) -> int:
    parts = [getattr(pipe, name) for name in COMPONENTS if getattr(pipe, name, None) is not None]
    return sum(hasattr(m, "lora_A") for part in parts for m in part.modules())


def save_theirs(pipe, folder, metadata: bool, safe=True):
    values = {}
    for component in weights(pipe):
        module = getattr(pipe, component)
        values[f"{component}_lora_layers"] = peft.get_peft_model_state_dict(module)
        if metadata:
            config = module.peft_config["default"].to_dict()
            values[f"{component}_lora_adapter_metadata"] = config
    pipe.save_lora_weights(folder, safe_serialization=safe, **values)


# Each of one family: of the other, whose names are made the same way, the slow tests have them
FIRST = {"alpha": "sd1", "rslora": "sd1", "all layers": "sdxl", "ranks": "sdxl", "dora": "sdxl"}


@pytest.mark.parametrize(
    "name, family",
    [
        pytest.param(*case, marks=[] if case in FIRST.items() else pytest.mark.slow)
        for case in itertools.product(CONFIGS, ["sd1", "sdxl"])
    ],
)
def test_what_they_write(tmp_path, family, name):
    base = pipeline(family)
    theirs = with_adapters(base, CONFIGS[name])
    save_theirs(theirs, tmp_path, metadata=True)
    for scale in (1.0, 0.3):
        assert_fuses_alike(base, (tmp_path, scale), changed=adapters(theirs))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_before_there_was_metadata(sd1, tmp_path, safe):
    """Without a word about alpha it is the rank."""
    theirs = with_adapters(sd1, CONFIGS["all layers"])
    save_theirs(theirs, tmp_path, metadata=False, safe=safe)
    assert_fuses_alike(sd1, (tmp_path, 1.0), changed=adapters(theirs))


def test_a_folder_of_pefts_own(sd1, tmp_path):
    """base_model.model. before the names, no component, alpha in adapter_config.json."""
    config = peft.LoraConfig(**CONFIGS["ranks"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(sd1.unet), config)
    theirs.save_pretrained(tmp_path)
    base, changed = weights(sd1), sum(hasattr(m, "lora_A") for m in theirs.modules())
    expected = {
        name: jnp.array(value.numpy())
        for name, value in theirs.merge_and_unload().state_dict().items()
    }
    ours = merged(sd1, (tmp_path, 1.0))
    assert_same(ours, base | {"unet": expected}, base, changed=changed)


def test_lcm_lora(sd1, tmp_path):
    """As diffusers' script of consistency distillation writes it: kohya's names, every layer."""
    theirs = with_adapters(sd1, CONFIGS["all layers"] | {"lora_alpha": 1})
    found = peft.get_peft_model_state_dict(theirs.unet)
    found = {f"unet.{name}": value for name, value in found.items()}
    found = diffusers.utils.convert_state_dict_to_kohya(found)
    alpha = torch.tensor(1)  # an integer
    found |= {name: alpha for name in found if name.endswith(".alpha")}
    file = tmp_path / "lcm.safetensors"
    safetensors.torch.save_file(
        {name: value.half() if value.ndim else value.clone() for name, value in found.items()}, file
    )
    assert {name.split(".")[-1] for name in found} == {"weight", "alpha"}
    assert_fuses_alike(sd1, (file, 1.0), changed=len(found) // 3)


def written(lora: LoRA, file, spell) -> Path:
    """A LoRA under other names: spell(component, module) -> the names of down, up and alpha."""
    found = {}
    for component, layers in lora.layers.items():
        for name, layer in layers.items():
            down, up, alpha = spell(component, name.removesuffix(".weight"))
            kernel = (1, 1) if layer.down.ndim == 4 else ()
            found[down] = torch.from_numpy(layer.down)
            found[up] = torch.from_numpy(layer.up.reshape(*layer.up.shape, *kernel))
            found |= {alpha: torch.tensor(layer.alpha)} if alpha else {}
    if file.suffix == ".bin":
        torch.save(found, file)
    else:
        safetensors.torch.save_file(found, file)
    return file


def kohya(prefix: str, module: str) -> tuple[str, str, str]:
    stem = prefix + module.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def test_kohya_with_the_names_of_ldm(sdxl, tmp_path):
    table = unet_names(shapes(sdxl)["unet"])

    def spell(component, module):
        if component == "unet":
            return kohya("lora_unet_", table[f"{module}.weight"].removesuffix(".weight"))
        return kohya(
            {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component], module
        )

    made = random_lora(sdxl, without="embeddings")
    file = written(made, tmp_path / "xl.safetensors", spell)
    assert_fuses_alike(sdxl, (file, 0.7), changed=sum(map(len, made.layers.values())))


def old_attention(component, module):
    """The first form: attention alone, each layer by the attention's name and its own."""
    stem, _, last = module.removesuffix(".0").rpartition(".")
    last = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(
        last, last
    )
    between = ".processor" if component == "unet" else ""
    return [f"{component}.{stem}{between}.{last}_lora.{part}.weight" for part in ("down", "up")] + [
        None
    ]


def old_layers(component, module):
    """The second: any layer."""
    kind = "lora" if component == "unet" or "projection" in module else "lora_linear_layer"
    return [f"{component}.{module}.{kind}.{part}.weight" for part in ("down", "up")] + [None]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("spell", [old_attention, old_layers])
def test_old_diffusers(sdxl, tmp_path, spell, kind):
    layers = r"\.attn\d\.|self_attn" if spell is old_attention else ""
    made = random_lora(sdxl, alpha=4.0, without="embedding", layers=layers)
    file = written(made, tmp_path / f"old.{kind}", spell)
    assert_fuses_alike(sdxl, (file, 0.7), changed=sum(map(len, made.layers.values())))


# --- Damaged or hostile ----------------------------------------------------------------------


def test_damaged_pickles(sd1, tmp_path):
    """300 files of torch.save with a bit turned or the end cut off."""
    made = random_lora(sd1, rank=1, layers="attn1.to_q|self_attn.q_proj")
    data = written(made, tmp_path / "whole.bin", old_layers).read_bytes()
    rng, file, read = np.random.default_rng(0), tmp_path / "a.bin", 0
    wanted = shapes(sd1)
    for i in range(300):
        at = rng.integers(0, len(data))
        turned = data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :]
        file.write_bytes(data[:at] if i % 5 == 0 else turned)
        try:
            lora_files.read(file, wanted)
            read += 1
        except JaxsdError as error:
            assert "\n" not in str(error)
    assert 0 < read < 300  # zip archives have room between the files, and numbers may be any
