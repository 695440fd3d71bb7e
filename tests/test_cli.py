"""The commands as people call them: what they leave behind, and one clear line when they refuse."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image
from safetensors.numpy import load_file

import jaxsd
from jaxsd import weights
from jaxsd.cli import run_command
from jaxsd.components import make_net, save_component
from jaxsd.hub import PRETRAINED
from jaxsd.models import ControlNetConfig, TinyVAEConfig
from jaxsd.weights import embeddings, lora_files
from jaxsd.weights.embeddings import Embedding
from jaxsd.weights.lora import Layer, LoRA

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


def test_options_that_trade_exactness_for_speed(tmp_path, capsys):
    faster = ("--guidance-interval", 0.2, "inf", "--cache-every", 2, "--quantize", "int8")
    arguments = ("seven", "--steps", 3, "--out", tmp_path)
    status, out, _ = call(capsys, "sample", *arguments, *faster)
    assert status == 0
    with Image.open(out.strip()) as image:
        assert json.loads(image.text["cache_every"]) == 2 and image.text["quantize"] == "int8"
        assert json.loads(image.text["guidance_interval"]) == [0.2, np.inf]
    said = refused(capsys, "sample", *arguments, "--cache-every", 2, "--sampler", "heun")
    assert "take a sampler that looks once" in said


def test_a_guidance_of_zero_is_told(tmp_path, capsys):
    arguments = ("seven", "--steps", 2, "--guidance-scale", 0, "--out", tmp_path)
    with Image.open(call(capsys, "sample", *arguments)[1].strip()) as image:
        assert json.loads(image.text["guidance_scale"]) == 0
        assert "lora" not in image.text and "negative_prompt" not in image.text


def test_several_pictures_come_with_a_grid_and_overwrite_nothing(tmp_path, capsys):
    arguments = ("3", "eight", "-n", 3, "--model", "digits-ddpm", "--steps", 2, "--json")
    arguments += ("--batch-size", 4)
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
        with Image.open(path.with_name(path.stem + "-preview.webp")) as moving:
            assert moving.n_frames == 3 and moving.size == (256, 256)
            told = json.loads(moving.getexif()[ExifTags.Base.ImageDescription])
            assert told["prompt"] == "7" and told["steps"] == json.loads(picture.text["steps"])
            for i in range(3):
                moving.seek(i)
                frame = np.asarray(moving.convert("RGB"))[16::32, 16::32]
                assert np.array_equal(frame, np.asarray(strip)[:, 9 * i : 9 * i + 8])


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
        (("seven", "--eta", 0.5, "--sampler", "euler"), ["eta", "ddim"]),
        (("seven", "--vae-tile", -1), ["vae_tile", "-1"]),
        (("seven", "--mask-image", "m.png"), ["mask_image", "init_image"]),
        (("seven", "--init-image", "no.png"), ["no.png"]),
        (("seven", "--strength", 0.5), ["strength"]),
        (("seven", "--lora", "no.safetensors:2"), ["no.safetensors"]),
        (("seven", "--refiner", "digits", "--refiner-start", 1), ["denoising_start"]),
        (("seven", "--sampler", "ddim", "--sigmas", "karras"), ["ddim", "karras"]),
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


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What people bring along, in small: pictures, a LoRA, a new word, a ControlNet, a TAESD."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (24, 48, 3), np.uint8)).save(folder / "wide.png")
    mask = np.zeros((24, 48), np.uint8)
    mask[:, 24:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    pipe = jaxsd.load("digits")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    width = pipe.unet.shapes[name][0]
    down, up = rng.normal(size=(2, width)), rng.normal(size=(width, 2))
    layer = Layer(down.astype(np.float32), up.astype(np.float32), 2.0)
    lora_files.save(LoRA({"unet": {name: layer}}), folder / "style.safetensors")
    vectors = rng.normal(size=(1, 64)).astype(np.float32)
    embeddings.save(Embedding("<cat>", {"text_encoder": vectors}), folder / "cat.safetensors")
    small = {"conditioning_embedding_out_channels": (4, 4, 4)}
    config = dataclasses.replace(ControlNetConfig.from_unet(pipe.unet.config), **small)
    tiny_vae = TinyVAEConfig(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    for part, kind in (("control", config), ("taesd", tiny_vae)):
        net = make_net(kind)
        save_component(folder / part, net, net.init(jax.random.key(0)))
    return folder


GUIDE = ("a red <dog> seven", "--steps", 4, "--guidance-scale", 3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> np.ndarray:
    """The picture of `GUIDE` without an option."""
    folder = tmp_path_factory.mktemp("plain")
    run_command("sample", [*map(str, GUIDE), "--out", str(folder)])
    (file,) = folder.glob("*.png")
    with Image.open(file) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param("--init-image wide.png --strength 0.5", marks=pytest.mark.slow),
        "--init-image wide.png --mask-image mask.png --preview-every 2 --preview-with linear",
        "--lora style.safetensors:0.8 --lora style.safetensors --preview-every 3",
        "--textual-inversion cat.safetensors:<dog> --sigmas karras --sampler euler",
        pytest.param(
            "--controlnet control --control-image wide.png --controlnet control "
            "--control-image mask.png --control-scale 0.5 --control-scale 1",
            marks=pytest.mark.slow,
        ),
        "--refiner digits --refiner-start 0.5 --spacing trailing",
        pytest.param("--dtype float16 --guidance-rescale 0.5", marks=pytest.mark.slow),
        "--vae-tile 4 --preview-every 2 --preview-with taesd --long-prompts",
    ],
)
def test_what_the_guide_tells(arguments, files, plain, tmp_path, capsys, monkeypatch):
    """Each option works, says so in the picture, and makes another one than without it."""
    monkeypatch.chdir(files)
    status, out, err = call(capsys, "sample", *arguments.split(), *GUIDE, "--out", tmp_path)
    assert status == 0, err
    with Image.open(out.strip()) as picture:
        wide = "wide.png" in arguments
        assert picture.size == ((44, 24) if wide else (32, 32))
        told = json.dumps(picture.text)
        for word in arguments.split():
            if word.endswith((".png", "0.5", "control", "karras", "trailing")):
                assert word in told, word
        if not wide:
            assert not np.array_equal(np.asarray(picture), plain)


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


def test_a_dry_run_of_several_processes_tells_once(tmp_path, capsys, monkeypatch):
    """Each makes the tokenizer for itself, in a folder of its own."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    done = call(capsys, "train", "clip", "--workdir", tmp_path / "run", "--dry-run")
    assert done == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ddpm", "--data", "cats"), ["cats", "digit-scans"]),
        (("ddpm", "--steps", 0), ["steps", "0"]),
        (("ddpm", "--class-dropout", 1.5), ["class_dropout", "1.5"]),
        (("vae", "--family", "digits-ddpm"), ["digits-ddpm", "VAE"]),
        (("text-to-image",), ["--vae", "--text-encoder"]),
        (("ddpm", "--workdir", "gs://bucket/run"), ["gs://bucket/run", "workdir"]),
    ],
)
def test_what_train_refuses(arguments, said, tmp_path, capsys):
    recipe, *rest = arguments
    line = refused(capsys, "train", recipe, "--workdir", tmp_path / "run", *rest)
    assert all(word in line for word in said), line
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_training_is_left_as_it_is(tmp_path, capsys):
    """Also by a recipe that writes into it what it is built of."""
    weights.write_json(tmp_path / "config.json", {"recipe": "CLIP", "family": "sd1"})
    line = refused(capsys, "train", "clip", "--workdir", tmp_path)
    assert "family 'sd1', now 'digits'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_training_starts_from_does_not_stay_on_the_first_device(tmp_path, monkeypatch):
    """Where it would lie beside the share that this device has of the state."""
    built = []
    monkeypatch.setattr("jaxsd.training.train", lambda objective, *_, **__: built.append(objective))
    with jax.default_device(jax.devices()[3]):  # as if it were a GPU, and the others its host
        run_command("train", ["text-to-image", "--model", "digits", "--workdir", str(tmp_path)])
        [objective] = built
        state = {"unet": objective.init(jax.random.key(0)), **objective.towers.params}
        for array in jax.tree.leaves(state):
            assert array.devices() == {jax.devices()[0]}
        pipe = objective.pipeline(jax.device_put(state["unet"], jax.devices()[3]))
        latents = jax.device_put(pipe.noise([0]), jax.devices()[3])
        assert pipe.decode_array(latents).shape == (1, 32, 32, 3)


@pytest.mark.slow
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


@pytest.mark.parametrize("arguments", [("info", "digits"), ("evaluate", "--help")])
def test_a_reader_that_has_had_enough(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "jaxsd", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_options_that_do_not_exist_exit_with_2(capsys):
    assert call(capsys, "sample", "seven", "--no-such-option", 1)[0] == 2
