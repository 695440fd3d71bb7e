"""Handwritten digits: 8x8 scans for the pixel models, coloured and captioned pictures for `digits`.

The scans are scikit-learn's `load_digits` (UCI optical digits, Alpaydin & Kaynak 1998, 1797 scans
bundled with the library, so nothing is downloaded). A picture is a scan enlarged to 32x32 in a
stroke colour on a background colour, with a caption that names some of digit, stroke and
background. `recover` undoes the rendering, so that generated pictures are judged as scans.

Sources are random access and `make_picture` draws from the generator it is given, so they plug
into grain and are deterministic:

    grain.MapDataset.source(PictureSource("train")).seed(0).shuffle().repeat().random_map(make_picture)
"""

import functools
import re
from collections.abc import Mapping

import numpy as np

from jaxsd.errors import JaxsdError

SPLITS = ("train", "test")
TEST_SIZE = 450
SCAN_SIZE = 8
PICTURE_SIZE = 32
JITTER = 0.05

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# At least .43 apart (Euclidean), so a jitter of .06 a channel (.10) cannot change the nearest.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.06, 0.10),
    "green": (0.08, 0.62, 0.20),
    "blue": (0.08, 0.22, 0.92),
    "yellow": (1.00, 0.92, 0.12),
    "purple": (0.58, 0.10, 0.72),
    "orange": (1.00, 0.50, 0.02),
    "white": (0.98, 0.98, 0.98),
    "black": (0.03, 0.03, 0.03),
}
COLOUR_NAMES = tuple(COLOURS)

# (share of all captions, templates); a template names exactly what its placeholders say. What it
# leaves out is free, which is what teaches the model to vary it. "red" alone means the stroke.
_TEMPLATES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (
        0.40,
        (
            "a {stroke} {digit} on a {background} background",
            "a {stroke} {digit} on {background}",
            "{stroke} {digit} on {background}",
            "{stroke} {digit}, {background} background",
            "the digit {digit} in {stroke} on a {background} background",
            "the digit {digit} in {stroke} on {background}",
            "the number {digit} in {stroke} on {background}",
            "a {background} background with a {stroke} {digit}",
            "on {background}: a {stroke} {digit}",
        ),
    ),
    (
        0.23,
        (
            "a {stroke} {digit}",
            "{stroke} {digit}",
            "{digit} in {stroke}",
            "the digit {digit} in {stroke}",
            "the number {digit} in {stroke}",
        ),
    ),
    (
        0.10,
        (
            "{digit} on a {background} background",
            "a {digit} on a {background} background",
            "the digit {digit} on {background}",
            "a {background} background with a {digit}",
            "on {background}: a {digit}",
        ),
    ),
    (0.15, ("{digit}", "a {digit}", "the digit {digit}", "the number {digit}")),
    (0.08, ("{stroke}", "something {stroke}", "a {stroke} digit", "a {stroke} number")),
    (0.04, ("a {background} background", "on a {background} background", "on {background}")),
)
_KIND_CUTS = np.cumsum([share for share, _ in _TEMPLATES])[:-1]
_ARTICLE = re.compile(r"\ba (?=orange|eight|8)")

Attributes = tuple[int | None, str | None, str | None]


# --- scans -----------------------------------------------------------------------------------


