"""`jaxsd info`: what a model is, from headers alone and without jax."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest
import tiny
from refusals import refused
from test_single import assert_same, contents, make

from jaxsd import conversion, weights
from jaxsd.cli import convert as convert_command
from jaxsd.cli import info as info_command
from jaxsd.components import load_parts, save_parts
from jaxsd.hub import FOLDERS
from jaxsd.inspection import Held, inspect
from jaxsd.weights import ldm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    parts = make("sd1", tiny.tokenizer(place / "words"), jnp.float16)
    save_parts(parts, place / "folder")
    conversion.save_single(parts.components, place / "model.safetensors")
    return parts, place / "folder", place / "model.safetensors"


def test_a_folder_and_a_file_hold_the_same(model, tmp_path):
    parts, folder, file = model
    conversion.convert(folder, tmp_path / "orbax", orbax=True)
    for path, kind in (
        (folder, "diffusers folder, StableDiffusionPipeline"),
        (file, "single file"),
        (tmp_path / "orbax", "diffusers folder, StableDiffusionPipeline"),
    ):
        report = inspect(path)
        assert report.kind == kind and report.path == str(path)
        assert report.components.keys() == parts.components.keys()
        for name, component in parts.components.items():
            held = report.components[name]
            assert held.parameters == component.net.size
            assert held.bytes == 2 * held.parameters and held.dtypes == {"F16": held.parameters}
        assert not report.unusual


def test_every_parameter_of_xl_is_counted(tmp_path):
    parts = make("sdxl", tiny.tokenizer(tmp_path / "words"))
    conversion.save_single(parts.components, tmp_path / "a.safetensors")
    report = inspect(tmp_path / "a.safetensors")
    for name, component in parts.components.items():
        assert report.components[name].parameters == component.net.size


def test_one_network(model, tmp_path):
    _, folder, _ = model
    report = inspect(folder / "unet")
    assert report.kind == "component folder, UNet2DConditionModel"
    assert report.components.keys() == {"unet"}
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4, jnp.bfloat16)}
    weights.save(params, tmp_path / "a.safetensors")
    report = inspect(tmp_path / "a.safetensors")
    assert report.components == {"tensors": Held(2, 10, 32, {"F32": 6, "BF16": 4})}
    assert report.unusual == ["tensors mixes BF16, F32"]


def test_what_is_unusual_in_a_file(model, tmp_path):
    _, _, file = model
    whole = contents(file)
    unet = {n: v for n, v in whole.items() if n.startswith("model.diffusion_model.")}
    averages = {ldm.ema_name(name): value.astype(jnp.float32) for name, value in unet.items()}
    rest = {n: v for n, v in whole.items() if not n.startswith("first_stage_model.")}
    odd = {"edm_mean": jnp.ones(4), "betas": jnp.ones(4)}
    weights.save(rest | averages | odd, tmp_path / "a.safetensors")
    report = inspect(tmp_path / "a.safetensors")
    assert report.components["unet, moving averages"].dtypes.keys() == {"F32"}
    told = "\n".join(report.unusual)
    for part in ("moving averages (EMA)", "1 unknown tensors: edm_mean", "without vae"):
        assert part in told
    wide = {
        "model.diffusion_model.input_blocks.0.0.weight": jnp.zeros((4, 4, 3, 3)),
        "model.diffusion_model.input_blocks.1.1.attn2.to_k.weight": jnp.zeros((4, 1024)),
    }
    weights.save(wide, tmp_path / "b.safetensors")
    report = inspect(tmp_path / "b.safetensors")
    assert report.family == "sd2 or sd2-v or sd-turbo" and "without" in report.unusual[0]


def test_a_folder_with_damage_is_still_told(model, tmp_path):
    parts, _, _ = model
    save_parts(parts, tmp_path / "model")
    file = tmp_path / "model" / "vae" / weights.DIFFUSERS_FILE
    file.write_bytes(file.read_bytes()[:-1])
    index = weights.read_json(tmp_path / "model" / "model_index.json")
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    weights.write_json(tmp_path / "model" / "model_index.json", index)
    report = inspect(tmp_path / "model")
    assert report.components.keys() == {"unet", "text_encoder"}
    assert "truncated" in report.unusual[0] and report.unusual[1] == "not read: safety_checker"
    assert "not a safetensors file" in refused(inspect, __file__)


def test_the_command_answers_without_jax(model):
    _, _, file = model
    code = (
        "import sys; sys.argv = ['jaxsd', 'info', sys.argv[1], '--json']\n"
        "from jaxsd.cli import main; main()\n"
        "print([m for m in ('jax', 'flax', 'orbax', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    report, modules = done.stdout.rsplit("\n", 2)[:2]
    assert json.loads(report)["kind"] == "single file"
    assert modules == "[]"


def test_the_commands(model, tmp_path, capsys):
    parts, folder, file = model
    info_command.main(["digits"])
    told = capsys.readouterr().out
    assert "family digits" in told and "2,491,172" in told and "F16" in told
    source, target = str(file), str(tmp_path / "made")
    convert_command.main([source, target, "--config", str(folder)])
    assert f"wrote {target}" in capsys.readouterr().out
    assert_same(load_parts(target), parts)


def test_folders_are_those_of_components():
    from jaxsd.components import COMPONENTS

    assert set(FOLDERS) <= COMPONENTS.keys()
