"""`sample.py --prompts-file`: the same pictures however they are shared out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from many import EIGHT, Painter, draw, file_of_prompts, made, pixels, use_devices  # noqa: F401
from PIL.PngImagePlugin import PngImageFile
from test_cli import cache, call  # noqa: F401
from test_distributed import explicitly

from jaxsd import processes
from jaxsd.cli import sample
from jaxsd.cli.sampling import model

ROOT = Path(__file__).parent.parent


def test_pictures_are_named_by_line_and_seed(prompts, tmp_path, capsys):
    arguments = ("--prompts-file", prompts, "--model", "digits-ddpm-4step", "--seed", 7)
    status, out, _ = call(capsys, "sample", *arguments, "--out", tmp_path / "out", "--json")
    assert status == 0
    said = json.loads(out)
    assert said["images"] == 13 and said["already"] == 0
    assert said["images_per_second"] == pytest.approx(13 / said["seconds"])
    seeds = [*range(7, 17), 4294967290, 18, 19]
    names = {f"{i:08}-seed{seed}.png" for i, seed in enumerate(seeds)}
    assert made(tmp_path / "out").keys() == names  # and no grid
    with PngImageFile(tmp_path / "out" / "00000010-seed4294967290.png") as picture:
        assert picture.text["prompt"] == "7" and picture.text["index"] == "10"
        assert json.loads(picture.text["seed"]) == 4294967290
        assert picture.text["model"] == "digits-ddpm-4step" and "prompts_file" not in picture.text
    _, out, _ = call(capsys, "sample", *arguments, "--out", tmp_path / "out")
    assert "0 images" in out and "13 were there already" in out and out.count("\n") == 1


def test_a_picture_is_the_one_that_the_command_line_makes(prompts, tmp_path):
    draw(prompts, tmp_path / "many", seed=3)
    options = sample.Options(("4",), model="digits-ddpm-4step", seed=7, out=tmp_path / "one")
    sample.run(options)
    (alone,) = pixels(tmp_path / "one").values()
    assert abs(pixels(tmp_path / "many")["00000004-seed7.png"] - alone).max() <= 1


def test_the_number_of_devices_changes_no_bit(prompts, tmp_path, monkeypatch):
    assert len(EIGHT) == 8
    for count in (1, 2, 8):
        use_devices(monkeypatch, count)
        assert draw(prompts, tmp_path / str(count)).images == 13
    one = made(tmp_path / "1")
    assert len(one) == 13
    assert made(tmp_path / "2") == one and made(tmp_path / "8") == one


@pytest.mark.parametrize(
    "count, devices, ranks, rows", [(8, 8, 1, 8), (9, 8, 1, 16), (8, 1, 1, 8), (8, 2, 2, 4)]
)
def test_no_more_is_computed_than_each_device_needs(
    count, devices, ranks, rows, tmp_path, monkeypatch
):
    use_devices(monkeypatch, devices)
    monkeypatch.setattr(jax, "process_count", lambda: ranks)
    monkeypatch.setattr(processes, "agree", lambda value: value)
    monkeypatch.setattr(processes, "wait_for_all", lambda what: None)
    computed = []

    class Counted(Painter):
        def start(self, prompts, seeds, **others):
            computed.append(len(seeds))
            return super().start(prompts, seeds, **others)

    monkeypatch.setattr(model, "load", lambda options: model.Session(options, Counted()))
    file = tmp_path / "a.txt"
    file.write_text("seven\n" * count)
    how = {"sampler": "ddim", "steps": 1, "batch_size": 32}
    assert draw(file, tmp_path / "out", **how).images == count // ranks
    assert computed == [rows]


def test_the_batch_size_changes_a_pixel_by_one_at_most(prompts, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    for size in (1, 3, 64):
        draw(prompts, tmp_path / str(size), batch_size=size)
    wanted = pixels(tmp_path / "1")
    for size in (3, 64):
        for name, picture in pixels(tmp_path / str(size)).items():
            assert abs(picture - wanted[name]).max() <= 1


@pytest.mark.slow
def test_text_and_negative_prompts_on_several_devices(tmp_path, monkeypatch):
    """Text towers, guidance and the VAE, too, compute by rows."""
    file = tmp_path / "a.jsonl"
    lines = [{"prompt": "a red seven"}, {"prompt": "a three", "negative_prompt": "blue"}] * 2
    file.write_text("\n".join(map(json.dumps, lines)))
    for count in (1, 2):
        use_devices(monkeypatch, count)
        how = {"model": "digits", "steps": 2, "guidance_scale": 3.0, "batch_size": 1}
        draw(file, tmp_path / str(count), negative_prompt="green", **how)
    one = made(tmp_path / "1")
    assert len(one) == 4 and made(tmp_path / "2") == one
    with PngImageFile(tmp_path / "1" / "00000001-seed1.png") as picture:
        assert picture.text["negative_prompt"] == "blue"
    with PngImageFile(tmp_path / "1" / "00000002-seed2.png") as picture:
        assert picture.text["negative_prompt"] == "green"


def test_processes_share_the_file_out(prompts, tmp_path, monkeypatch):
    use_devices(monkeypatch, 2)  # on each, of one process and of two, two pictures at a time
    draw(prompts, tmp_path / "one")
    monkeypatch.setattr(processes, "agree", lambda value: value)
    monkeypatch.setattr(processes, "wait_for_all", lambda what: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    counts = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(processes, "is_first", lambda: True)
        counts.append(draw(prompts, tmp_path / "two").images)
    assert counts == [7, 6]
    assert made(tmp_path / "two") == made(tmp_path / "one")


def test_two_processes_make_what_one_does(prompts, tmp_path):
    """For real: they meet, share a folder, and each has a device of its own."""
    how = ["--model", "digits-ddpm-4step", "--batch-size", "2", "--json"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    common = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, ROOT / "sample.py", "--prompts-file", prompts, *how, "--out"]
    pair = [
        subprocess.Popen(
            [*command, tmp_path / "two"], env=common | own, stdout=subprocess.PIPE, text=True
        )
        for own in explicitly()
    ]
    try:
        printed = [process.communicate(timeout=250)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert [process.returncode for process in pair] == [0, 0]
    # What connects them prints a line of its own first
    assert [json.loads(text.splitlines()[-1])["images"] for text in printed] == [7, 6]
    subprocess.run([*command, tmp_path / "one"], env=common, check=True, capture_output=True)
    assert made(tmp_path / "two") == made(tmp_path / "one")
