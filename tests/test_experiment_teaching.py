"""`teaching.py`: drawings of letters and inks, who recognises them, and the measurement."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tyro
from PIL import Image

from jaxsd.cli.train import Recipe
from jaxsd.cli.train import main as train
from jaxsd.data import digits
from jaxsd.pictures import to_uint8

concepts, inks, letters, recognition, script = (
    importlib.import_module(name)
    for name in ("concepts", "inks", "letters", "recognition", "teaching")
)
CONCEPTS = (script.Options(), script.AMBER, script.LILAC)


SCANS = digits.load_scans("train")[0][:30]


def rendered(scans, colours):
    """uint8 pictures of scans, each in the (stroke, background) named."""
    rng = np.random.default_rng(0)
    return np.stack(
        [
            to_uint8(2 * digits.colour_scan(scan, rng, names)[0] - 1)
            for scan, names in zip(scans, colours, strict=True)
        ]
    )


def test_drawings_are_scans_and_differ():
    scans = letters.draw_letters("K", 30, 0)
    assert scans.shape == (30, 8, 8) and scans.dtype == np.float32
    np.testing.assert_array_equal(scans * 16, np.rint(scans * 16))  # counts of 16 pixels
    assert 0 <= scans.min() and scans.max() == 1 and 0.15 < scans.mean() < 0.4
    assert len({scan.tobytes() for scan in scans}) == 30
    np.testing.assert_array_equal(letters.draw_letters("K", 3, 0), scans[:3])
    assert (letters.draw_letters("K", 3, 1) != scans[:3]).any()


def test_the_reader_knows_what_it_was_not_shown():
    found = recognition.held_out_accuracies("K")
    assert found.keys() == {"digits", "letter", "others"}
    assert min(found.values()) > 0.97


def test_shares_of_known_pictures():
    rng = np.random.default_rng(0)
    pairs = [digits.draw_colours(rng) for _ in range(20)]
    drawn = rendered(letters.draw_letters("K", 20, 9), pairs)
    real, labels = digits.load_scans("test")
    numbers = rendered(real[:20], pairs)
    assert recognition.share_of_letter("K", drawn) == 1
    assert recognition.share_of_letter("K", numbers) == 0
    assert recognition.share_of_letter("K", rendered(letters.draw_letters("X", 20, 9), pairs)) < 0.1
    assert recognition.share_in_colours("K", drawn, pairs) == 1
    swapped = [(b, s) for s, b in pairs[:5]] + pairs[5:]
    assert recognition.share_in_colours("K", drawn, swapped) == 0.75
    wanted = [(int(labels[i]), *pairs[i]) for i in range(20)]
    digit, right = recognition.digits_right(numbers, wanted)
    assert digit == right > 0.9
    wrong = [((d + 1) % 10, s, b) for d, s, b in wanted]
    assert recognition.digits_right(numbers, wrong) == (0, 0)
    assert recognition.digits_right(numbers, [(d, b, s) for d, s, b in wanted]) == (digit, 0)


def test_an_ink_is_shown_by_training_scans():
    taught = inks.draw_digits("lilac", 6, 0)
    assert len({digit for _, digit, _ in taught}) == len({paper for *_, paper in taught}) == 6
    seen = inks.see(np.stack([picture for picture, *_ in taught]), "lilac")
    assert seen.right([(digit, "lilac", paper) for _, digit, paper in taught]).all()
    black = np.stack([inks.draw_scan(s, "black", "white", np.random.default_rng(0)) for s in SCANS])
    assert (inks.see(black, "lilac").inks == "black").all()
    for other, ink in (("white", "lilac"), ("purple", "lilac"), ("lilac", "ember")):
        drawn = inks.draw_scan(SCANS[0], other, "green", np.random.default_rng(0))
        assert inks.see(drawn[None], ink).inks != ink


def test_the_judge_of_inks_reads_as_the_usual_one():
    rng = np.random.default_rng(0)
    pairs = [digits.draw_colours(rng) for _ in SCANS]
    pictures = rendered(SCANS, pairs)
    scans, strokes, papers = digits.recover(pictures / 255)
    seen = inks.see(pictures, "lilac")
    assert (seen.inks == strokes).all() and (seen.backgrounds == papers).all()
    assert (seen.digits == recognition.judges().predict(2 * scans - 1)).all()


@pytest.mark.parametrize("options", CONCEPTS, ids=lambda options: options.name)
def test_what_is_asked_says_what_is_free(options):
    concept, rng = options.concept, np.random.default_rng(0)
    prompts, wanted = concept.full_prompts(concept.rare, 20, rng)
    assert len(prompts) == len(wanted) == 20
    taught = concept.taught(6)
    assert len({one.name for one in taught}) == 6
    asked = [one.caption.format(concept.rare) for one in taught]
    for text in (*prompts, *asked):
        assert text.count("sks") == 1 and text.endswith(" background")
    assert concept.bare_prompt(concept.rare) == "a sks digit"
    assert concept.begin in {*digits.COLOUR_NAMES, "digit"}


@pytest.mark.parametrize("options", CONCEPTS, ids=lambda options: options.name)
def test_every_way_is_a_command(options, tmp_path):
    ways = script.all_ways(options.concept, options.design, tmp_path)
    assert ways[0].name == script.BEFORE
    for way in ways[1:]:
        told = [way.recipe, "--model", "digits", "--workdir", "w", *way.arguments, "--seed", "1"]
        recipe = tyro.cli(Recipe, args=told, config=(tyro.conf.OmitArgPrefixes,))
        assert recipe.seed == 1


@pytest.mark.parametrize("options", CONCEPTS, ids=lambda options: options.name)
def test_what_is_published_is_known(options):
    weights = script.digest(script.jaxsd.load("digits").params["unet"])
    rows, concept = script.Rows(options, weights), options.concept
    for way in script.all_ways(concept, options.design, Path()):
        found = rows.get(way, 0)
        assert found is not None and found.keys() == concept.columns.keys(), way.name


@pytest.mark.slow
def test_the_measurement(tmp_path, capsys, monkeypatch):
    design = script.Design(drawn=2, digits=2, steps=1, batch_size=8, factors_steps=1)
    design = dataclasses.replace(design, rank=1, targets=("attention",))
    trained = []

    others = script.subprocess.run  # a training asks git where it stands

    def here(command, **options):
        if command[0] != sys.executable:
            return others(command, **options)
        trained.append(command[2])
        train(command[2:])

    monkeypatch.setattr(script.subprocess, "run", here)
    known = dict(
        design=design,
        seeds=(0,),
        model=str(tiny.save_digits_model(tmp_path / "model")),
        runs=tmp_path / "runs",
        results=tmp_path / "r.json",
        image=tmp_path / "t.png",
        only=("before", "LoRA"),
    )

    def run(**changes):
        script.main(script.Options(**known | changes))
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match="goes on from here"):
        run(minutes=-1.0)
    out = run()
    assert trained[0] == "lora" and len(json.loads((tmp_path / "r.json").read_text())) == 2
    assert "| before (1 seed) " in out and "| LoRA, captions (1 seed)" in out
    pictures = sorted((tmp_path / "runs" / "pictures" / "captioned").glob("*.png"))
    captions = [path.with_suffix(".txt").read_text() for path in pictures]
    assert len(pictures) == 6 and all("sks digit on a" in text for text in captions)
    taught = np.stack([np.asarray(Image.open(path)) for path in pictures])
    assert recognition.share_of_letter("K", taught) == 1
    trained.clear()
    assert run(measure=False) == out[out.index("K, from") :] and not trained
    with pytest.raises(SystemExit, match="--only: there are before; textual inversion, 1 vector"):
        run(only=("cats",))
