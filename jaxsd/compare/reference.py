"""PyTorch's side: loads a component with diffusers or transformers and records its blocks."""

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd import memory, weights
from jaxsd.compare.plan import Model
from jaxsd.errors import JaxsdError

# transformers >= 5.6 names the parts of CLIPTextModel without it, files and our modules with it.
OPTIONAL_PREFIX = "text_model."


def require() -> Any:
    """The torch module, quiet and exact in float32; JaxsdError where the extra is not installed."""
    try:
        import diffusers
        import torch
        import transformers
    except ImportError:
        raise JaxsdError(
            'compare needs PyTorch and diffusers: pip install "jaxsd[torch]"'
        ) from None
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch


def load(model: Model, kind: str, dtype: str, device: str, variant: str | None = None) -> Any:
    """A component as a module of PyTorch."""
    torch = require()
    if model.file is not None:
        return getattr(load_pipeline(model, dtype, device), kind).eval()
    part = model.parts[kind]
    cls = _class(part.library, part.class_name)
    with errors_in_one_line(part.folder):
        options = {"variant": variant} if variant else {}
        module = cls.from_pretrained(str(part.folder), local_files_only=True, **options)
        return module.eval().to(device, getattr(torch, dtype))


def load_pipeline(model: Model, dtype: str, device: str, variant: str | None = None) -> Any:
    """diffusers' own pipeline of a folder or a single file, without the safety checker."""
    torch = require()
    index = weights.read_json(model.folder / "model_index.json")
    cls = _class("diffusers", str(index.get("_class_name")))
    options: dict[str, Any] = {"local_files_only": True}
    if "safety_checker" in index:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    with errors_in_one_line(model.file or model.folder):
        if model.file is not None:
            config = str(model.folder)
            pipe = cls.from_single_file(str(model.file), config=config, **options)
        else:
            options |= {"variant": variant} if variant else {}
            pipe = cls.from_pretrained(str(model.folder), **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device, getattr(torch, dtype))


def _class(library: str, name: str) -> Any:
    found = getattr(importlib.import_module(library), name, None)
    if not isinstance(found, type):
        raise JaxsdError(f"the {library} that is installed has no class {name}")
    return found


def scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A scheduler of diffusers by its class, with those of the options that it has."""
    cls = _class("diffusers", name)
    known = cls._get_init_keys(cls)
    return cls.from_config({k: v for k, v in config.items() if k in known})


@contextlib.contextmanager
def errors_in_one_line(path: Path) -> Iterator[None]:
    """Whatever the libraries raise while they load, or look for a GPU, becomes a JaxsdError."""
    try:
        yield
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise JaxsdError(f"PyTorch could not load {path}: {first}") from error


def record(
    module: Any,
    call: Callable[[Any, Mapping[str, Any]], Any],
    inputs: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """What the blocks named in `shapes` return, float32 and in our layout and shape.

    A block that has no counterpart in PyTorch, or did not run there, is left out.
    """
    torch = require()
    outputs: dict[str, np.ndarray] = {}
    modules = dict(module.named_modules())

    def hook(name: str) -> Callable:
        def keep(block: Any, args: Any, output: Any) -> None:
            if name not in outputs:
                outputs[name] = _in_our_layout(name, block, output, shapes[name])

        return keep

    handles = []
    for name in shapes:
        short = f"{name}.".removeprefix(OPTIONAL_PREFIX).removesuffix(".")
        if (block := modules.get(name, modules.get(short))) is not None:
            handles.append(block.register_forward_hook(hook(name)))
    first = next(module.parameters())
    with torch.inference_mode():
        call(module, {k: to_torch(v, first.dtype, first.device) for k, v in inputs.items()})
    for handle in handles:
        handle.remove()
    return outputs


def _in_our_layout(name: str, block: Any, output: Any, shape: tuple[int, ...]) -> np.ndarray:
    torch = require()
    while not torch.is_tensor(output):  # (states, weights) or a dataclass of outputs
        output = output[0]
    value = output.detach().float().cpu().numpy()
    if value.ndim == 4 or isinstance(block, torch.nn.GroupNorm):
        value = np.moveaxis(value, 1, -1)
    if value.size != np.prod(shape):
        raise JaxsdError(f"{name} returns {list(value.shape)} in PyTorch, here {list(shape)}")
    return np.array(value.reshape(shape), order="C")


def to_torch(value: np.ndarray, dtype: Any, device: Any = "cpu") -> Any:
    """An input of ours for PyTorch: pictures NCHW, ids as long integers."""
    torch = require()
    if np.issubdtype(value.dtype, np.integer):
        return torch.from_numpy(value).long().to(device)
    value = np.moveaxis(value, -1, 1) if value.ndim == 4 else value
    return torch.from_numpy(np.array(value, order="C")).to(device, dtype)


def free() -> None:
    """Gives memory that is no longer used back to the system, before the other side loads."""
    gc.collect()
    memory.give_back()
