"""What is to be compared: the parts of a folder, their configs, and the size of the pictures."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxsd import weights
from jaxsd.compare.report import Tolerance
from jaxsd.components import COMPONENTS, read_config
from jaxsd.conversion import convert
from jaxsd.errors import JaxsdError
from jaxsd.families import latent_shape
from jaxsd.hub import base_of, find
from jaxsd.weights.files import is_local
from jaxsd.weights.headers import component_entries

SIDE = 512  # of the pictures, in pixels, where no config tells


@dataclasses.dataclass(frozen=True)
class Size:
    """Height and width of the pictures and of their latents (the same in pixel space)."""

    pixels: tuple[int, int]
    latents: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Part:
    """A component on disk: its folder, and the class that opens it in PyTorch."""

    folder: Path
    library: str
    class_name: str


@dataclasses.dataclass(frozen=True)
class Model:
    """A folder and its parts by kind (a key of COMPONENTS); `file` is what it was made of."""

    folder: Path
    parts: dict[str, Part]
    file: Path | None = None


@contextlib.contextmanager
def opened(model: str | Path, variant: str | None = None, **how: Any) -> Iterator[Model]:
    """A model for both sides to read. JaxsdError if there is none, or not on this machine.

    A single file is written as a folder, which goes away at the end, for us to read and for PyTorch
    to take the configs of; the weights PyTorch reads from the file. So is a folder that jaxsd alone
    opens, for both to read. how: as for `load_parts`.
    """
    path = find(model, variant)
    if not is_local(path):
        raise JaxsdError(f"{path} is not on this machine: PyTorch reads local files alone")
    path = Path(path)
    if not path.is_file() and not _ours_alone(path, variant):
        yield Model(path, _parts(path))
        return
    with tempfile.TemporaryDirectory(prefix="jaxsd-compare-") as place:
        folder = Path(place) / "model"
        convert(path, folder, variant=variant, **how)
        yield Model(folder, _parts(folder), path if path.is_file() else None)


def _ours_alone(folder: Path, variant: str | None) -> bool:
    """Whether a model shares parts with one that ships, or has weights in eight bits."""
    if not (folder / "model_index.json").is_file():
        return False
    if base_of(weights.read_json(folder / "model_index.json"), folder) is not None:
        return True
    with contextlib.suppress(JaxsdError):  # a broken file is PyTorch's to refuse
        held = [component_entries(folder / name, variant)[0] for name in _parts(folder)]
        return any(entry.scale for entries in held for entry in entries.values())
    return False


def _parts(folder: Path) -> dict[str, Part]:
    if not (folder / "model_index.json").is_file():  # a component alone
        values = weights.read_json(folder / "config.json")
        name = values.get("_class_name") or next(iter(values.get("architectures") or []), None)
        for kind, classes in COMPONENTS.items():
            if name in classes:
                library = "diffusers" if "_class_name" in values else "transformers"
                return {kind: Part(folder, library, str(name))}
        raise JaxsdError(f"{folder / 'config.json'} names {name}, a class that jaxsd does not know")
    index = weights.read_json(folder / "model_index.json")
    parts = {}
    for kind in COMPONENTS:
        library, name = _entry(index.get(kind))
        if library in ("diffusers", "transformers"):
            parts[kind] = Part(folder / kind, library, name)
        elif library:
            raise JaxsdError(f"{folder}/model_index.json: {kind} is of {library}, not of diffusers")
    return parts


def _entry(value: Any) -> tuple[str, str]:
    """(library, class) of an entry of model_index.json; empty where it has none."""
    pair = value if isinstance(value, list) and len(value) == 2 else [None, None]
    return str(pair[0] or ""), str(pair[1] or "")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Two models and how to hold them against each other; see `compare` for the fields.

    model is read here, reference in PyTorch. progress is called with the name of each stage before
    it begins.
    """

    model: Model
    reference: Model
    variant: str | None
    dtypes: tuple[str, ...]
    height: int | None
    width: int | None
    layers: bool
    torch_device: str
    tolerance: Tolerance
    progress: Callable[[str], Any]

    def config(self, kind: str) -> Any:
        """Our config of a component."""
        file = self.model.parts[kind].folder / "config.json"
        return read_config(weights.read_json(file), kind, str(file))

    @property
    def size(self) -> Size:
        """As asked for, or the model's own; JaxsdError if the networks cannot have it.

        For a UNet alone it is that of the UNet's input.
        """
        configs = {kind: self.config(kind) for kind in self.model.parts}
        unet, vae, controlnet = (configs.get(kind) for kind in ("unet", "vae", "controlnet"))
        downscale = 1
        if vae is not None:
            downscale = vae.downscale
        elif controlnet is not None:  # its picture is halved by all convolutions but the first
            downscale = 2 ** (len(controlnet.conditioning_embedding_out_channels) - 1)
        own = getattr(vae, "sample_size", SIDE) if unet is None else unet.sample_size * downscale
        height, width = (own if side is None else side for side in (self.height, self.width))
        if unet is not None:
            return Size((height, width), latent_shape(unet, downscale, height, width)[:2])
        return Size((height, width), (height // downscale, width // downscale))
