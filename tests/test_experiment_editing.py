"""`editing.py`: what edits are worth, what curves say, and the measurement from end to end."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
import tiny
from PIL import Image

from jaxsd.data import digits

edits, tradeoff = importlib.import_module("edits"), importlib.import_module("tradeoff")


@pytest.fixture(scope="module")
def drawn():
    return edits.draw_edits("test", 20)


def mean(scores, name, kind=None):
    at = slice(None) if kind is None else slice(edits.KINDS.index(kind), None, 3)
    return getattr(scores, name)[at].mean()


# --- Edits and their scores ----------------------------------------------------------------------


def test_edits_change_one_attribute_each(drawn):
    assert len(drawn) == 60 and [edit.source[0] for edit in drawn[::3]] == [*range(10)] * 2
    for edit in drawn:
        differ = [a != b for a, b in zip(edit.source, edit.target, strict=True)]
        assert differ == [kind == edit.kind for kind in edits.KINDS]
        assert edit.target[1] != edit.target[2]  # else there is nothing to see
        assert digits.parse_caption(edit.prompt) == edit.target
        assert digits.parse_caption(edit.source_prompt) == edit.source
    assert len({edit.seed for edit in drawn}) == 60
    fewer = edits.draw_edits("test", 3)
    for one, other in zip(fewer, drawn, strict=False):
        assert one[2:4] == other[2:4] and (one.picture == other.picture).all()
    scans = [digits.recover(edit.picture[None] / 255)[0].tobytes() for edit in drawn[::3]]
    assert len({*scans}) == 20  # no scan twice


def test_an_oracle_is_right_and_leaves_the_shape(drawn):
    scores = edits.score(drawn, np.stack([edit.oracle for edit in drawn]))
    assert scores.changed.all() and scores.right.all() and not scores.to_oracle.any()
    assert mean(scores, "shape", "digit") > 5
    for kind in ("stroke", "background"):
        assert mean(scores, "shape", kind) < 0.2
    assert (scores.rmse > 0.02).all()


def test_the_picture_itself_is_no_edit(drawn):
    given = np.stack([edit.picture for edit in drawn])
    scores = edits.score(drawn, given)
    assert not any(a.any() for a in (scores.changed, scores.right, scores.rmse, scores.shape))
    assert (edits.psnr(scores.rmse) == 100).all()
    assert scores.to_oracle.all()


def test_one_right_attribute_is_not_all(drawn):
    """Of edits of the stroke: the right stroke, but on another background than the picture's."""
    some = [edit for edit in drawn if edit.kind == "stroke"]
    pictures = []
    for edit in some:
        scan = digits.recover(edit.picture[None] / 255)[0][0]
        others = [name for name in digits.COLOUR_NAMES if name not in edit.target]
        colours = digits.COLOURS[edit.target[1]], digits.COLOURS[others[0]]
        pictures.append(np.uint8(np.rint(255 * digits.render(scan, *map(np.array, colours)))))
    scores = edits.score(some, np.stack(pictures))
    assert scores.changed.all() and not scores.right.any()


def test_psnr_and_rmse_by_hand():
    a, b = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)
    b[0], b[1, 0] = 51, 255  # all off by a fifth; a quarter of the pixels off by all
    np.testing.assert_allclose(edits.rmse(a, b), [0.2, 0.5])
    np.testing.assert_allclose(edits.psnr(edits.rmse(a, b)), [13.979, 6.021], atol=1e-3)


# --- Curves --------------------------------------------------------------------------------------


def curve(distance, right, pictures=8):
    """The same points for all pictures, of one edit each."""
    tiled = [
        np.tile(np.array(v, float)[:, None, None], (1, pictures, 1)) for v in (right, distance)
    ]
    return tradeoff.Curve([*range(len(distance))], *tiled)


def test_an_envelope_holds_the_best_so_far():
    at = np.array([0.0, 0.1, 0.15, 0.2, 0.3, 9.0])
    found = tradeoff.envelope(np.array([0.3, 0.1, 0.2]), np.array([0.4, 0.5, 1.0]), at)
    np.testing.assert_allclose(found, [0, 0.5, 0.75, 1, 1, 1])


def test_the_area_of_known_curves():
    straight = curve([0.2, 0.4], [0.5, 1.0])
    assert tradeoff.area(*straight.points(), reach=0.4) == pytest.approx(0.5)
    best = curve([0.0], [1.0])
    assert tradeoff.area(*best.points()) == pytest.approx(1, abs=0.01)


def test_gaps_compare_at_the_same_distance():
    one, other = curve([0.1, 0.3], [0.6, 0.9]), curve([0.2, 0.4], [0.5, 1.0])
    np.testing.assert_allclose(tradeoff.gaps(one, other), [0.35, 0.15])
    np.testing.assert_allclose(tradeoff.gaps(one, one), 0, atol=1e-12)


def test_an_interval_is_as_wide_as_pictures_differ():
    right = np.zeros((1, 100, 1))
    right[:, :50] = 1
    mixed = tradeoff.Curve([0.0], right, np.ones_like(right))
    low, high = tradeoff.interval(lambda of: mixed.points(of)[1], 100)
    np.testing.assert_allclose([low[0], high[0]], [0.4, 0.6], atol=0.021)  # binomial: .5 +- .098
    same = curve([0.1], [0.7])
    np.testing.assert_allclose(tradeoff.interval(lambda of: same.points(of)[1], 8), 0.7)


# --- From end to end -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_measurement(tmp_path, capsys, monkeypatch):
    script = importlib.import_module("editing")
    design = script.Design(
        strengths=(0.5, 1.0),
        shares=(0.5, 1.0),
        etas=(0.0, 0.5, 1.0),  # as many as there are edits: the same programs draw them
        steps=2,
        inversion_steps=2,
        embedding_steps=1,
        tuning_steps=1,
    )
    results, image = tmp_path / "r.json", tmp_path / "p.png"
    known = dict(
        design=design,
        model=str(tiny.save_digits_model(tmp_path / "model")),
        count=1,
        results=results,
        image=image,
        examples=tmp_path / "e.png",
        cache=tmp_path / "cache",
    )

    def run(**changes):
        script.main(script.Options(**known | changes))
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match="goes on from here"):
        run(minutes=-1.0)
    assert not results.exists()
    run(only=("SDEdit", "DDIM inversion"))
    assert len(json.loads(results.read_text())) == 4
    out = run()
    assert len(json.loads(results.read_text())) == 7
    assert len([*(tmp_path / "cache").rglob("*.npz")]) == 3
    assert "| Imagic, eta 0 " in out and "oracle  " in out and "error" in out
    with Image.open(image) as opened:
        assert opened.size[0] > 1000
    monkeypatch.setattr(script.Measurement, "run", None)
    assert run(measure=False) == out  # from the file alone
    changed = dataclasses.replace(design, sdedit_scale=2.0)  # of which nothing is known
    assert "SDEdit, strength" not in run(measure=False, design=changed)
    with pytest.raises(SystemExit, match="--only cats: there are SDEdit"):
        monkeypatch.undo()
        run(only=("cats",))
