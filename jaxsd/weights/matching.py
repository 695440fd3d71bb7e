"""Which tensor of a file is which parameter of a network; everything that differs, at once."""

from collections.abc import Mapping

from jaxsd.errors import JaxsdError
from jaxsd.weights.entries import Entry
from jaxsd.weights.files import AnyPath, listing

# diffusers before 0.13 named the VAE's attention layers so, as the CompVis weights still do.
OLD_ATTENTION = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def match(
    header: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], file: AnyPath
) -> dict[str, str]:
    """Which tensor of the file each wanted name is; JaxsdError lists everything that differs."""
    sources, unexpected, misshapen, alien = {}, [], [], []
    for source in sorted(header, key=lambda name: name not in shapes):  # true names first
        name = wanted_name(source, shapes)
        if name is None:
            continue
        if name not in shapes or name in sources:
            unexpected.append(source)
            continue
        sources[name] = source
        shape = header[source].shape
        if not same_shape(name, shape, shapes[name]):
            misshapen.append(f"{name} {list(shape)} instead of {list(shapes[name])}")
        if not header[source].is_weight:
            alien.append(f"{name} {header[source].dtype}")
    problems = {
        "missing": [name for name in shapes if name not in sources],
        "unexpected": unexpected,
        "misshapen": misshapen,
        "not float32, float16 or bfloat16": alien,
    }
    lists = [f"{len(names)} {kind}: {listing(names)}" for kind, names in problems.items() if names]
    if lists:
        raise JaxsdError(f"{file} does not fit the model: {'; '.join(lists)}")
    return sources


def wanted_name(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The name in `shapes` that a file's `name` stands for; None if it is to be ignored.

    A name without any counterpart comes back as it is.
    """
    if name in shapes:
        return name
    # 0, 1, 2, ... and a count of training batches: no weights
    if name.endswith(("embeddings.position_ids", ".num_batches_tracked")):
        return None
    candidates = [f"text_model.{name}"]  # transformers >= 5.6 leaves out this prefix
    candidates += [name.replace(old, new) for old, new in OLD_ATTENTION.items() if old in name]
    return next((c for c in candidates if c in shapes), name)


def same_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the shape is the wanted one, or that of an old VAE's attention, a 1x1 convolution."""
    attention = any(f"{new}weight" in name for new in OLD_ATTENTION.values())
    return shape == tuple(wanted) or (attention and shape == (*wanted, 1, 1))
