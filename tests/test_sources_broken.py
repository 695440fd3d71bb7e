"""Sources that are broken or hostile are refused in one line, and records hold what they say."""

import struct
import tarfile

import albums
import numpy as np
import pytest
from albums import contents
from refusals import refused
from test_buckets import Bucket, bucket  # noqa: F401

from jaxsd.data.records import decode_record, encode_record, write_records
from jaxsd.data.sources import open_source

ALBUM = albums.album()


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
