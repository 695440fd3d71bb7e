"""Captioned pictures as batches: in every run the same, whatever is broken; no process stays."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import albums
import numpy as np
import pytest

from jaxsd import data, processes
from jaxsd.cli.recipes.pictures import PictureData
from jaxsd.data import folder as folder_module
from jaxsd.data import sizes as sizes_module
from jaxsd.data.files import find_files
from jaxsd.errors import JaxsdError, ReadFailed
from jaxsd.weights import files

BATCH = 4
BROKEN = {  # name, bytes, and what is said of it
    "0900.jpg": (b"These are words, not pixels.\n" * 20, "none of JPEG"),
    "0901.png": (albums.encoded(0, 1, 1), "1x1 pixels, smaller than 16"),
    "0902.jpg": (b"", "none of JPEG"),
}


def words(caption):
    return np.frombuffer(caption.encode()[:24].ljust(24), np.uint8).astype(np.int32)


def opened(folder, seed=0, batch_size=BATCH, **changes):
    options = {"resolution": 32, "multiple": 8, "buckets": True, "crop": "random", "flip": True}
    return data.open_pictures(
        data.PictureOptions(data=str(folder), **options | changes), seed, batch_size
    )


def make(dataset, start, stop, **options):
    size = dataset.plan.batch_size
    return list(data.batches(dataset, size, start, stop, words, **options))


def assert_same(got, want):
    for a, b in itertools.zip_longest(got, want):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """29 pictures, of which one is cut off, and three files that only look like pictures."""
    pictures = albums.album(29)
    cut = pictures[10][0], pictures[10][1][:-300], pictures[10][2]
    broken = [(name, raw, "broken") for name, (raw, _) in BROKEN.items()]
    return albums.write_jsonl(
        tmp_path_factory.mktemp("data"), [*pictures[:10], cut, *pictures[11:], *broken]
    )


@pytest.fixture(scope="module")
def reference(folder):
    return make(opened(folder), 0, 16)


# --- what is in a batch ----------------------------------------------------------------------


def test_a_batch(folder, reference):
    for batch in reference:
        height, width = batch["image"].shape[1:3]
        assert batch["image"].shape == (BATCH, height, width, 3)
        assert batch["image"].dtype == np.float32 and batch["input_ids"].shape == (BATCH, 24)
        assert -1 <= batch["image"].min() < 0 < batch["image"].max() <= 1
        np.testing.assert_array_equal(batch["target_size"], [(height, width)] * BATCH)
        for name in ("original_size", "crop", "target_size"):
            assert batch[name].dtype == np.int32 and batch[name].shape == (BATCH, 2)


def test_captions_stay_with_their_pictures(folder, reference):
    known = {tuple(words(c)): albums.SIZES[i % 8] for i, (*_, c) in enumerate(albums.album(29))}
    for batch in reference:
        for ids, size in zip(batch["input_ids"], batch["original_size"], strict=True):
            assert known[tuple(ids)] == tuple(size)


def test_there_are_no_more_shapes_than_in_the_table(folder, reference):
    shapes = {batch["image"].shape[1:3] for batch in reference}
    assert 2 < len(shapes) <= len(opened(folder).shapes)
    assert shapes <= set(opened(folder).shapes)
    one = opened(folder, buckets=False)
    assert {b["image"].shape for b in make(one, 0, 16)} == {(BATCH, 32, 32, 3)}


def test_every_picture_comes_once_an_epoch_or_its_stand_in(folder):
    dataset = opened(folder, batch_size=1)
    captions = [b["input_ids"].tobytes() for b in make(dataset, 0, 29)]
    want = {words(c).tobytes() for *_, c in albums.album(29)}
    assert len(set(captions)) == 28 and set(captions) < want  # one stands in for the cut-off one


@pytest.mark.parametrize("form", ["texts", "tar", "parquet", "array_record"])
def test_every_format_makes_the_same_batches(form, tmp_path):
    pictures = albums.album(16)
    want = make(opened(albums.write_jsonl(tmp_path / "jsonl", pictures)), 0, 6)
    got = make(opened(albums.WRITERS[form](tmp_path / form, pictures)), 0, 6)
    assert_same(got, want)


# --- the same in every run -------------------------------------------------------------------


@pytest.mark.parametrize("start", [1, 7, 15])
def test_batches_are_the_same_whatever_the_start(start, folder, reference):
    assert_same(make(opened(folder), start, 16), reference[start:])


def test_batches_are_the_same_whatever_the_number_of_workers(folder, reference):
    dataset = opened(folder)
    assert_same(make(dataset, 3, 16, num_workers=2), reference[3:])
    assert "0010.png" in dataset.skipped.reasons  # what a worker met is known here
    made = data.batches(dataset, BATCH, 3, 10**6, words, num_workers=1)
    assert_same(list(itertools.islice(made, 4)), reference[3:7])
    began = time.monotonic()
    made.close()  # long before the last
    assert time.monotonic() - began < 15 and multiprocessing.active_children() == []


def test_a_worker_that_dies_is_an_error_of_one_line(folder):
    made = data.batches(opened(folder), BATCH, 0, 10**6, words, num_workers=1)
    next(made)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(JaxsdError, match="fewer --num-workers") as caught:
        list(made)
    assert "\n" not in str(caught.value) and multiprocessing.active_children() == []


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_a_batch(count, folder, reference):
    parts = [make(opened(folder), 2, 16, shard=(i, count)) for i in range(count)]
    for want, *part in zip(reference[2:], *parts, strict=True):
        joined = {name: np.concatenate([p[name] for p in part]) for name in want}
        assert_same([joined], [want])


def test_a_batch_that_processes_cannot_share(folder):
    for shard in ((0, 3), (2, 2), (-1, 2)):
        with pytest.raises(JaxsdError, match="must divide"):
            make(opened(folder), 0, 1, shard=shard)
    with pytest.raises(JaxsdError, match="planned for 4"):
        next(data.batches(opened(folder), 8, 0, 1))


def test_seeds_differ(folder, reference):
    other = make(opened(folder, seed=1), 0, 16)
    assert any(
        not np.array_equal(a["crop"], b["crop"]) for a, b in zip(other, reference, strict=True)
    )


RUN = """
import contextlib
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_data_pictures import make, opened
from jaxsd import data
from test_data_pictures import BATCH, words
if __name__ == "__main__":
    folder, out, start, workers = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    made = data.batches(opened(folder), BATCH, start, 10**6, words, num_workers=workers)
    with contextlib.closing(made):  # else, if not waiting for it, Python closes it when all is gone
        for number, batch in enumerate(made, start):
            np.savez(f"{out}/{number}.npz", **batch)
            print(number, flush=True)
