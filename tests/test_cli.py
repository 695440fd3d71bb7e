"""The commands as people call them: what they leave behind, and one clear line when they refuse."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from jaxsd import weights
from jaxsd.cli import run_command
from jaxsd.components import PRETRAINED

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Programs compiled by one test serve the next, and the user's cache stays as it is."""
    folder = tmp_path_factory.getbasetemp() / "programs"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))


def call(capsys, command, *arguments):
    """(exit status, stdout, stderr) of a command."""
    status = 0
    try:
        run_command(command, [str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, command, *arguments) -> str:
    """The one line with which a command refuses its arguments."""
    status, out, err = call(capsys, command, *arguments)
    assert status == 2 and out == "", (status, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def copy_of(model: str, folder: Path) -> Path:
    return Path(shutil.copytree(PRETRAINED / model, folder / model))


# --- sample.py -------------------------------------------------------------------------------


def test_a_picture_holds_how_it_was_made(tmp_path, capsys):
    prompt = "a red seven on a white background"
    arguments = (prompt, "--steps", 4, "--seed", 5, "--guidance-scale", 3, "--out", tmp_path)
    status, out, _ = call(capsys, "sample", *arguments)
    assert status == 0
    path = Path(out.strip())
    assert path.parent == tmp_path and path.name == f"00000-{prompt.replace(' ', '-')}-seed5.png"
    with Image.open(path) as image:
        assert image.size == (32, 32) and image.mode == "RGB"
        assert image.text["prompt"] == prompt
        assert json.loads(image.text["seed"]) == 5
        assert json.loads(image.text["steps"]) == 4
        assert json.loads(image.text["guidance_scale"]) == 3
        assert image.text["model"] == "digits" and image.text["sampler"] == "ddim"


def test_several_pictures_come_with_a_grid_and_overwrite_nothing(tmp_path, capsys):
    arguments = ("3", "eight", "-n", 3, "--model", "digits-ddpm", "--steps", 2, "--json")
    first = json.loads(call(capsys, "sample", *arguments, "--out", tmp_path)[1])["images"]
    second = json.loads(call(capsys, "sample", *arguments, "--out", tmp_path)[1])["images"]
    assert len(first) == 7 and len(set(first + second)) == 14
    assert sorted(tmp_path.iterdir()) == sorted(map(Path, first + second))
    # 6 pictures in batches of 4: the filled-up one gives what it would have given alone
    with Image.open(first[-1]) as grid, Image.open(first[4]) as fifth:
        assert grid.size == (3 * 8 + 2, 2 * 8 + 1)
        tile = np.asarray(grid)[9:17, 9:17, 0].astype(int)
        assert np.array_equal(tile, np.asarray(fifth))
    for a, b in zip(first, second, strict=True):
        with Image.open(a) as one, Image.open(b) as other:
            assert np.array_equal(np.asarray(one), np.asarray(other))


def test_previews_end_at_the_picture(tmp_path, capsys):
    arguments = ("7", "--model", "digits-ddpm", "--steps", 6, "--preview-every", 2)
    _, out, _ = call(capsys, "sample", *arguments, "--out", tmp_path)
    path = Path(out.strip())
    with Image.open(path) as picture, Image.open(path.with_stem(path.stem + "-preview")) as strip:
        assert strip.size == (3 * 8 + 2, 8)
        assert np.array_equal(np.asarray(strip)[:, -8:, 0], np.asarray(picture))


def test_a_long_prompt_is_cut_with_a_warning_that_quotes_it(tmp_path, capsys):
    prompt = "a red seven " * 30 + "on a white background"
    status, out, err = call(capsys, "sample", prompt, "--steps", 2, "--out", tmp_path)
    assert status == 0 and Path(out.strip()).exists()
    assert err.startswith("warning: ") and "77" in err and err.count("\n") == 1
    assert err.rstrip().endswith("a red seven on a white background'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("seven", "--model", "digit"), ["digit", "digits-ddpm"]),
        (("seven", "--steps", -3), ["steps", "-3"]),
        (("seven", "--steps", 2000), ["steps", "2000", "1000"]),
        (("seven", "--height", 30), ["30", "multiple"]),
        (("seven", "--width", -8), ["-8"]),
        (("seven", "--sampler", "magic"), ["magic", "euler"]),
        (("seven", "--eta", 2), ["eta", "2"]),
        (("seven", "--seed", -1), ["seed"]),
        (("seven", "-n", 0), ["num_images", "0"]),
        (("ten", "--model", "digits-ddpm"), ["ten", "0 to 9"]),
        ((), ["prompt"]),
    ],
)
def test_what_sample_refuses(arguments, said, tmp_path, capsys):
    line = refused(capsys, "sample", *arguments, "--out", tmp_path / "out")
    assert all(word in line for word in said), line
    assert not list(tmp_path.rglob("*.png"))


def test_an_unwritable_output_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    line = refused(capsys, "sample", "seven", "--out", tmp_path / "file" / "out")
    assert str(tmp_path / "file" / "out") in line


def test_a_folder_without_a_component_is_refused(tmp_path, capsys):
    model = copy_of("digits", tmp_path)
    shutil.rmtree(model / "vae")
    line = refused(capsys, "sample", "seven", "--model", model, "--out", tmp_path / "out")
    assert "vae/" in line and str(model) in line


def test_a_misshapen_weight_is_refused(tmp_path, capsys):
    model = copy_of("digits-ddpm", tmp_path)
    file = model / "unet" / weights.DIFFUSERS_FILE
    tensors = {name: jnp.asarray(value) for name, value in load_file(file).items()}
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :, :2]
    del tensors["conv_out.bias"]
    weights.save(tensors, model / "unet")
    line = refused(capsys, "sample", "7", "--model", model, "--out", tmp_path / "out")
    assert "conv_in.weight" in line and "conv_out.bias" in line


