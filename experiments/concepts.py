"""What `teaching.py` teaches: a letter or an ink, how it is shown, asked for and recognised."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import inks
import numpy as np
from edits import a, describe
from letters import draw_letters
from recognition import (
    TAUGHT_SEED,
    digits_right,
    held_out_accuracies,
    share_in_colours,
    share_of_letter,
)

from jaxsd.data import digits
from jaxsd.data.digits import Attributes
from jaxsd.pictures import to_uint8
from jaxsd.pipeline import Pipeline

RARE = "sks"  # the rare word of DreamBooth and LoRA
CLASS = "digit"  # what everything in the pictures is a kind of
Columns = dict[str, tuple[str, int]]  # heading and decimals by key, in the order of the table


class Taught(NamedTuple):
    """picture: uint8 [32, 32, 3]. caption: all that it shows, with {} for the concept's word."""

    name: str
    picture: np.ndarray
    caption: str


class Drawn(NamedTuple):
    """What a taught model draws, uint8 [n, 32, 32, 3]; wanted: what was asked for beside.

    bare: of the concept alone. full: of the concept and all else. kind: of the class. digits: of
    digits in the colours that the model has known before.
    """

    bare: np.ndarray
    full: np.ndarray
    full_wanted: Sequence[Attributes]
    kind: np.ndarray
    digits: np.ndarray
    digits_wanted: Sequence[Attributes]


class Concept(Protocol):
    """rare, token: what stands for it in captions of DreamBooth and LoRA, of textual inversion.

    begin: the word where textual inversion begins; templates: its captions.
    """

    @property
    def name(self) -> str: ...
    @property
    def rare(self) -> str: ...
    @property
    def token(self) -> str: ...
    @property
    def begin(self) -> str: ...
    @property
    def templates(self) -> tuple[str, ...]: ...
    @property
    def columns(self) -> Columns: ...

    def taught(self, count: int) -> list[Taught]:
        """The pictures to teach it from, always the same ones."""
        ...

    def bare_prompt(self, word: str) -> str: ...

    def full_prompts(
        self, word: str, count: int, rng: np.random.Generator
    ) -> tuple[list[str], list[Attributes]]:
        """Prompts that also name all that the concept leaves free, and what that is."""
        ...

    def figures(self, drawn: Drawn) -> dict[str, float]:
        """One of each column."""
        ...

    def accuracies(self, pipe: Pipeline) -> dict[str, float]:
        """Of whoever recognises it, on pictures of held-out scans, by kind."""
        ...


@dataclasses.dataclass(frozen=True)
class Letter:
    """A shape: in all colours."""

    name: str
    rare = f"{RARE} {CLASS}"
    token = "<letter>"
    begin = CLASS
    templates = ("{}", "a {}", "the digit {}", "the number {}")
    columns = {
        "letter": ("the letter, bare prompt", 2),
        "letter_in_colours": ("the letter, with colours", 2),
        "all_right": ("and both colours right", 2),
        "digit": ("ten digits right", 3),
        "digit_all_right": ("and both colours right ", 3),
        "class_is_letter": ("'a digit' is the letter", 2),
    }

    def taught(self, count: int) -> list[Taught]:
        """No stroke twice."""
        strokes = np.random.default_rng(TAUGHT_SEED).permutation(digits.COLOUR_NAMES)
        backgrounds = np.roll(strokes, 3)
        shown = []
        for i, scan in enumerate(draw_letters(self.name, count, TAUGHT_SEED)):
            names = (str(strokes[i % len(strokes)]), str(backgrounds[i % len(strokes)]))
            picture, *_ = digits.colour_scan(scan, np.random.default_rng([TAUGHT_SEED, i]), names)
            caption = in_colours("{}", *names)
            shown.append(Taught("-on-".join(names), to_uint8(2 * picture - 1), caption))
        return shown

    def bare_prompt(self, word: str) -> str:
        return f"a {word}"

    def full_prompts(
        self, word: str, count: int, rng: np.random.Generator
    ) -> tuple[list[str], list[Attributes]]:
        pairs = [digits.draw_colours(rng) for _ in range(count)]
        return [in_colours(word, *pair) for pair in pairs], [(None, *pair) for pair in pairs]

    def figures(self, drawn: Drawn) -> dict[str, float]:
        digit, right = digits_right(drawn.digits, drawn.digits_wanted)
        pairs = [(str(stroke), str(background)) for _, stroke, background in drawn.full_wanted]
        return {
            "letter": share_of_letter(self.name, drawn.bare),
            "letter_in_colours": share_of_letter(self.name, drawn.full),
            "all_right": share_in_colours(self.name, drawn.full, pairs),
            "digit": digit,
            "digit_all_right": right,
            "class_is_letter": share_of_letter(self.name, drawn.kind),
        }

    def accuracies(self, pipe: Pipeline) -> dict[str, float]:
        return held_out_accuracies(self.name)


