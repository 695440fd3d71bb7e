"""Several models at once: those to compare with the first, and a name for each."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsd import hub
from jaxsd.errors import JaxsdError
from jaxsd.pipeline import load
from jaxsd.serving.models import Served
from jaxsd.weights.files import read_json


def students_of(model: str) -> list[str]:
    """The models that ship and share a shipped model's parts: its students."""
    indices = {
        name: read_json(hub.PRETRAINED / name / "model_index.json") for name in hub.shipped()
    }
    return [name for name, index in indices.items() if index.get(hub.BASE) == model]


def load_beside(names: Mapping[str, str], first: Served, dtype: Any) -> list[Served]:
    """The models to draw with beside the first: at its sizes, as many pictures at a time.

    names: model to what clients call it. JaxsdError for one whose pictures are of another size.
    """
    found = []
    for model, name in names.items():
        pipe = load(model, dtype)
        if pipe.default_size != first.pipe.default_size:
            own, other = ("{}x{}".format(*m.default_size[::-1]) for m in (pipe, first.pipe))
            raise JaxsdError(f"{name} draws {own} and {first.name} {other}: not one beside another")
        sizes = {"sizes": first.sizes, "batch_size": first.batch_size}
        found.append(Served(name, pipe, first.limits, **sizes))
    return found


def served_names(models: Sequence[str]) -> dict[str, str]:
    """What clients call each model: of where it is on this machine no more than tells them apart.

    A training's model lies in a folder called "model", as all of them do. JaxsdError for one that
    is there twice.
    """
    parts = {
        model: Path(os.path.abspath(model)).parts if Path(model).exists() else (model,)
        for model in models
    }
    for i, model in enumerate(models):
        if parts[model] in [parts[other] for other in models[:i]]:
            raise JaxsdError(f"{model} is served already: name it once")
    names = {}
    for model, own in parts.items():
        others = [other for other in parts.values() if other != own]
        ends = (own[-count:] for count in range(1, len(own) + 1))
        apart = (end for end in ends if all(other[-len(end) :] != end for other in others))
        names[model] = "/".join(next(apart, own))
    return names
