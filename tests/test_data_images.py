"""From bytes to pixels: as people see a picture, scaled and cropped; hostile ones are refused."""

import io
import struct
import zlib

import albums
import numpy as np
import pytest
from PIL import Image
from refusals import refused

from jaxsd import pictures
from jaxsd.data.images import make_image, read_size


def save(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def rng(seed=0):
    return np.random.default_rng(seed)


def gradient(height, width):
    """Red grows to the right and green downwards, linearly, so that places can be told."""
    y, x = np.mgrid[:height, :width]
    return np.stack([2 * x, 2 * y, 0 * x], -1).astype(np.uint8)


def test_scaling_is_the_pipelines_own():
    picture = albums.encoded(0, 48, 40)
    made = make_image(picture, (64, 64), rng())
    whole = Image.open(io.BytesIO(picture)).resize((64, 77), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(made["image"], np.asarray(whole)[6:70], atol=1)  # of 255
    square = make_image(albums.encoded(0, 48, 48), (32, 32), rng())["image"]
    same = pictures.to_model(Image.open(io.BytesIO(albums.encoded(0, 48, 48))), 32, 32)
    np.testing.assert_array_equal(square / np.float32(127.5) - 1, same)


def test_the_centre_is_kept_and_its_place_is_told():
    made = make_image(save(Image.fromarray(gradient(60, 100))), (60, 60), rng())
    np.testing.assert_array_equal(made["image"], gradient(60, 100)[:, 20:80])
    for name, value in {
        "original_size": (60, 100),
        "crop": (0, 20),
        "target_size": (60, 60),
    }.items():
        assert made[name].dtype == np.int32
        np.testing.assert_array_equal(made[name], value)


def test_random_crops_are_where_they_say_and_everywhere():
    picture, seen = save(Image.fromarray(gradient(60, 100))), set()
    for seed in range(200):
        made = make_image(picture, (60, 60), rng(seed), "random")
        top, left = made["crop"]
        np.testing.assert_array_equal(made["image"], gradient(60, 100)[:, left : left + 60])
        assert top == 0
        seen.add(int(left))
    assert {0, 40} <= seen and len(seen) > 35
    again = make_image(picture, (60, 60), rng(7), "random")
    np.testing.assert_array_equal(
        again["crop"], make_image(picture, (60, 60), rng(7), "random")["crop"]
    )


def test_half_of_the_pictures_are_mirrored_before_they_are_cropped():
    source = gradient(60, 100)
    picture, mirrored = save(Image.fromarray(source)), 0
    for seed in range(100):
        made = make_image(picture, (60, 60), rng(seed), "random", flip=True)
        left = made["crop"][1]
        flipped = made["image"][0, 0, 0] > made["image"][0, -1, 0]
        want = source[:, ::-1] if flipped else source
        np.testing.assert_array_equal(made["image"], want[:, left : left + 60])
        mirrored += int(flipped)
    assert 30 <= mirrored <= 70


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_are_turned_as_their_exif_says(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(gradient(40, 80))
    inverse = {  # what a camera held like this stores of an upright scene
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    raw = save(stored, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    assert read_size(raw) == (40, 80)
    made = make_image(raw, (40, 80), rng())
    np.testing.assert_array_equal(made["original_size"], (40, 80))
    assert np.abs(made["image"].astype(int) - gradient(40, 80)).mean() < 4  # JPEG's own loss


def test_every_mode_becomes_rgb_on_white():
    grey = Image.fromarray(np.full((8, 8), 51, np.uint8))
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    deep = Image.fromarray(np.full((8, 8), 51 * 257, np.uint16))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    cases = {
        (51, 51, 51): [save(grey), save(deep), save(grey, "JPEG")],
        (255, 0, 0): [save(red), save(palette), save(palette, "GIF"), save(red, "TIFF")],
        (255, 255, 255): [save(clear), save(palette, transparency=1), save(clear, "WEBP")],
    }
    for colour, raws in cases.items():
        for raw in raws:
            image = make_image(raw, (8, 8), rng())["image"]
            assert image.shape == (8, 8, 3) and image.dtype == np.uint8
            assert np.abs(image.astype(int) - colour).max() <= 1
    cmyk = make_image(save(red.convert("CMYK"), "JPEG"), (8, 8), rng())["image"]
    assert np.abs(cmyk.astype(int) - (255, 0, 0)).max() <= 8


def test_large_jpegs_are_decoded_small_and_look_the_same():
    raw = albums.encoded(3, 1200, 1600, "JPEG", quality=95)
    assert read_size(raw) == (1200, 1600)
    made = make_image(raw, (64, 64), rng())
    np.testing.assert_array_equal(made["original_size"], (1200, 1600))
    whole = Image.open(io.BytesIO(raw)).resize((85, 64), Image.Resampling.LANCZOS)
    difference = np.asarray(whole)[:, 10:74].astype(int) - made["image"]
    assert np.abs(difference).max() <= 4


def png(width, height):
    """A PNG that promises any number of pixels and has none."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


JPEG = albums.encoded(1, 64, 64, "JPEG")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"These are words, not pixels.\n" * 20,
        JPEG[:10],
        JPEG[:-200],
        JPEG[:4] + b"\x00" * 300 + JPEG[304:],
        png(50_000, 50_000),
        png(2**31 - 1, 2**31 - 1),
        png(11_000, 10_000),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n",
    ],
)
def test_what_cannot_be_decoded_is_refused(raw):
    assert "cannot be decoded" in refused(make_image, raw, (8, 8), rng())


def test_a_thread_of_pixels_takes_no_more_memory_than_any_other():
    raw = save(Image.new("RGB", (60_000, 1), "blue"))
    made = make_image(raw, (512, 512), rng(), "random")  # scaled as a whole: 47 GB
    assert made["image"].shape == (512, 512, 3) and (made["image"] == (0, 0, 255)).all()


def test_sizes_are_read_from_the_first_bytes():
    assert read_size(albums.encoded(0, 300, 500)[:100]) == (300, 500)
    assert read_size(JPEG[:700]) == (64, 64)
    assert "cannot be decoded" in refused(read_size, b"GIF89a")
    assert "pixels" in refused(read_size, png(50_000, 50_000))