@functools.cache
def load_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The scans of a split: (float32 [n, 8, 8] ink in [0, 1], int64 [n] digits).

    Stratified, 1347 "train" and 450 "test", always the same ones. The arrays are read-only,
    because they are cached. Raises JaxsdError for any other split.
    """
    if split not in SPLITS:
        raise JaxsdError(f"no split {split!r} in the digits: choose one of {', '.join(SPLITS)}")
    # Imported here: scikit-learn takes a second, and sampling does not need it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, digits, test_size=TEST_SIZE, stratify=digits, random_state=0
    )
    x, y = (train_x, train_y) if split == "train" else (test_x, test_y)
    scans = (np.asarray(x, np.float32) / 16).reshape(-1, SCAN_SIZE, SCAN_SIZE)
    labels = np.asarray(y, np.int64)
    scans.setflags(write=False)
    labels.setflags(write=False)
    return scans, labels


class ScanSource:
    """Random access to one split: `{"image": float32 [8, 8, 1] in [-1, 1], "label": int}`."""

    def __init__(self, split: str):
        self.scans, self.labels = load_scans(split)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        image = 2 * self.scans[index][:, :, None] - 1
        return {"image": image, "label": int(self.labels[index])}


class PictureSource:
    """Random access to one split: `{"scan": float32 [8, 8] in [0, 1], "label": int}`.

    What `make_picture` turns into a picture and a caption.
    """

    def __init__(self, split: str):
        self.scans, self.labels = load_scans(split)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"scan": self.scans[index], "label": int(self.labels[index])}


# --- captions --------------------------------------------------------------------------------


def _fill(template: str, digit: str, stroke: str, background: str) -> str:
    text = template.format(digit=digit, stroke=stroke, background=background)
    return _ARTICLE.sub("an ", text)


def caption(rng: np.random.Generator, digit: int, stroke: str, background: str) -> str:
    """A random caption of a picture: it names one, two or all three of its attributes.

    The digit is a word or a numeral, half and half. About 40 % of captions name everything,
    23 % digit and stroke, 15 % the digit, 10 % digit and background, 8 % the stroke, 4 % the
    background.
    """
    kind = int(np.searchsorted(_KIND_CUTS, rng.random(), side="right"))
    templates = _TEMPLATES[kind][1]
    template = templates[rng.integers(len(templates))]
    name = DIGIT_WORDS[digit] if rng.random() < 0.5 else str(digit)
    return _fill(template, name, stroke, background)


@functools.cache
def _caption_table() -> dict[str, Attributes]:
    table: dict[str, Attributes] = {}
    for _, templates in _TEMPLATES:
        for template in templates:
            digits = range(10) if "{digit}" in template else (None,)
            strokes = COLOUR_NAMES if "{stroke}" in template else (None,)
            backgrounds = COLOUR_NAMES if "{background}" in template else (None,)
            for digit in digits:
                names = ("",) if digit is None else (DIGIT_WORDS[digit], str(digit))
                for stroke in strokes:
                    for background in backgrounds:
                        if stroke is not None and stroke == background:
                            continue
                        for name in names:
                            text = _fill(template, name, stroke or "", background or "")
                            table[text] = (digit, stroke, background)
    return table


def all_captions() -> list[str]:
    """Every caption that `caption` can return, sorted: the corpus of the tokenizer."""
    return sorted(_caption_table())


def parse_caption(text: str) -> Attributes:
    """(digit, stroke, background) that a caption asks for; None where it leaves them free.

    Case and outer blanks do not matter. Raises JaxsdError for what is not one of `all_captions`.
    """
    attributes = _caption_table().get(text.strip().lower())
    if attributes is None:
        raise JaxsdError(
            f"cannot tell which digit and colours {text!r} asks for: word it like "
            "'a red seven on a white background', 'blue 3' or 'nine'"
        )
    return attributes


# --- pictures --------------------------------------------------------------------------------


def _interpolation() -> np.ndarray:
    """[32, 8] Catmull-Rom (Keys 1981, a = -1/2) enlargement, half-pixel centres, edges repeated."""
    matrix = np.zeros((PICTURE_SIZE, SCAN_SIZE))
    position = (np.arange(PICTURE_SIZE) + 0.5) * SCAN_SIZE / PICTURE_SIZE - 0.5
    first = np.floor(position).astype(int) - 1
    for tap in range(4):
        d = np.abs(position - (first + tap))
        near = 1.5 * d**3 - 2.5 * d**2 + 1
        far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
        column = np.clip(first + tap, 0, SCAN_SIZE - 1)
        np.add.at(matrix, (np.arange(PICTURE_SIZE), column), np.where(d <= 1, near, far))
    return matrix


_ENLARGE = _interpolation()
_REDUCE = np.linalg.pinv(_ENLARGE)  # [8, 32] least squares: exact up to the clipping
# Half way to a smoothstep: crisper strokes, yet slope >= 1/2 everywhere, so that undoing it
# magnifies rounding and model noise at most twofold.
_INK = np.linspace(0, 1, 1025)
_CRISP = 0.5 * _INK + 0.5 * _INK**2 * (3 - 2 * _INK)


def render(scan: np.ndarray, stroke_rgb: np.ndarray, background_rgb: np.ndarray) -> np.ndarray:
    """A scan [8, 8] of ink in [0, 1] as a picture: float32 [32, 32, 3] in [0, 1].

    Enlarged smoothly, its contrast raised a little, in one colour on another (RGB in [0, 1]).
    Every value is a multiple of 1/255, so saving as PNG loses nothing.
    """
    ink = np.clip(_ENLARGE @ scan @ _ENLARGE.T, 0, 1)
    ink = 0.5 * ink + 0.5 * ink * ink * (3 - 2 * ink)
    background = np.asarray(background_rgb, np.float64)
    picture = background + ink[:, :, None] * (np.asarray(stroke_rgb) - background)
    return (np.rint(picture * 255) / 255).astype(np.float32)


def draw_colours(rng: np.random.Generator) -> tuple[str, str]:
    """The names of a random stroke and of another random background."""
    stroke, background = rng.choice(len(COLOUR_NAMES), size=2, replace=False)
    return COLOUR_NAMES[stroke], COLOUR_NAMES[background]


def colour_scan(
    scan: np.ndarray, rng: np.random.Generator, names: tuple[str, str] | None = None
) -> tuple[np.ndarray, str, str]:
    """Renders a scan [8, 8] in colour: (picture as from `render`, stroke, background).

    names: stroke and background, drawn if not given. Each of their channels is jittered by at most
    .05.
    """
    stroke, background = names or draw_colours(rng)
    jitter = rng.uniform(-JITTER, JITTER, size=(2, 3))
    colours = np.clip(np.array([COLOURS[stroke], COLOURS[background]]) + jitter, 0, 1)
    return render(scan, colours[0], colours[1]), stroke, background


def make_picture(
    element: dict, rng: np.random.Generator, names: tuple[str, str] | None = None
) -> dict:
    """A training example from an element of `PictureSource`, for grain's `random_map`.

    A scan in the named (or random) colours and a caption that fits:
    `{"image": float32 [32, 32, 3] in [-1, 1], "caption": str}`.
    """
    picture, stroke, background = colour_scan(element["scan"], rng, names)
    return {"image": 2 * picture - 1, "caption": caption(rng, element["label"], stroke, background)}


def nearest_colour(
    rgb: np.ndarray, colours: Mapping[str, tuple[float, float, float]] = COLOURS
) -> np.ndarray:
    """The names [n] of the colours nearest to RGB values [n, 3] in [0, 1] (Euclidean)."""
    palette = np.array(list(colours.values()))
    distance = np.linalg.norm(rgb[:, None, :] - palette[None], axis=-1)
    return np.array(list(colours))[np.argmin(distance, axis=1)]


def measure_colours(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of pictures [n, 32, 32, 3] in [0, 1]: RGB values [n, 3] of (strokes, backgrounds).

    The background is the median of the left and right edges (strokes often touch the top and
    bottom), the stroke is the mean of the 3 % of pixels farthest from it. Raises JaxsdError for
    another shape or range.
    """
    background, axis, _ = _measure(_checked(pictures))
    return background + axis, background


