"""A folder of a file of prompts: the same command goes on, and another one is refused."""

import pytest
from many import LINES, draw, file_of_prompts, made  # noqa: F401
from test_cli import cache, refused  # noqa: F401

from jaxsd import gallery
from jaxsd.errors import JaxsdError


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
