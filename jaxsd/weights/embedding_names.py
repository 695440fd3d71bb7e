"""What the tensors of a textual-inversion file are, by their names and shapes alone.

Four forms are about: {token: vectors}; A1111's .pt, which keeps the token as its name (`pickles`
reads it as the first); A1111's .safetensors, whose only key says nothing; and that of XL, with the
vectors of its two towers. Where a file does not tell the token, the file's name is it.
"""

from collections.abc import Mapping

from jaxsd.weights.entries import Entry

# The keys of XL's form, as programs and diffusers' training scripts have them.
TOWERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
NO_TOKENS = ("emb_params", "*")  # the only key of a file, where it is not the token
# Whose text tower has vectors of this many channels.
WIDTHS = {
    768: "Stable Diffusion 1.x, or the first text tower of XL",
    1024: "Stable Diffusion 2.x",
    1280: "the second text tower of Stable Diffusion XL",
}


def places(entries: Mapping[str, Entry]) -> dict[str, str] | None:
    """component -> name of its tensor; None if these are not an embedding's."""
    if entries and entries.keys() <= TOWERS.keys():
        found = {TOWERS[name]: name for name in entries}
        return found if len(found) == len(entries) else None
    return {"text_encoder": next(iter(entries))} if len(entries) == 1 else None


def token(entries: Mapping[str, Entry]) -> str | None:
    """The token that a file tells."""
    name = next(iter(entries))
    return None if name in TOWERS or name in NO_TOKENS else name


def describe(entries: Mapping[str, Entry]) -> str | None:
    """A line about an embedding's file from its header alone; None if it is none.

    "textual inversion, token <cat>, 2 vectors, Stable Diffusion 2.x".
    """
    found = places(entries)
    shapes = [entries[name].shape for name in found.values()] if found else []
    if not found or not all(len(shape) in (1, 2) and shape[-1] in WIDTHS for shape in shapes):
        return None
    count = shapes[0][0] if len(shapes[0]) == 2 else 1
    word, two = token(entries), "text_encoder_2" in found
    facts = [
        "textual inversion",
        "named as the file" if word is None else f"token {word}",
        f"{count} vector{'s' * (count != 1)}",
        "Stable Diffusion XL" if two else WIDTHS[shapes[0][-1]],
    ]
    return ", ".join(facts)