def recover(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Undoes `render`: pictures [n, 32, 32, 3] in [0, 1] -> (scans, strokes, backgrounds).

    Scans are float32 [n, 8, 8] in [0, 1]; strokes and backgrounds are colour names [n]. Colours
    are measured in each picture (`measure_colours`), so jitter does no harm. Ink is the place of a
    pixel between the two. A blank picture gives an empty scan. Raises JaxsdError for another shape
    or range.
    """
    background, axis, offset = _measure(_checked(pictures))
    length = np.maximum((axis**2).sum(axis=-1), 1e-2)  # contrast below .1 counts as blank
    crisp = np.einsum("npc,nc->np", offset, axis) / length[:, None]
    ink = np.interp(np.clip(crisp, 0, 1), _CRISP, _INK).reshape(-1, PICTURE_SIZE, PICTURE_SIZE)
    scans = np.clip(_REDUCE @ ink @ _REDUCE.T, 0, 1).astype(np.float32)
    return scans, nearest_colour(background + axis), nearest_colour(background)


def _checked(pictures: np.ndarray) -> np.ndarray:
    pictures = np.asarray(pictures)
    expected = (PICTURE_SIZE, PICTURE_SIZE, 3)
    if pictures.ndim != 4 or pictures.shape[1:] != expected:
        raise JaxsdError(f"expected pictures [n, 32, 32, 3], got {list(pictures.shape)}")
    if pictures.size and not (pictures.min() >= -1e-3 and pictures.max() <= 1 + 1e-3):
        raise JaxsdError("expected pictures with values in [0, 1]; divide uint8 by 255")
    return pictures.astype(np.float64)


def _measure(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(backgrounds [n, 3], from there to the strokes [n, 3], and to every pixel [n, p, 3])."""
    edges = np.concatenate([pictures[:, :, :2], pictures[:, :, -2:]], axis=2)
    background = np.median(edges.reshape(len(pictures), -1, 3), axis=1)

    offset = (pictures - background[:, None, None, :]).reshape(len(pictures), -1, 3)
    distance = np.linalg.norm(offset, axis=-1)
    count = round(0.03 * distance.shape[1])
    farthest = np.argpartition(distance, -count, axis=1)[:, -count:]
    axis = np.take_along_axis(offset, farthest[:, :, None], axis=1).mean(axis=1)
    return background, axis, offset
