"""`jaxsd compare` on tiny models: it agrees where PyTorch does, and names the block where not."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch_reference import randomise

import jaxsd.compare as comparing
from jaxsd.cli import run_command
from jaxsd.conversion import convert
from jaxsd.families import EULER, PNDM, SD_SCHEDULE, Family
from jaxsd.models import (
    CLIPTextConfig,
    CLIPTextProjectionConfig,
    ControlNetConfig,
    TinyVAEConfig,
    UNet2DConfig,
    UNetConfig,
    VAEConfig,
)

# Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def random_model():
    """benchmarks/random_model.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("random_model", BENCHMARKS / "random_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(kind: str) -> Family:
    """Stable Diffusion 1, 2 or XL of a few thousand weights."""
    unet = UNetConfig(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    vae = VAEConfig(
        sample_size=16,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
    )
    text = CLIPTextConfig(
        vocab_size=600,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    if kind == "sd1":
        return Family(unet, PNDM, vae, text)  # which has no clip_sample, as DDIM has
    linear = {"attention_head_dim": (1, 2), "use_linear_projection": True}
    if kind == "sd2":
        unet = dataclasses.replace(unet, **linear, upcast_attention=True)
        return Family(unet, SD_SCHEDULE, vae, dataclasses.replace(text, hidden_act="gelu"))
    unet = dataclasses.replace(
        unet,
        **linear,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 + 6 * 8,
    )
    values = dataclasses.asdict(text) | {"hidden_act": "gelu", "projection_dim": 6}
    text_2 = CLIPTextProjectionConfig(**values)
    return Family(unet, EULER, vae, text, text_encoder_2=text_2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Programs compiled by one test serve the next, and the user's cache stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "programs"
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        yield


@pytest.fixture(scope="module")
def sd1(tmp_path_factory, cache):
    return written("sd1", tmp_path_factory.mktemp("models"))


def written(kind: str, folder: Path) -> Path:
    random_model().write(tiny(kind), folder / kind, noise=0.2)
    return folder / kind


@pytest.fixture
def bfloat16():
    """jax's own attention promotes by itself in half precision."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def call(capsys, *arguments):
    """(exit status, stdout, stderr) of `jaxsd compare`."""
    status = 0
    try:
        run_command("compare", [str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


UNET_BLOCKS = (
    "time_embedding",
    "conv_in",
    "down_blocks.0.resnets.0",
    "down_blocks.0.downsamplers.0",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "mid_block",
    "up_blocks.0.resnets.1",
    "up_blocks.0.upsamplers.0",
    "up_blocks.1",
    "conv_norm_out",
    "conv_out",
)


@pytest.mark.slow
def test_sd1_agrees_in_both_dtypes(sd1, capsys, bfloat16):
    status, out, err = call(capsys, sd1, "--steps", 2, "--json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert said["agrees"] and said["notes"] == [] and said["model"] == said["reference"] == str(sd1)
    assert said["tolerance"]["float32"] == 1e-4 and said["tolerance"]["alone"] == 2e-5
    assert list(said["sections"]) == ["unet", "vae", "text_encoder", "trajectory"]
    rows, common = {}, {"name", "absolute", "relative"}
    for name, section in said["sections"].items():
        full, half = (section[dtype]["blocks"] for dtype in ("float32", "bfloat16"))
        worst = [section[dtype]["worst_relative"] for dtype in ("float32", "bfloat16")]
        print(name, *worst)
        assert section["unmatched"] == [] and section["float32"]["first_departing"] is None
        assert 0 < worst[0] <= 1e-5 and 1e-3 < worst[1] < 0.2  # rounding shows in both
        extra = set() if name == "trajectory" else {"alone"}
        assert all(set(row) == common | extra for row in full)
        assert all(set(row) == common | {"to_float32", "torch_to_float32"} for row in half)
        rows[name] = {row["name"]: row for row in full}
        assert list(rows[name]) == [row["name"] for row in half]
    assert list(rows["trajectory"]) == ["step 1, t = 501", "step 2, t = 1"]
    assert [name for name in rows["unet"] if name in UNET_BLOCKS] == list(UNET_BLOCKS)
    assert {"encoder", "quant_conv", "post_quant_conv", "decoder.up_blocks.1"} <= {*rows["vae"]}
    assert {"text_model.encoder.layers.0.mlp", "text_model"} <= {*rows["text_encoder"]}
    # By themselves, blocks that only pass on what is in them add nothing.
    middle = rows["unet"]["mid_block"], rows["unet"]["mid_block.resnets.0"]
    assert middle[0]["alone"] == 0 < middle[1]["alone"] and middle[0]["relative"] > 0
    assert "mid_block.resnets.0.conv1" not in rows["unet"]


@pytest.mark.slow
@pytest.mark.parametrize("kind, sampler", [("sd2", "dpmpp_2m"), ("sdxl", "euler")])
def test_others_agree(kind, sampler, tmp_path, cache, capsys):
    folder = written(kind, tmp_path)
    arguments = ("--steps", 3, "--sampler", sampler, "--height", 24, "--width", 16)
    status, out, _ = call(capsys, folder, *arguments, "--dtypes", "float32")
    towers = ["text_encoder"] if kind == "sd2" else ["text_encoder", "text_encoder_2"]
    parts = ["unet", "vae", *towers, "trajectory"]
    assert status == 0 and "!" not in out
    verdicts = out.splitlines()[-len(parts) :]
    assert [line.split(":")[0] for line in verdicts] == [f"{part} float32" for part in parts]
    assert all(line.endswith("; agrees") for line in verdicts)
    assert "latents [1, 12, 8, 4]" in out
    if kind == "sdxl":
        for name in ("add_embedding", "down_blocks.1.attentions.0.transformer_blocks.1.ff"):
            assert f"\n{name} " in out
        assert "\ntext_projection " in out and "not in PyTorch" not in out


def damaged(folder: Path, copy: Path, part: str, name: str, by: float = 0.2) -> Path:
    """A copy of the folder with one number of one weight changed by a share of the greatest."""
    shutil.copytree(folder, copy)
    (file,) = (copy / part).glob("*.safetensors")
    state = load_file(file)
    state[name] = state[name].copy()
    state[name].flat[0] += by * np.abs(state[name]).max()
    save_file(state, file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    "part, weight, block",
    [
        pytest.param(
            "unet",
            "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v.weight",
            "up_blocks.0.attentions.1.transformer_blocks.0.attn2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "vae",
            "decoder.mid_block.resnets.0.conv2.weight",
            "decoder.mid_block.resnets.0",
            marks=pytest.mark.slow,
        ),
        ("text_encoder", "encoder.layers.1.mlp.fc2.weight", "text_model.encoder.layers.1.mlp"),
    ],
)
def test_a_damaged_weight_is_found(sd1, tmp_path, capsys, part, weight, block):
    copy = damaged(sd1, tmp_path / "damaged", part, weight)
    arguments = (copy, "--reference", sd1, "--components", part, "--no-trajectory")
    status, out, _ = call(capsys, *arguments, "--dtypes", "float32", "--json")
    found = json.loads(out)["sections"][part]["float32"]
    assert status == 1 and found["first_departing"] == block
    # It alone is wrong by itself; what comes after it is only fed wrong values.
    assert [row["name"] for row in found["blocks"] if row["alone"] > 2e-5] == [block]
    assert sum(row["relative"] > 1e-4 for row in found["blocks"]) > 1


def with_option(folder: Path, copy: Path, part: str, option: str, value: float) -> Path:
    """A copy of the folder with another config."""
    shutil.copytree(folder, copy)
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    return copy


@pytest.mark.slow
def test_other_heads_are_found(sd1, tmp_path, capsys):
    copy = with_option(sd1, tmp_path / "heads", "unet", "attention_head_dim", 1)
    arguments = (copy, "--reference", sd1, "--components", "unet", "--no-trajectory")
    status, out, _ = call(capsys, *arguments, "--dtypes", "float32", "--json")
    said = json.loads(out)
    assert status == 1 and not said["agrees"]
    first = said["sections"]["unet"]["float32"]["first_departing"]
    assert first == "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


def test_down_to_the_layer(sd1, tmp_path, capsys):
    copy = with_option(sd1, tmp_path / "eps", "text_encoder", "layer_norm_eps", 1e-3)
    arguments = (copy, "--reference", sd1, "--components", "text_encoder", "--no-trajectory")
    status, out, _ = call(capsys, *arguments, "--dtypes", "float32", "--layers")
    assert status == 1
    name = "text_model.encoder.layers.0.layer_norm1"
    verdict = out.splitlines()[-1]
    assert verdict.startswith("text_encoder float32: ")
    assert verdict.endswith(f"DEPARTS first at {name}")
    marked = [line.split()[0] for line in out.splitlines() if " !" in line]
    assert marked[0] == name and "text_model.embeddings.token_embedding" not in marked


@pytest.mark.slow
def test_a_trajectory_departs(sd1, tmp_path, bfloat16):
    copy = damaged(sd1, tmp_path / "damaged", "unet", "conv_out.weight", by=3.0)
    report = comparing.compare(
        copy, reference_model=sd1, components=[], sampled=comparing.Sampled(steps=2)
    )
    assert [(name, dtype, row.name) for name, dtype, row in report.departures] == [
        ("trajectory", dtype, "step 1, t = 501") for dtype in ("float32", "bfloat16")
    ]


@pytest.mark.slow
def test_a_component_alone(sd1, capsys):
    status, out, _ = call(capsys, sd1 / "vae", "--dtypes", "float32", "--height", 24)
    assert status == 0
    assert "pictures [1, 24, 16, 3], latents [1, 12, 8, 4]" in out
    assert "trajectory: not compared, as one component is no model" in out


ALONE = {
    "UNet2DModel": UNet2DConfig(
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        num_class_embeds=3,
    ),
    "ControlNetModel": dataclasses.replace(
        ControlNetConfig.from_unet(tiny("sdxl").unet),
        conditioning_embedding_out_channels=(4, 6),
    ),
    "AutoencoderTiny": TinyVAEConfig(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    ),
    "UNet2DConditionModel": dataclasses.replace(
        tiny("sdxl").unet, time_cond_proj_dim=6, num_class_embeds=3
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_every_class(name, tmp_path, cache, capsys):
    torch_model = random_model().make(ALONE[name])
    randomise(torch_model, scale=0.2).save_pretrained(tmp_path)
    arguments = (tmp_path, "--dtypes", "float32", "--height", 16, "--width", 16)
    status, out, _ = call(capsys, *arguments, "--no-trajectory", "--json")
    (section,) = json.loads(out)["sections"].values()
    assert status == 0 and section["unmatched"] == [] and len(section["float32"]["blocks"]) > 5
    assert 0 < section["float32"]["worst_relative"] <= 1e-5


@pytest.mark.slow
def test_a_single_file(sd1, tmp_path, capsys):
    file = tmp_path / "sd1.safetensors"
    convert(sd1, file)
    options = ("--config", sd1, "--dtypes", "float32", "--components", "text_encoder", "--json")
    status, out, _ = call(capsys, file, *options, "--steps", 1)
    assert status == 0
    said = json.loads(out)["sections"]
    assert said["trajectory"]["float32"]["worst_relative"] <= 1e-5
    # What diffusers reads from the file is what it reads from the folder.
    status, out, _ = call(capsys, sd1, "--reference", file, *options, "--no-trajectory")
    assert status == 0 and json.loads(out)["reference"] == str(file)
    assert json.loads(out)["sections"]["text_encoder"] == said["text_encoder"]


def test_what_diffusers_cannot_sample_is_said(capsys, cache):
    status, out, _ = call(capsys, "digits-ddpm", "--dtypes", "float32")
    assert status == 0
    assert "trajectory: not compared, as DDIMPipeline is not one of StableDiffusionPipeline" in out


def refused(capsys, *arguments) -> str:
    status, out, err = call(capsys, *arguments)
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_refusals(sd1, capsys, monkeypatch, tmp_path):
    assert "no trajectory with sampler 'ddpm'" in refused(capsys, sd1, "--sampler", "ddpm")
    assert "has unet, vae, text_encoder, not clip" in refused(capsys, sd1, "--components", "clip")
    assert "height and width must be" in refused(capsys, sd1, "--height", 17)
    assert "unknown model" in refused(capsys, tmp_path / "none")
    # A broken file is PyTorch's to refuse first, in one line, too.
    broken = shutil.copytree(sd1, tmp_path / "broken")
    next((broken / "unet").glob("*.safetensors")).write_bytes(b"nothing")
    said = refused(capsys, sd1, "--reference", broken)
    assert f"PyTorch could not load {broken / 'unet'}" in said
    if not torch.cuda.is_available():
        said = refused(capsys, sd1, "--torch-device", "cuda")
        assert "PyTorch could not load" in said
    monkeypatch.setitem(sys.modules, "torch", None)
    assert 'pip install "jaxsd[torch]"' in refused(capsys, sd1)
