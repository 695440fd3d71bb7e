"""`sample.py --prompts-file`: the same pictures however they are shared out, none made twice."""

import gc
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from test_cli import cache, call, refused  # noqa: F401
from test_distributed import explicitly

from jaxsd import gallery, processes
from jaxsd.cli import sample
from jaxsd.cli.sampling import model
from jaxsd.errors import JaxsdError
from jaxsd.prompt_files import Line, read_lines, scan
from jaxsd.writing import Writer, one_ahead

EIGHT = jax.local_devices()
ROOT = Path(__file__).parent.parent
LINES = [*"0123456789", '{"prompt": "7", "seed": 4294967290}', "three", "four"]


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return file


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def pixels(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            found[path.name] = np.asarray(picture).astype(int)
    return found


def use_devices(monkeypatch, count: int) -> None:
    devices = EIGHT[:count]
    monkeypatch.setattr(jax, "local_devices", lambda **_: devices)


def draw(prompts: Path, out: Path, **others) -> Any:
    how = {"model": "digits-ddpm-4step", "batch_size": 2} | others
    return sample.run(sample.Options((), prompts, out=out, **how))


# --- Files of prompts ------------------------------------------------------------------------


def test_lines_are_prompts_or_objects(tmp_path):
    file = tmp_path / "a.txt"
    lines = ["\ufeffa red seven ", '{"prompt": "", "negative_prompt": "blue"}\r']
    file.write_bytes("\n".join([*lines, '{"prompt": "x", "seed": 3}']).encode())
    assert [*read_lines(file)] == [
        Line(0, "a red seven"),
        Line(1, "", None, "blue"),
        Line(2, "x", 3),
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty"),
        ("seven\n\nthree\n", "line 2 is blank"),
        ("seven\n \t\n", "line 2 is blank"),
        ('seven\n{"prompt": "three"\n', "line 2 is not valid JSON"),
        ('{"seed": 3}', 'line 1 must be an object with a "prompt"'),
        ('{"prompt": 7}', 'line 1 must be an object with a "prompt"'),
        ('{"prompt": "a", "sed": 7}', "line 1 says 'sed': it may say prompt, seed"),
        ('{"prompt": "a", "seed": -1}', "line 1: seed must be a whole number from 0"),
        ('{"prompt": "a", "seed": true}', "line 1: seed must be a whole number from 0"),
        ('{"prompt": "a", "seed": 4294967296}', "line 1: seed must be a whole number from 0"),
        ('{"prompt": "a", "negative_prompt": 1}', "line 1: negative_prompt must be text"),
        ('{"prompt": "\\ud800"}', "line 1 is not Unicode text"),
        (b"seven\n\xff\xfe\n", "line 2 is not UTF-8 text"),
        ("a" * 1_000_001, "line 1 is longer than"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(text, said, tmp_path, capsys):
    file = tmp_path / "a.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(capsys, "sample", "--prompts-file", file, "--out", tmp_path / "out")
    assert said in line and str(file) in line
    assert not list((tmp_path / "out").iterdir())


def test_every_line_of_json_lines_is_an_object(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\nseven\n')
    with pytest.raises(JaxsdError, match="line 2 is not valid JSON"):
        list(read_lines(file))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(JaxsdError, match="does not exist"):
        scan(tmp_path / "a.txt")
    with pytest.raises(JaxsdError, match="is no file of prompts"):
        scan(tmp_path)


def test_a_scan_knows_the_beginning(tmp_path):
    file, longer = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("one\ntwo\n")
    longer.write_text('one \n{"prompt": "two"}\nthree\n')  # the same is said
    assert scan(longer, 2).start == scan(file).digest == scan(file, 2).start
    assert scan(file, 3).start is None
    assert scan(file).digest != scan(longer).digest


# --- Pictures --------------------------------------------------------------------------------


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


def test_the_batch_size_changes_a_pixel_by_one_at_most(prompts, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    for size in (1, 3, 64):
        draw(prompts, tmp_path / str(size), batch_size=size)
    wanted = pixels(tmp_path / "1")
    for size in (3, 64):
        for name, picture in pixels(tmp_path / str(size)).items():
            assert abs(picture - wanted[name]).max() <= 1


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


# --- Again -----------------------------------------------------------------------------------


def test_what_is_there_is_not_made_again(prompts, tmp_path):
    out = tmp_path / "out"
    draw(prompts, out)
    whole = made(out)
    for name in ("00000003-seed3.png", "00000012-seed12.png"):
        (out / name).unlink()
    left = out / f".00000003-seed3.png.{'0' * 32}.tmp"  # by a kill
    left.write_bytes(b"\x89PNG")
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    report = draw(prompts, out)
    assert (report.images, report.already) == (2, 11)
    assert made(out) == whole and not left.exists()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    with open(prompts, "a") as file:
        file.write("five\n")
    report = draw(prompts, out)
    assert (report.images, report.already) == (1, 13)
    assert draw(prompts, out).images == 0


@pytest.mark.parametrize(
    "others, said",
    [
        ({"steps": 2}, "with steps 4, not 2"),
        ({"seed": 1}, "with seed 0, not 1"),
        ({"num_images": 2}, "with num_images 1, not 2"),
        ({"model": "digits-ddpm"}, "with guidance_scale [0-9.]+, not"),
        ({"negative_prompt": "7"}, 'with negative_prompt not set, not "7"'),
    ],
)
def test_other_settings_are_refused(others, said, prompts, tmp_path):
    out = tmp_path / "out"
    draw(prompts, out)
    with pytest.raises(JaxsdError, match=said):
        draw(prompts, out, **others)
    assert draw(prompts, out).images == 0


def test_a_folder_without_pictures_is_anyones(prompts, tmp_path):
    """A mistake that is found late must not claim the folder."""
    out = tmp_path / "out"
    with pytest.raises(JaxsdError, match="magic"):
        draw(prompts, out, sampler="magic")
    assert draw(prompts, out).images == 13


def test_other_lines_are_refused(prompts, tmp_path):
    out = tmp_path / "out"
    draw(prompts, out)
    prompts.write_text("\n".join(["9", *LINES[1:]]))
    with pytest.raises(JaxsdError, match="other lines than the first 13"):
        draw(prompts, out)
    prompts.write_text("\n".join(LINES[:4]))
    with pytest.raises(JaxsdError, match="pictures of 13 lines, and .* has 4"):
        draw(prompts, out)
    (out / gallery.FILE).unlink()
    with pytest.raises(JaxsdError, match="no sampling.json"):
        draw(prompts, out)


@pytest.mark.parametrize(
    "text, options, said",
    [
        ("7\nten\n", {}, "line 2: no class 'ten'"),
        ("7\n8\n", {"seed": 4294967295}, "line 2: seeds must be from 0"),
        ("7\n8\n", {"seed": -1}, "line 1: seeds must be from 0"),
        ('7\n{"prompt": "8", "negative_prompt": "9"}', {"model": "digits-lcm"}, "line 2: .*told"),
    ],
)
def test_what_the_model_cannot_draw_is_named_before_anything_is_drawn(
    text, options, said, tmp_path
):
    file = tmp_path / "a.txt"
    file.write_text(text)
    with pytest.raises(JaxsdError, match=said):
        draw(file, tmp_path / "out", **options)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "arguments, said",
    [(("7",), "not both"), (("--preview-every", 2), "preview_every"), (("-n", 0), "num_images")],
)
def test_what_cannot_go_with_a_file_is_refused(arguments, said, prompts, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert said in refused(capsys, "sample", *arguments, "--prompts-file", prompts, *out)


# --- Memory and threads ----------------------------------------------------------------------


class Painter:
    """Stands in for a pipeline: a picture is its seed, in grey."""

    tokenizers, guidance_embedded, rows = {"tokenizer": None}, False, None

    def plan_steps(self, sampler, steps):
        return types.SimpleNamespace(count=steps), None

    def start(self, prompts, seeds, **_):
        grey = np.asarray(seeds, np.float32).reshape(-1, 1, 1, 1) % 256 / 127.5 - 1
        return np.broadcast_to(grey, (len(seeds), 64, 64, 3))


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)

    def held(count: int) -> int:
        """Bytes that are held when the last batch begins."""
        file, found = tmp_path / f"{count}.txt", []

        class Observed(Painter):
            def start(self, prompts, seeds, **others):
                if count - 1 in seeds:
                    gc.collect()
                    # Not Python's table of all names, which grows in jumps when paths are made
                    ours = [tracemalloc.Filter(False, pathlib.__file__)]
                    taken = tracemalloc.take_snapshot().filter_traces(ours)
                    found.append(sum(trace.size for trace in taken.statistics("filename")))
                return super().start(prompts, seeds, **others)

        monkeypatch.setattr(model, "load", lambda options: model.Session(options, Observed()))
        file.write_text("seven\n" * count)
        tracemalloc.start()
        how = {"sampler": "ddim", "steps": 1, "guidance_scale": 1.0}
        assert draw(file, tmp_path / str(count), batch_size=8, **how).images == count
        tracemalloc.stop()
        return found[0]

    held(50)  # what is imported and remembered once
    # 16 pictures that wait and two batches, of 60 kB each with their floats, may be there or not
    assert held(3000) < held(200) + 1_000_000  # 2800 jobs take twice as much, pictures 34 MB


def test_an_error_in_a_thread_is_raised_and_leaves_nothing(tmp_path):
    grey = np.zeros((4, 4, 3), np.uint8)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JaxsdError, match="cannot write"), Writer(2, 2) as writer:
        for i in range(100):
            writer.write(grey, tmp_path / "file" / f"{i}.png", {})
    with pytest.raises(JaxsdError, match="cannot write"), Writer() as writer:  # at the end, too
        writer.write(grey, tmp_path / "file" / "0.png", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_interrupted_leaves_whole_files(tmp_path):
    grey = np.zeros((512, 512, 3), np.uint8)
    with pytest.raises(KeyboardInterrupt), Writer(1, 50) as writer:
        for i in range(50):
            writer.write(grey, tmp_path / f"{i}.png", {})
        raise KeyboardInterrupt
    for path in tmp_path.iterdir():
        assert path.suffix == ".png"
        with Image.open(path) as picture:
            picture.load()
    assert len(list(tmp_path.iterdir())) < 50


def test_items_are_asked_for_one_ahead():
    asked = []

    def items():
        for i in range(3):
            asked.append(i)
            yield i

    seen = [(item, len(asked)) for item in one_ahead(items())]
    assert seen == [(0, 2), (1, 3), (2, 3)]
    assert [*one_ahead([])] == []
