r"""Weights in prompts: "a (red:1.3) seven" says that red matters 1.3 times as much.

The syntax of AUTOMATIC1111's web UI, but for its shorthand without numbers: parentheses in which no
number follows a colon at the end are text, as they are to diffusers. Weights nest and multiply;
\( and \) are parentheses that never weigh.
"""

import re

_PIECES = re.compile(r"(\\[()\\]|\(|:\s*\d*\.?\d+\s*\)|\))")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """The prompt in pieces of one weight each: [("a ", 1.0), ("red", 1.3), (" seven", 1.0)]."""
    pieces: list[tuple[str, float]] = []
    opened: list[int] = []  # where in `pieces` the parentheses that are still open stand
    for text in filter(None, _PIECES.split(prompt)):
        if text[0] == "\\" and len(text) == 2:
            pieces.append((text[1], 1.0))
        elif text == "(":
            opened.append(len(pieces))
            pieces.append((text, 1.0))
        elif text[0] == ":" and text[-1] == ")" and opened:
            start, weight = opened.pop(), float(text[1:-1])
            pieces[start:] = [(inner, w * weight) for inner, w in pieces[start + 1 :]]
        else:
            if text == ")" and opened:
                opened.pop()
            pieces.append((text, 1.0))
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged
