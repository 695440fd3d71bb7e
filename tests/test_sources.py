"""Every format gives the same pictures and captions, here and in a bucket; broken ones one line."""

import json
import pickle

import albums
import numpy as np
import pytest
from albums import contents
from fsspec.registry import _registry as registry
from refusals import refused
from test_buckets import Bucket, bucket  # noqa: F401

from jaxsd.data.files import expand_braces
from jaxsd.data.records import write_records
from jaxsd.data.sources import open_source
from jaxsd.data.splits import held_out

ALBUM = albums.album()


@pytest.mark.parametrize("form", albums.WRITERS)
def test_every_format_gives_the_same_pictures_and_captions(form, tmp_path):
    folder = albums.WRITERS[form](tmp_path / "data", ALBUM)
    source = open_source(str(folder))
    assert contents(source) == [(image, caption) for _, image, caption in ALBUM]
    again = pickle.loads(pickle.dumps(source))
    assert again[5] == source[5] and again.stamp() == source.stamp()
    names = [source.name(i) for i in range(len(source))]
    assert len(set(names)) == len(ALBUM) and names[3] == source[3]["name"]
    for i, (_, image, _) in enumerate(ALBUM):
        assert source.head(i, 100)[:100] == image[:100]


@pytest.mark.parametrize("form", albums.WRITERS)
def test_every_format_in_a_bucket(form, tmp_path, bucket, monkeypatch):  # noqa: F811
    upload(albums.WRITERS[form](tmp_path / "data", ALBUM), "gs://bucket/deep/data")
    monkeypatch.setitem(registry, "gs", Bucket)
    monkeypatch.setenv("JAXSD_CACHE", str(tmp_path / "cache"))
    source = open_source("gs://bucket/deep/data")
    assert contents(source) == [(image, caption) for _, image, caption in ALBUM]
    local = open_source(str(tmp_path / "data"))
    assert [source.name(i) for i in range(8)] == [local.name(i) for i in range(8)]


def upload(folder, place):
    from etils import epath

    for file in folder.iterdir():
        epath.Path(f"{place}/{file.name}").write_bytes(file.read_bytes())


# --- what a path stands for ------------------------------------------------------------------


def test_braces_and_stars_stand_for_shards(tmp_path):
    albums.write_tars(tmp_path, ALBUM)
    for pattern in ("{0000..0001}.tar", "{0000,0001}.tar", "*.tar"):
        source = open_source(str(tmp_path / pattern))
        assert contents(source) == [(image, caption) for _, image, caption in ALBUM]
    one = open_source(str(tmp_path / "0001.tar"))
    assert contents(one) == [(image, caption) for _, image, caption in ALBUM[4:]]
    assert one.name(0) == "0001.tar/0004.png"
    message = refused(open_source, str(tmp_path / "{0000..0002}.tar"))
    assert "0002.tar" in message


