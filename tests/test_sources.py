"""Every format gives the same pictures and captions, here and in a bucket; broken ones one line."""

import json
import pickle
import struct
import tarfile

import albums
import numpy as np
import pytest
from fsspec.registry import _registry as registry
from test_buckets import Bucket, bucket  # noqa: F401

from jaxsd.data.files import expand_braces
from jaxsd.data.records import decode_record, encode_record, write_records
from jaxsd.data.sources import open_source
from jaxsd.data.splits import held_out
from jaxsd.errors import JaxsdError

ALBUM = albums.album()


def refused(call, *args, **kwargs):
    with pytest.raises(JaxsdError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(source):
    return [(source[i]["image"], source[i]["caption"]) for i in range(len(source))]


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


# --- broken and hostile files ----------------------------------------------------------------


def test_names_in_a_tar_never_reach_the_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = ALBUM[0][1]
    members = [("../../evil.png", image), ("/etc/evil.png", image), ("../../evil.txt", b"word")]
    albums.write_tar(tmp_path / "x.tar", members)
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(str(tmp_path / "x.tar"))
    assert contents(source) == [(image, "word"), (image, "")]
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]


def header(name, size, kind=tarfile.REGTYPE):
    """512 bytes of a tar that claim a member of any size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [2000, 1 << 40, 1 << 70, -512])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_absurd_sizes_in_a_tar(size, kind, tmp_path):
    good = albums.write_tar(tmp_path / "good.tar", [("a.png", ALBUM[0][1])]).read_bytes()
    (tmp_path / "x.tar").write_bytes(header("b.png", size, kind) + b"x" * 512 + good[:100])
    message = refused(open_source, str(tmp_path / "x.tar"))
    assert "x.tar" in message


def test_a_tar_that_is_cut_off_or_none(tmp_path):
    whole = albums.write_tar(tmp_path / "a.tar", [(n, i) for n, i, _ in ALBUM]).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    assert "is not a whole tar file" in refused(open_source, str(tmp_path))
    (tmp_path / "a.tar").write_bytes(b"<html>" * 1000)
    assert "is not a whole tar file" in refused(open_source, str(tmp_path))
    albums.write_tar(tmp_path / "a.tar", [("a.mp3", b"la")])
    assert "0001.jpg, 0001.txt" in refused(open_source, str(tmp_path))


@pytest.mark.parametrize("form", ["parquet", "arrow", "arrow-file", "array_record"])
def test_broken_tables(form, tmp_path):
    folder = albums.WRITERS[form](tmp_path / "data", ALBUM)
    file = next(f for f in sorted(folder.iterdir()) if f.suffix != ".json")
    whole = file.read_bytes()
    for raw in (b"", b"hello" * 100, whole[: len(whole) // 2]):
        file.unlink()
        file.write_bytes(raw)
        message = refused(lambda: contents(open_source(str(folder))))
        assert file.name in message


def test_tables_without_pictures(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    def write(**columns):
        parquet.write_table(pa.table(columns), tmp_path / "a.parquet")

    write(text=["a"])
    assert "no column `image`" in refused(open_source, str(tmp_path))
    write(a=[b"1"], b=[b"2"])
    assert "a, b" in refused(open_source, str(tmp_path))
    write(image=[None, b"1"], b=[b"2", b"3"])
    source = open_source(str(tmp_path))
    assert "a.parquet:0" in refused(source.__getitem__, 0)
    assert source[1] == {"image": b"1", "caption": "", "name": "a.parquet:1"}
    write(image=[b"1", b"2"], text=pa.array([b"\xff", b"ok"]).view(pa.string()))
    assert "a.parquet" in refused(open_source(str(tmp_path)).__getitem__, 0)
    parquet.write_table(pa.table({"image": [b"1"], "text": ["t"]}), tmp_path / "0.parquet")
    write(image=[b"1"])
    assert "no column 'text'" in refused(open_source, str(tmp_path))


def test_records_hold_arrays_and_texts():
    values = {
        "mean": np.arange(6, dtype=np.float16).reshape(1, 2, 3),
        "none": np.zeros((0, 3), np.int32),
        "caption": "à la carte \x00",
    }
    back = decode_record(encode_record(values))
    assert back["caption"] == values["caption"] and back.keys() == values.keys()
    for name in ("mean", "none"):
        assert back[name].dtype == values[name].dtype
        np.testing.assert_array_equal(back[name], values[name])


def test_records_of_other_kinds_are_refused(tmp_path):
    whole = encode_record({"a": np.ones(3)})
    for raw in (b"", b"\x80\x04", whole[:-1], struct.pack("<Q", 1 << 62) + whole[8:]):
        assert "safetensors" in refused(decode_record, raw)
    write_records(str(tmp_path / "a.array_record"), [{"mean": np.ones(3)}])
    assert "`image`" in refused(open_source, str(tmp_path))


def test_records_are_written_whole_or_not_at_all(tmp_path):
    def rows():
        yield {"a": np.ones(3)}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(str(tmp_path / "a.array_record"), rows())
    assert list(tmp_path.iterdir()) == []
