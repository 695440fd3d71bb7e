"""A folder of a file of prompts: the same command goes on, and another one is refused."""

import json
import os
import time

import pytest
from many import LINES, Painter, draw, file_of_prompts, made  # noqa: F401
from refusals import refused as one_line
from test_cli import cache, refused  # noqa: F401

from jaxsd import gallery
from jaxsd.cli.sampling import model
from jaxsd.errors import JaxsdError


def test_what_is_there_is_not_made_again(prompts, tmp_path):
    out = tmp_path / "out"
    draw(prompts, out)
    whole = made(out)
    for name in ("00000003-seed3.png", "00000012-seed12.png"):
        (out / name).unlink()
    left = out / f".00000003-seed3.png.{'0' * 32}.tmp"  # by a kill
    running = out / f".00000004-seed4.png.{'0' * 32}.tmp"  # another command's
    for path in (left, running):
        path.write_bytes(b"\x89PNG")
    os.utime(left, (time.time() - gallery.GIVEN_UP - 60,) * 2)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    report = draw(prompts, out)
    assert (report.images, report.already) == (2, 11)
    assert made(out) == whole and not left.exists() and running.exists()
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
        ({"model": "digits-ddpm"}, "with model .*digits-ddpm.*, not"),
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


RECORD = {"settings": {"steps": 4}, "lines": 1, "digest": "0"}


def start(folder, steps: int):
    """What a command does before its first picture: the file of prompts, and what to claim."""
    folder.mkdir(exist_ok=True)
    file = folder.with_suffix(".txt")
    file.write_text("seven\n")
    return file, gallery.check(folder, {"steps": steps}, file)


@pytest.mark.parametrize(
    "change",
    [{"settings": 3}, {"settings": None}, {"lines": "1"}, {"lines": True}, {"lines": -1}]
    + [{"digest": 5}, {name: None for name in RECORD}],
)
def test_a_damaged_record_is_refused(change, tmp_path):
    out = tmp_path / "out"
    start(out, 4)
    (out / "00000000-seed0.png").touch()
    values = {name: value for name, value in (RECORD | change).items() if value is not None}
    (out / gallery.FILE).write_text(json.dumps(values))
    assert "does not say how" in one_line(start, out, 4)


def test_of_two_commands_that_start_together_one_is_refused(tmp_path):
    out = tmp_path / "out"
    (file, first), (_, same), (_, other) = (start(out, steps) for steps in (4, 4, 2))
    gallery.claim(out, first, file)
    gallery.claim(out, same, file)
    assert "with steps 4, not 2" in one_line(gallery.claim, out, other, file)
    file.write_text("seven\nthree\n")
    longer = gallery.check(out, {"steps": 4}, file)
    gallery.claim(out, longer, file)
    assert json.loads((out / gallery.FILE).read_text()) == longer and longer["lines"] == 2


def test_pictures_that_came_after_the_check_are_not_taken_for_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "load", lambda options: model.Session(options, Painter()))
    file, out, check = tmp_path / "a.txt", tmp_path / "out", gallery.check
    file.write_text("seven\n")
    how = {"sampler": "ddim", "guidance_scale": 1.0}

    def late(*args):
        record = check(*args)
        monkeypatch.setattr(gallery, "check", check)
        assert draw(file, out, steps=1, **how).images == 1
        return record

    monkeypatch.setattr(gallery, "check", late)
    assert "with steps 1, not 2" in one_line(draw, file, out, steps=2, **how)


def test_what_drew_nothing_claims_nothing(tmp_path):
    """Killed between the record and its first picture: the moment may not be a command's alive."""
    out = tmp_path / "out"
    file, record = start(out, 4)
    assert not (out / gallery.FILE).exists()
    gallery.claim(out, record, file)
    _, other = start(out, 2)
    one_line(gallery.claim, out, other, file)
    os.utime(out / gallery.FILE, (time.time() - gallery.NOT_FOLLOWED - 60,) * 2)
    unfinished = out / f".00000000-seed0.png.{'0' * 32}.tmp"
    unfinished.touch()
    _, other = start(out, 2)
    one_line(gallery.claim, out, other, file)
    unfinished.unlink()
    _, other = start(out, 2)
    gallery.claim(out, other, file)


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