def test_braces_as_a_shell_expands_them():
    assert expand_braces("a{08..11}.tar") == [f"a{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert "stands for more" in refused(expand_braces, "{0..999999999}.tar")
    assert "stands for more" in refused(expand_braces, "{0..999}{0..999}.tar")


def test_patterns_in_a_bucket(tmp_path, bucket, monkeypatch):  # noqa: F811
    monkeypatch.setitem(registry, "gs", Bucket)
    upload(albums.write_tars(tmp_path, ALBUM), "gs://bucket/shards")
    for pattern in ("{0000..0001}.tar", "000?.tar"):
        source = open_source(f"gs://bucket/shards/{pattern}")
        assert contents(source) == [(image, caption) for _, image, caption in ALBUM]
        assert source.name(0) == "0000.tar/0000.png"


def test_a_picture_in_a_bucket_is_read_by_its_range(tmp_path, bucket, monkeypatch):  # noqa: F811
    monkeypatch.setitem(registry, "gs", Bucket)
    upload(albums.write_tars(tmp_path, ALBUM), "gs://bucket/shards")
    source = open_source("gs://bucket/shards")
    asked, read = [], Bucket.cat_file

    def cat_file(self, path, start=None, end=None, **kwargs):
        asked.append(end - start)
        return read(self, path, start, end, **kwargs)

    monkeypatch.setattr(Bucket, "cat_file", cat_file)
    assert source.head(1, 100) == ALBUM[1][1][:100] and source[1]["image"] == ALBUM[1][1]
    assert asked == [100, len(ALBUM[1][1]), len(ALBUM[1][2].encode())]


def test_nothing_there_and_nothing_known(tmp_path):
    assert "does not exist" in refused(open_source, str(tmp_path / "none"))
    (tmp_path / "readme.md").write_text("hello")
    message = refused(open_source, str(tmp_path))
    for format in ("a folder of pictures", ".tar", ".parquet", ".arrow", ".array_record"):
        assert format in message
    (tmp_path / "a.tar.gz").write_bytes(b"")
    assert "unpack" in refused(open_source, str(tmp_path))


def test_several_formats_in_a_folder_are_to_be_named(tmp_path):
    albums.write_tars(tmp_path, ALBUM)
    albums.write_pictures(tmp_path, ALBUM)
    message = refused(open_source, str(tmp_path))
    assert "pictures and tar shards" in message and str(tmp_path / "*.tar") in message


# --- splits ----------------------------------------------------------------------------------


def captions(source):
    return [source[i]["caption"] for i in range(len(source))]


@pytest.mark.parametrize("held", ["test", "validation", "val"])
def test_splits_by_folders(held, tmp_path):
    albums.write_texts(tmp_path / "train", ALBUM[:5])
    albums.write_texts(tmp_path / held, ALBUM[5:])
    assert captions(open_source(str(tmp_path))) == [c for *_, c in ALBUM[:5]]
    assert captions(open_source(str(tmp_path), split="test")) == [c for *_, c in ALBUM[5:]]


def test_a_class_that_is_called_as_a_split(tmp_path, caplog):
    for i, name in enumerate(("cat", "train", "train/dev")):
        albums.write_pictures(tmp_path / name, ALBUM[i : i + 1])
    assert captions(open_source(str(tmp_path))) == ["cat", "train", "dev"]
    assert "train/0001.jpg is not of a split" in caplog.text
    albums.write_pictures(tmp_path / "test", ALBUM[3:4])  # two of them are splits
    assert captions(open_source(str(tmp_path))) == ["", "dev"]
    assert captions(open_source(str(tmp_path), split="given")) == [""]


def test_what_is_given_is_the_split_for_tests_or_all_of_it(tmp_path):
    albums.write_texts(tmp_path / "train", ALBUM[:5])
    assert len(open_source(str(tmp_path), split="given")) == 5
    albums.write_texts(tmp_path / "test", ALBUM[5:])
    assert captions(open_source(str(tmp_path), split="given")) == [c for *_, c in ALBUM[5:]]
    assert len(open_source(str(tmp_path / "train"), split="given")) == 5


def test_splits_by_the_names_of_shards(tmp_path):
    for split, half in (("train", ALBUM[:6]), ("test", ALBUM[6:])):
        folder = albums.write_parquet(tmp_path / split, half)
        for file in folder.iterdir():
            file.rename(tmp_path / f"{split}-{file.name}")
        folder.rmdir()
    assert captions(open_source(str(tmp_path))) == [c for *_, c in ALBUM[:6]]
    assert captions(open_source(str(tmp_path), split="test")) == [c for *_, c in ALBUM[6:]]
    held = next(str(file) for file in tmp_path.iterdir() if file.name.startswith("test"))
    assert "no pictures for the train split" in refused(open_source, held)


def test_one_metadata_file_above_the_splits(tmp_path):
    for split, half in (("train", ALBUM[:5]), ("test", ALBUM[5:])):
        albums.write_pictures(tmp_path / split, half)
    rows = [
        {"file_name": f"{'train' if i < 5 else 'test'}/{name}", "text": caption}
        for i, (name, _, caption) in enumerate(ALBUM)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(open_source(str(tmp_path))) == [c for *_, c in ALBUM[:5]]
    assert captions(open_source(str(tmp_path), split="test")) == [c for *_, c in ALBUM[5:]]


def test_a_share_is_held_out_by_name_and_stays_held_out(tmp_path):
    album = albums.album(8) + [(f"new{i}.png", ALBUM[0][1], f"new {i}") for i in range(60)]
    few = albums.write_texts(tmp_path / "few", album[:40])
    all_ = albums.write_texts(tmp_path / "all", album)
    parts = [captions(open_source(str(few), None, s, 0.25)) for s in ("train", "test")]
    assert sorted(parts[0] + parts[1]) == sorted(c for *_, c in album[:40])
    assert 2 <= len(parts[1]) <= 18
    grown = captions(open_source(str(all_), None, "test", 0.25))
    assert set(parts[1]) == set(grown) & {c for *_, c in album[:40]}
    share = np.mean([held_out(str(i), 0.25) for i in range(4000)])
    assert abs(share - 0.25) < 0.03  # 4 standard deviations


def test_nothing_is_held_out(tmp_path):
    folder = str(albums.write_texts(tmp_path, ALBUM))
    assert "--holdout" in refused(open_source, folder, split="test")
    assert "train, test" in refused(open_source, folder, split="validate")
    assert "holdout" in refused(open_source, folder, holdout=1.0)


# --- captions --------------------------------------------------------------------------------


def test_captions_of_classes_and_none(tmp_path):
    albums.write_pictures(tmp_path / "train" / "ice_bear", ALBUM[:2])
    albums.write_pictures(tmp_path / "train", ALBUM[2:4])
    assert captions(open_source(str(tmp_path))) == ["", "", "ice bear", "ice bear"]
    (tmp_path / "train" / "0002.txt").write_text("a word")
    assert captions(open_source(str(tmp_path))) == ["a word", "", "", ""]


def test_only_described_pictures_count_and_missing_ones_are_kept_to_be_named(tmp_path):
    albums.write_jsonl(tmp_path, ALBUM[:4])
    albums.write_pictures(tmp_path, ALBUM[4:])
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "gone.png", "text": "gone"}))
    source = open_source(str(tmp_path))
    assert len(source) == 5 and source.name(4) == "gone.png"
    assert "gone.png" in refused(source.__getitem__, 4)


