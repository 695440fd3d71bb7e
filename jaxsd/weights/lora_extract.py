"""The LoRA that comes nearest to the difference between two models: a truncated SVD of each layer.

found = extract({"unet": tuned}, {"unet": base}, rank=8)
lora_files.save(found.lora, "style.safetensors")

Of all matrices of a rank the one made of the largest singular values and their vectors is nearest
(Eckart & Young 1936). The kernel of a convolution is the matrix [out, in * kh * kw], as in `lora`.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.nn import Params
from jaxsd.weights import lora_names
from jaxsd.weights.files import listing
from jaxsd.weights.lora import Layer, LoRA

# What looks rows up by number: no program reads factors of it
TABLES = ("token_embedding.weight", "position_embedding.weight")


@dataclasses.dataclass(frozen=True)
class Extracted:
    """A LoRA, and how much of the difference between the models it holds.

    kept: the Frobenius norm of what it adds, as a share of the whole difference's, in [0, 1].
    possible: as much of a LoRA of full rank, which changes no norms, biases or embedding tables.
    """

    lora: LoRA
    kept: float
    possible: float


def extract(
    tuned: Mapping[str, Params], base: Mapping[str, Params], rank: int, form: str = "peft"
) -> Extracted:
    """What makes `base` nearly `tuned`: components "unet", "text_encoder" and "text_encoder_2".

    rank: at least 1; less in a layer that is smaller. Layers that are the same in both are left
    out, and so (form "kohya") are those for which programs know no name of kohya's. Factors are
    float32 and balanced, up = U sqrt(S) and down = sqrt(S) V', with alpha the rank.

    JaxsdError for a rank below 1, models of two families (both are named), or a difference that is
    none or not finite.
    """
    if rank < 1:
        raise JaxsdError(f"the rank of a LoRA must be at least 1, not {rank}")
    _check(tuned, base)
    layers: dict[str, dict[str, Layer]] = {}
    kept = possible = total = 0.0
    for component, weights in tuned.items():
        for name, value in weights.items():
            change = np.asarray(value, np.float32) - np.asarray(base[component][name], np.float32)
            size = float(np.square(change, dtype=np.float64).sum())
            if not math.isfinite(size):
                raise JaxsdError(f"{component}.{name}: the difference between the models is not "
                                 "finite: one of them is broken")  # fmt: skip
            total += size
            if not size or not _has_place(component, name, change.shape, form):
                continue
            possible += size
            layer, energy = _truncated(change, rank)
            layers.setdefault(component, {})[name] = layer
            kept += energy
    if not layers:
        raise JaxsdError("the two models are the same in all that a LoRA can change")
    shares = (min(math.sqrt(part / total), 1.0) for part in (kept, possible))
    return Extracted(LoRA(layers), *shares)


def _truncated(change: np.ndarray, rank: int) -> tuple[Layer, float]:
    """The layer of at most this rank that is nearest to a change, and its squared norm."""
    matrix = change.reshape(len(change), -1)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, len(s))
    root = np.sqrt(s[:rank])
    down = (root[:, None] * v[:rank]).reshape(rank, *change.shape[1:])
    layer = Layer(np.ascontiguousarray(down), u[:, :rank] * root, float(rank))
    return layer, float(np.square(s[:rank], dtype=np.float64).sum())


def _has_place(component: str, name: str, shape: tuple[int, ...], form: str) -> bool:
    if form == "kohya" and component == "unet" and name.startswith("add_embedding."):
        return False  # its names for XL come from LDM, where others look for these in vain
    return name.endswith(".weight") and len(shape) in (2, 4) and not name.endswith(TABLES)


def _check(tuned: Mapping[str, Params], base: Mapping[str, Params]) -> None:
    """JaxsdError unless the two have the same weights in the same shapes."""
    shapes = [{c: {n: v.shape for n, v in p.items()} for c, p in m.items()} for m in (tuned, base)]
    if shapes[0] == shapes[1]:
        return
    names = [_family(model) for model in shapes]
    if names[0] != names[1]:
        raise JaxsdError(f"the tuned model is {names[0]}, the base is {names[1]}: no LoRA leads "
                         "from one family to another")  # fmt: skip
    flat = [{(c, n): s for c, p in model.items() for n, s in p.items()} for model in shapes]
    places = {**flat[0], **flat[1]}
    differ = [".".join(place) for place in places if flat[0].get(place) != flat[1].get(place)]
    raise JaxsdError(
        f"both models are {names[0]}, but of different shapes: {len(differ)} weights differ, "
        f"{listing(differ)}; take the base that was tuned"
    )


def _family(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
    return lora_names.family(shapes.get("unet", {})) or "one that reads no text"
