"""Captioned pictures made by code, written in every format that is read, and what comes back."""

import csv
import io
import json
import tarfile

import numpy as np
from PIL import Image

SIZES = ((40, 40), (64, 32), (32, 64), (48, 40), (41, 67), (90, 33), (33, 90), (50, 50))


def encoded(seed, height, width, kind="PNG", **options):
    """The bytes of a smooth random picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    stream = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(stream, kind, **options)
    return stream.getvalue()


def album(count=8):
    """(name, bytes, caption) of some pictures, half of them JPEG, of the shapes in SIZES."""
    kinds = (("PNG", "png"), ("JPEG", "jpg"))
    return [
        (
            f"{i:04}.{kinds[i % 2][1]}",
            encoded(i, *SIZES[i % len(SIZES)], kinds[i % 2][0]),
            f"picture {i}, à la “carte”, n°{i}",
        )
        for i in range(count)
    ]


def write_pictures(folder, pictures):
    folder.mkdir(parents=True, exist_ok=True)
    for name, image, _ in pictures:
        (folder / name).write_bytes(image)
    return folder


def write_jsonl(folder, pictures):
    write_pictures(folder, pictures)
    rows = [json.dumps({"file_name": name, "text": caption}) for name, _, caption in pictures]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def write_csv(folder, pictures):
    write_pictures(folder, pictures)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "caption"), *((n, c) for n, _, c in pictures)])
    return folder


def write_texts(folder, pictures):
    write_pictures(folder, pictures)
    for name, _, caption in pictures:
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def write_tar(file, members):
    """A tar of (name, bytes), in that order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return file


def _halves(pictures):
    return pictures[: len(pictures) // 2], pictures[len(pictures) // 2 :]


def write_tars(folder, pictures, form="txt"):
    for shard, half in enumerate(_halves(pictures)):
        members = []
        for name, image, caption in half:
            text = caption if form == "txt" else json.dumps({"caption": caption, "width": 3})
            members += [(name, image), (f"{name.split('.')[0]}.{form}", text.encode())]
        write_tar(folder / f"{shard:04}.tar", members)
    return folder


def _table(pictures):
    import pyarrow as pa

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": image, "path": name} for name, image, _ in pictures]
    columns = {"image": pa.array(images, kind), "text": [caption for *_, caption in pictures]}
    return pa.table(columns)


def write_parquet(folder, pictures):
    from pyarrow import parquet

    folder.mkdir(parents=True)
    for shard, half in enumerate(_halves(pictures)):
        parquet.write_table(_table(half), folder / f"data-{shard:05}.parquet", row_group_size=3)
    return folder


def write_plain_parquet(folder, pictures):
    """A column of bytes, and no struct."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True)
    columns = {"jpg": [image for _, image, _ in pictures], "caption": [c for *_, c in pictures]}
    parquet.write_table(pa.table(columns), folder / "a.parquet")
    return folder


def write_arrow(folder, pictures, stream=True):
    import pyarrow as pa

    folder.mkdir(parents=True)
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    for shard, half in enumerate(_halves(pictures)):
        table = _table(half)
        with new(str(folder / f"data-{shard:05}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text("{}")
    return folder


def write_array_records(folder, pictures):
    from jaxsd.data.records import write_records

    for shard, half in enumerate(_halves(pictures)):
        rows = [{"image": image, "caption": c, "name": name} for name, image, c in half]
        write_records(str(folder / f"{shard:05}.array_record"), rows)
    return folder


WRITERS = {
    "jsonl": write_jsonl,
    "csv": write_csv,
    "texts": write_texts,
    "tar": write_tars,
    "tar-json": lambda folder, pictures: write_tars(folder, pictures, "json"),
    "parquet": write_parquet,
    "parquet-bytes": write_plain_parquet,
    "arrow": write_arrow,
    "arrow-file": lambda folder, pictures: write_arrow(folder, pictures, stream=False),
    "array_record": write_array_records,
}


def contents(source):
    return [(source[i]["image"], source[i]["caption"]) for i in range(len(source))]