def in_colours(word: str, stroke: str, background: str) -> str:
    return f"{a(stroke)} {word} on {a(background)} background"


@dataclasses.dataclass(frozen=True)
class Ink:
    """What strokes are drawn in: of all digits, on all backgrounds but its own colours."""

    name: str
    rare = RARE
    token = "<ink>"
    templates = ("{}", "a {} digit", "a {} number", "something {}")
    columns = {
        "ink": ("the ink, bare prompt", 2),
        "ink_in_full": ("the ink, full prompt", 2),
        "ink_and_digit": ("and the digit right", 2),
        "all_right": ("and the background", 2),
        "digit": ("ten digits right", 3),
        "stroke": ("eight inks right", 3),
        "digit_all_right": ("all right", 3),
        "class_is_ink": ("'a digit' is in the ink", 2),
    }

    @property
    def begin(self) -> str:
        """The nearest ink that has a word."""
        return str(inks.nearest_ink(inks.rgb_of(self.name)[None], digits.COLOUR_NAMES)[0])

    def taught(self, count: int) -> list[Taught]:
        return [
            Taught(
                f"{digits.DIGIT_WORDS[digit]}-on-{background}",
                picture,
                describe((digit, "{}", background)),
            )
            for picture, digit, background in inks.draw_digits(self.name, count, TAUGHT_SEED)
        ]

    def bare_prompt(self, word: str) -> str:
        return f"a {word} {CLASS}"

    def full_prompts(
        self, word: str, count: int, rng: np.random.Generator
    ) -> tuple[list[str], list[Attributes]]:
        """All digits alike often, on the known backgrounds."""
        names = rng.choice(inks.backgrounds_for(self.name), size=count)
        asked = [(i % 10, str(background)) for i, background in enumerate(names)]
        prompts = [describe((digit, word, background)) for digit, background in asked]
        return prompts, [(digit, self.name, background) for digit, background in asked]

    def figures(self, drawn: Drawn) -> dict[str, float]:
        digit, ink, background = inks.see(drawn.full, self.name).right(drawn.full_wanted).T
        before = inks.see(drawn.digits, self.name).right(drawn.digits_wanted)
        return {
            "ink": self._share(drawn.bare),
            "ink_in_full": float(ink.mean()),
            "ink_and_digit": float((ink & digit).mean()),
            "all_right": float((ink & digit & background).mean()),
            "digit": float(before[:, 0].mean()),
            "stroke": float(before[:, 1].mean()),
            "digit_all_right": float(before.all(1).mean()),
            "class_is_ink": self._share(drawn.kind),
        }

    def _share(self, pictures: np.ndarray) -> float:
        return float((inks.see(pictures, self.name).inks == self.name).mean())

    def accuracies(self, pipe: Pipeline) -> dict[str, float]:
        return inks.held_out_accuracies(self.name, pipe)


KINDS: dict[str, type[Letter] | type[Ink]] = {"letter": Letter, "ink": Ink}