def test_a_truncated_file_is_refused(tmp_path, capsys):
    model = copy_of("digits-ddpm", tmp_path)
    file = model / "unet" / weights.DIFFUSERS_FILE
    file.write_bytes(file.read_bytes()[:-100])
    line = refused(capsys, "sample", "7", "--model", model, "--out", tmp_path / "out")
    assert "truncated" in line


# --- train.py, jaxsd evaluate, python -m jaxsd -----------------------------------------------


def test_a_dry_run_tells_and_writes_nothing(tmp_path, capsys):
    workdir = tmp_path / "run"
    status, out, _ = call(capsys, "train", "ddpm", "--workdir", workdir, "--dry-run")
    assert status == 0 and not workdir.exists()
    assert "learning_rate" in out and "parameters" in out and "MiB" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ddpm", "--data", "cats"), ["cats", "digit-scans"]),
        (("ddpm", "--steps", 0), ["steps", "0"]),
        (("ddpm", "--class-dropout", 1.5), ["class_dropout", "1.5"]),
        (("vae", "--family", "digits-ddpm"), ["digits-ddpm", "VAE"]),
        (("text-to-image",), ["--vae", "--text-encoder"]),
    ],
)
def test_what_train_refuses(arguments, said, tmp_path, capsys):
    line = refused(capsys, "train", *arguments, "--workdir", tmp_path / "run")
    assert all(word in line for word in said), line
    assert not (tmp_path / "run").exists()


def test_evaluate_prints_json(capsys):
    arguments = ("digits-ddpm", "--count", 100, "--steps", 2, "--sampling-seeds", 2, "--json")
    status, out, _ = call(capsys, "evaluate", *arguments)
    report = json.loads(out)
    assert status == 0 and report["sampling"]["count"] == 100
    mean, spread = report["rows"]["digits-ddpm, guidance 1"]["fd_features"]
    assert mean > 0 and spread > 0
    assert report["rows"]["class means"]["judge_accuracy"] == 1


def test_module_and_unknown_commands():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "jaxsd", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    helped, unknown = run("--help"), run("paint")
    assert helped.returncode == 0 and "sample" in helped.stdout
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr


def test_options_that_do_not_exist_exit_with_2(capsys):
    assert call(capsys, "sample", "seven", "--no-such-option", 1)[0] == 2