"""


def start_run(folder, out, start, workers, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "-W", "error", str(tmp_path / "run.py"), os.path.dirname(__file__)]
    process = subprocess.Popen(
        [*command, str(folder), str(out), str(start), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if int(line) >= start + 2:
            break
    return process


def alive(session):
    """The processes of a session that still run."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                state, _, _, own = stat.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(own) == session and state != "Z":
            found.append(int(pid))
    return found


def assert_all_end(session, seconds=20):
    deadline = time.monotonic() + seconds
    while alive(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = alive(session)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_killed_and_resumed(folder, reference, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    process = start_run(folder, out, 0, 2, tmp_path)
    assert len(alive(process.pid)) >= 3
    process.kill()
    process.communicate(timeout=60)
    assert_all_end(process.pid)
    done = sorted(int(file.stem) for file in out.glob("*.npz"))[:-1]  # the last may be half written
    rest = make(opened(folder), done[-1] + 1, 16) if done[-1] < 15 else []
    before = [dict(np.load(out / f"{number}.npz")) for number in done[:16]]
    assert_same([*before, *rest], reference)


# --- what is left out ------------------------------------------------------------------------


def test_what_cannot_be_used_is_counted_and_named(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "jaxsd.data"):
        dataset = opened(folder, workdir=tmp_path)
        assert len(dataset.skipped) == 3 and sum(dataset.plan.counts) == 29
        make(dataset, 0, 16)
    assert len(dataset.skipped) == 4
    rows = (tmp_path / "skipped.txt").read_text().splitlines()
    said = {name: reason for name, reason in (row.split("\t") for row in rows)}
    assert set(said) == {*BROKEN, "0010.png"}
    for name, (_, reason) in BROKEN.items():
        assert reason in said[name]
    assert "truncated" in said["0010.png"]
    left_out, replaced = caplog.messages
    assert left_out.startswith("3 pictures are left out: 0900.jpg (cannot")
    assert replaced.startswith("1 picture is replaced") and "0010.png" in replaced
    again = opened(folder, workdir=tmp_path)
    make(again, 0, 16)
    assert (tmp_path / "skipped.txt").read_text().splitlines() == rows


def test_a_picture_that_is_cut_off_is_replaced_by_one_of_its_shape(folder):
    dataset = opened(folder)
    bucket = next(b for b, m in enumerate(dataset.members) if 10 in m)
    examples = [dataset[i] for i in range(64)]
    replaced = [e for e in examples if e["replaced"]]
    assert 1 <= len(replaced) <= 4
    for example in replaced:
        assert example["replaced"].startswith("0010.png\t") and example["caption"] != "picture 10"
        assert example["image"].shape[:2] == dataset.shapes[bucket]


def test_a_bucket_without_one_good_picture_is_an_error(tmp_path):
    bad = [(name, raw[:-100], c) for name, raw, c in albums.album(4)]
    dataset = opened(albums.write_texts(tmp_path, bad), buckets=False)
    with pytest.raises(JaxsdError, match=r"none of the 4 pictures .*\.(png|jpg)") as caught:
        dataset[0]
    assert "\n" not in str(caught.value)


def test_small_pictures(tmp_path):
    folder = albums.write_texts(tmp_path, albums.album(8))  # shorter sides from 32 to 50
    assert sum(opened(folder, min_size=40).plan.counts) == 4
    assert sum(opened(folder, resolution=64).plan.counts) == 8
    assert sum(opened(folder, resolution=96).plan.counts) == 1
    with pytest.raises(JaxsdError, match="no usable picture among the 8 .*smaller than 256"):
        opened(folder, resolution=512)


# --- what is remembered ----------------------------------------------------------------------


def test_sizes_are_read_once(folder, tmp_path, monkeypatch):
    first = opened(folder, workdir=tmp_path)
    assert (tmp_path / "sizes.npz").exists()
    with monkeypatch.context() as patch:
        patch.setattr(sizes_module, "read_size", None)
        again = opened(folder, workdir=tmp_path)
    assert again.plan == first.plan and again.skipped.reasons == first.skipped.reasons
    (tmp_path / "sizes.npz").write_bytes(b"PK\x03\x04 cut off")
    assert opened(folder, workdir=tmp_path).plan == first.plan


def test_a_read_that_failed_is_no_broken_picture(folder, tmp_path, monkeypatch):
    def read_bytes(path, *args):
        with files.reading(Path(path)):
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "read_bytes", read_bytes)
        source = folder_module.image_folder(find_files(str(folder / "*.jpg")))
        with pytest.raises(ReadFailed, match="0001.jpg: Input/output error"):
            sizes_module.read_sizes(source, tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(sizes_module.read_sizes(source, tmp_path)[1]) == 2


def test_sizes_are_read_anew_where_the_pictures_have_changed(tmp_path, caplog):
    folder = albums.write_texts(tmp_path / "data", albums.album(8))
    assert sum(opened(folder, workdir=tmp_path / "work").plan.counts) == 8
    albums.write_texts(folder, albums.album(9)[8:])
    with caplog.at_level(logging.WARNING, "jaxsd.data"):
        assert sum(opened(folder, workdir=tmp_path / "work").plan.counts) == 9
    assert "have changed" in caplog.messages[0]


# --- the recipes' options --------------------------------------------------------------------


def test_recipes_open_pictures_and_digits(folder, tmp_path, monkeypatch):
    recipe = PictureData(data=str(folder), resolution=32, bucket_multiple=8, buckets=True)
    dataset = recipe.open_data(3, BATCH, tmp_path)
    assert dataset.plan == opened(folder, seed=3).plan and (tmp_path / "skipped.txt").exists()
    assert PictureData().open_data(0, 4)[0]["image"].shape == (32, 32, 3)
    monkeypatch.setattr(processes, "agree", lambda value: "of the first process")
    with pytest.raises(JaxsdError, match="must see the same files"):
        recipe.open_data(3, BATCH)
    monkeypatch.undo()
    with pytest.raises(JaxsdError, match="num_workers"):
        PictureData(num_workers=-1).open_data(0, 4)
    held = PictureData(data=str(folder), resolution=32, holdout=0.3)
    parts = [held.open_data(0, 4, split=split) for split in ("train", "test")]
    assert sum(sum(part.plan.counts) for part in parts) == 29
    lines = [json.loads(row) for row in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 32
