"""Captions for pictures of one thing that has a name and nothing else said about it."""

from collections.abc import Sequence

from jaxsd.errors import JaxsdError

# {} stands for the name. What differs among captions is not learnt as the name's meaning.
TEMPLATES = {
    "object": (
        "{}",
        "a photo of {}",
        "a picture of {}",
        "a picture that shows {}",
        "a close view of {}",
        "a sharp photo of {}",
        "a dark photo of {}",
        "a bright photo of {}",
        "a good photo of one {}",
        "a small picture of {}",
        "{} in the middle of the picture",
        "{} as somebody sees it",
    ),
    "style": (
        "in the style of {}",
        "a picture in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a small picture in the style of {}",
        "a detail in the style of {}",
        "something new, as {} would have it",
        "the world as {} shows it",
    ),
}


def captions(name: str, templates: Sequence[str]) -> tuple[str, ...]:
    """The templates with the name in them; JaxsdError for one without a place for it."""
    for template in templates:
        if "{}" not in template:
            raise JaxsdError(
                f"template {template!r} has no place for the token: write {{}} there, as in "
                "'a photo of {}'"
            )
    return tuple(template.replace("{}", name) for template in templates)
