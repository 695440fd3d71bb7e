"""Pictures that people have: turned, transparent, 16-bit, palettes, broken, enormous."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from jaxsd import pictures
from jaxsd.errors import JaxsdError


@pytest.fixture
def red(tmp_path):
    image = Image.new("RGB", (6, 4), (200, 30, 40))
    image.putpixel((0, 0), (0, 0, 255))
    return image


def test_turned_as_exif_says(red, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    red.save(tmp_path / "turned.png", exif=exif)
    read = pictures.read(tmp_path / "turned.png")
    assert read.size == (4, 6) and read.getpixel((3, 0)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.convert(mode).save(tmp_path / "clear.png")
    read = pictures.read(tmp_path / "clear.png")
    assert read.getpixel((0, 0)) == (0, 0, 0) and read.getpixel((1, 0)) == (255, 255, 255)


def test_sixteen_bits(tmp_path):
    values = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert [pictures.read(tmp_path / "deep.png").getpixel((x, 0))[0] for x in range(3)] == [
        0,
        127,
        255,
    ]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "F", "I"])
def test_other_modes(mode):
    read = pictures.read(Image.new(mode, (3, 2)))
    assert read.mode == "RGB" and read.size == (3, 2)


def test_arrays():
    rng = np.random.default_rng(0)
    for shape in ((4, 5), (4, 5, 1), (4, 5, 3)):
        array = rng.integers(0, 256, shape, np.uint8)
        found = np.asarray(pictures.read(array))
        expected = np.broadcast_to(array.reshape(4, 5, -1), (4, 5, 3))
        np.testing.assert_array_equal(found, expected)
    for wrong in (np.zeros((4, 5, 3)), np.zeros((4, 5, 2), np.uint8), np.zeros(3, np.uint8)):
        with pytest.raises(JaxsdError, match="uint8"):
            pictures.read(wrong)


def enormous(path, width: int, height: int) -> None:
    """A PNG of a hundred bytes that promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("size", [(40_000, 25_000), (11_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_of_a_billion_pixels(tmp_path, size):
    enormous(tmp_path / "bomb.png", *size)
    with pytest.raises(JaxsdError, match="bomb.png"):
        pictures.read(tmp_path / "bomb.png")


def test_files_that_are_none(red, tmp_path):
    red.save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    rng = np.random.default_rng(0)
    tried = 0
    for kind in ("png", "jpeg", "gif", "bmp", "webp", "tiff"):
        red.save(tmp_path / f"good.{kind}")
        whole = (tmp_path / f"good.{kind}").read_bytes()
        for _ in range(60):
            damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            for _ in range(rng.integers(0, 4)):
                damaged[rng.integers(len(damaged))] = rng.integers(256)
            (tmp_path / "damaged").write_bytes(damaged)
            tried += 1
            try:
                assert pictures.read(tmp_path / "damaged").mode == "RGB"
            except JaxsdError as error:
                assert "\n" not in str(error) and "damaged" in str(error)
    assert tried == 360
    for missing in (tmp_path / "none.png", tmp_path):
        with pytest.raises(JaxsdError, match="cannot read the picture"):
            pictures.read(missing)


def test_masks_are_black_or_white(red):
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    mask = pictures.to_mask(ramp, 4, 256)
    assert mask.shape == (4, 256, 1) and set(np.unique(mask)) == {0, 1}
    assert mask[0, :, 0].tolist() == [0.0] * 128 + [1.0] * 128


def test_sizes_keep_the_shape(red):
    assert pictures.fitting_size(red, 512 * 512, 8) == (416, 624)
    assert pictures.fitting_size(np.zeros((1, 5000), np.uint8), 64 * 64, 8) == (8, 4528)


def frames_of(file):
    """(pixels, milliseconds) of each frame of an animation."""
    with Image.open(file) as image:
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            yield np.asarray(image.convert("RGB")), image.info["duration"]


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (200, 150, 3)])
def test_an_animation_of_small_pictures_is_exact_and_stays_at_the_end(shape, tmp_path):
    given = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    notes = {"prompt": "a snowman \u2603", "steps": 3}
    file = pictures.write_animation([*given], tmp_path / "a.webp", notes)
    frames, milliseconds = zip(*frames_of(file), strict=True)
    assert milliseconds == (150, 150, 2000)
    for frame, picture in zip(frames, given, strict=True):
        wanted = pictures.enlarged(picture, 256, 256)
        assert np.array_equal(frame, np.broadcast_to(wanted, (*wanted.shape[:2], 3)))
    with Image.open(file) as image:
        assert json.loads(image.getexif()[ExifTags.Base.ImageDescription]) == notes
        assert image.info["loop"] == 0


def test_an_animation_of_large_pictures_is_near(tmp_path):
    y, x = np.mgrid[:300, :400]
    waves = [np.sin(x / 40), np.cos(y / 30), np.sin((x + y) / 50)]
    picture = np.stack([127.5 * (1 + wave) for wave in waves], -1).round().astype(np.uint8)
    file = pictures.write_animation([picture, 255 - picture], tmp_path / "a.webp")
    for (frame, _), wanted in zip(frames_of(file), (picture, 255 - picture), strict=True):
        assert np.abs(frame.astype(int) - wanted).mean() < 3  # of 255
    assert file.stat().st_size < picture.size / 10


@pytest.mark.parametrize(
    ("size", "room", "wanted"),
    [((8, 8), (256, 256), (256, 256)), ((33, 98), (256, 256), (66, 196)), ((9, 9), (8, 8), (9, 9))],
)
def test_pixels_become_squares(size, room, wanted):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    large = pictures.enlarged(picture, *room)
    times = wanted[0] // size[0]
    assert large.shape == (*wanted, 3)
    assert np.array_equal(large, np.kron(picture, np.ones((times, times, 1), np.uint8)))