def test_several_metadata_files(tmp_path):
    albums.write_jsonl(tmp_path / "a", ALBUM[:4])
    albums.write_csv(tmp_path / "b" / "c", ALBUM[4:])
    assert contents(open_source(str(tmp_path))) == [(image, c) for _, image, c in ALBUM]


def test_rows_of_csv_that_are_longer_or_shorter(tmp_path):
    albums.write_pictures(tmp_path, ALBUM[:2])
    (tmp_path / "metadata.csv").write_text("file_name,text\n0000.png,a,b\n0001.jpg\n")
    assert captions(open_source(str(tmp_path))) == ["a", ""]


def test_metadata_as_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    albums.write_pictures(tmp_path, ALBUM)
    columns = {"file_name": [n for n, *_ in ALBUM], "caption": [c for *_, c in ALBUM]}
    parquet.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    assert captions(open_source(str(tmp_path))) == [c for *_, c in ALBUM]


def test_the_caption_column_is_asked_for_or_found(tmp_path):
    albums.write_pictures(tmp_path, ALBUM[:1])
    row = {"file_name": "0000.png", "short": "s", "long": ["l", "other"], "number": 3}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert "short, long" in refused(open_source, str(tmp_path))
    assert captions(open_source(str(tmp_path), "long")) == ["l"]
    assert "number" in refused(open_source, str(tmp_path), "number")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({**row, "Caption": None}))
    assert captions(open_source(str(tmp_path))) == [""]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("\n[1]", "line 2 is not a JSON object"),
        ('{"text": "no name"}', "row 1 has no 'file_name'"),
        ('{"file_name": "../../etc/passwd"}', "outside"),
        ('{"file_name": "/etc/passwd"}', "outside"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_broken_metadata(text, said, tmp_path):
    albums.write_pictures(tmp_path, ALBUM)
    (tmp_path / "metadata.jsonl").write_text(text)
    assert said in refused(open_source, str(tmp_path))


def test_the_fields_of_a_webdataset_caption(tmp_path):
    fields = {"url": "u", "caption": "c", "n": 3}
    members = [("a.b.jpg", b"no"), ("a.jpg", ALBUM[1][1]), ("a.json", json.dumps(fields).encode())]
    shard = str(albums.write_tar(tmp_path / "x.tar", [*members, ("b.jpg", ALBUM[1][1])]))
    source = open_source(shard)
    assert contents(source) == [(ALBUM[1][1], "c"), (ALBUM[1][1], "")]
    assert open_source(shard, "url")[0]["caption"] == "u"
    message = refused(open_source, shard, "x")  # at once, not in the middle of a training
    assert "caption column 'x' in x.tar/a.jpg: the columns of text are url, caption" in message
    texts = albums.write_tar(tmp_path / "y.tar", [("a.jpg", b"no"), ("a.txt", b"words")])
    assert "no .json beside" in refused(open_source, str(texts), "caption")
    rows = [{"image": ALBUM[0][1], "long": "l", "short": "s"}]
    write_records(str(tmp_path / "z.array_record"), rows)
    records = str(tmp_path / "z.array_record")
    assert open_source(records, "long")[0]["caption"] == "l"
    assert "caption column 'x'" in refused(open_source, records, "x")
    assert "give --caption-column one of" in refused(open_source, records)


def test_half_of_a_surrogate_pair_in_a_caption(tmp_path):
    albums.write_pictures(tmp_path, ALBUM[:1])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0000.png", "text": "a\\ud83d"}')
    assert captions(open_source(str(tmp_path))) == ["a?"]
