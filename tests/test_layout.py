"""Imports go one way, and what is heavy is loaded only when it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxsd

PACKAGE = Path(jaxsd.__file__).parent
MODULES = {
    ".".join(("jaxsd", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# What a part of the package may import of the package, besides itself.
ALLOWED = {
    "errors": (),
    "kernels": (),
    "eight_bits": ("errors", "kernels"),
    "nn": ("eight_bits", "kernels"),
    "fused": ("kernels", "nn"),
    "models": ("errors", "fused", "nn"),
    "diffusion": ("errors", "models.config"),
    "families": ("errors", "models", "diffusion.schedule"),
    "prompts": (),
    "clip_words": (),
    "tokenizer": ("clip_words", "errors", "prompts"),
    "gallery": ("errors", "prompt_files", "weights.files"),
    "seeds": (),
    "prompt_files": ("errors", "seeds"),
    "writing": ("pictures",),
    "pictures": ("errors", "weights.files"),
    "tiling": (),
    "weights": ("errors", "nn"),
    "sharding": ("errors", "nn"),
    "processes": ("errors",),
    "checksums": ("errors", "weights"),
    "checkpoints": ("checksums", "errors", "nn", "processes", "weights"),
    "hub": ("errors", "weights"),
    "inspection": ("errors", "hub", "weights"),
    "vocabulary": ("errors", "hub", "tokenizer", "weights"),
    "components": (
        "checkpoints",
        "diffusion.schedule",
        "errors",
        "families",
        "hub",
        "models",
        "nn",
        "tokenizer",
        "vocabulary",
        "weights",
    ),
    "compilation_cache": (),
    "memory": (),
    "custom_calls": ("errors",),
    "facts": (),
    "programs": ("custom_calls", "errors", "facts", "kernels", "nn", "weights"),
    "conversion": ("components", "errors", "hub", "vocabulary", "weights"),
    "conditioning": ("errors", "models", "nn", "programs", "sharding", "tokenizer", "weights"),
    "shortcuts": ("diffusion", "errors", "models", "nn"),
    "denoising": ("diffusion", "errors", "models", "nn", "shortcuts", "weights"),
    "towers": ("components", "conditioning", "errors", "models", "nn", "tokenizer"),
    "encoding": ("data", "errors", "kernels", "sharding", "tokenizer", "towers", "weights"),
    "model": (
        "components",
        "conditioning",
        "diffusion",
        "eight_bits",
        "errors",
        "facts",
        "nn",
        "programs",
        "sharding",
        "tokenizer",
        "weights",
    ),
    "compiled": (
        "denoising",
        "diffusion",
        "kernels",
        "model",
        "nn",
        "sharding",
        "shortcuts",
        "weights",
    ),
    "networks": (
        "compiled",
        "components",
        "conditioning",
        "denoising",
        "diffusion",
        "errors",
        "families",
        "models",
        "nn",
        "pictures",
        "seeds",
        "sharding",
        "shortcuts",
        "tiling",
    ),
    "tasks": ("denoising", "diffusion", "errors", "networks", "pictures"),
    "previews": ("components", "errors", "kernels", "networks", "pictures"),
    "terminal": ("pictures",),
    "run_report": ("errors", "pictures", "weights.files"),
    "watching": ("errors", "networks", "pictures", "previews", "terminal"),
    "pipeline": (
        "components",
        "conditioning",
        "denoising",
        "diffusion",
        "errors",
        "families",
        "hub",
        "networks",
        "nn",
        "pictures",
        "shortcuts",
        "tasks",
    ),
    "ahead": ("errors", "pipeline", "programs", "shortcuts"),
}
NEVER = {
    "objectives": ("training", "cli", "evaluation"),
    "training": ("cli", "evaluation"),
    "data": ("models", "pipeline", "objectives", "training", "cli"),
    "evaluation": ("training", "objectives", "cli"),
    "editing": ("cli", "evaluation"),
    "compare": ("training", "objectives", "evaluation", "cli"),
    "serving": ("training", "objectives", "evaluation", "cli"),
}
FOREIGN = ("torch", "diffusers")
WEB = ("gradio", "fastapi", "starlette", "uvicorn", "pydantic")


def imports(path: Path, lazily: bool = True) -> set[str]:
    """Every module that a file imports, by full name; `lazily` counts those inside functions."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from jaxsd import weights` is jaxsd.weights, but not every name is a module.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


def inside(module: str, part: str) -> bool:
    return module == f"jaxsd.{part}" or module.startswith(f"jaxsd.{part}.")


def of(part: str) -> dict[str, set[str]]:
    """The jaxsd modules that each module of a part imports from outside it."""
    modules = {name: path for name, path in MODULES.items() if inside(name, part)}
    assert modules, f"no part {part}"
    return {
        name: {m for m in imports(path) if m.split(".")[0] == "jaxsd" and not inside(m, part)}
        for name, path in modules.items()
    }


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_one_way(part):
    for name, wanted in of(part).items():
        wrong = {m for m in wanted if not any(inside(m, other) for other in ALLOWED[part])}
        assert not wrong, f"{name} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("part", NEVER)
def test_what_stands_on_top_is_not_imported_from_below(part):
    for name, wanted in of(part).items():
        wrong = {m for m in wanted if any(inside(m, other) for other in NEVER[part])}
        assert not wrong, f"{name} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_needs_torch(name):
    # `compare` alone holds numbers against PyTorch's, and loads it when it is called.
    wanted = imports(MODULES[name], lazily=not inside(name, "compare"))
    assert not {m for m in wanted if m.split(".")[0] in FOREIGN}


@pytest.mark.parametrize("name", [name for name in MODULES if not inside(name, "serving")])
def test_what_serves_alone_knows_the_web(name):
    assert not {m for m in imports(MODULES[name]) if m.split(".")[0] in WEB}


def test_importing_jaxsd_is_light():
    heavy = ("torch", "diffusers", "sklearn", "grain", "orbax", "transformers", "scipy.stats")
    code = f"import sys, jaxsd; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_picture_takes_nothing_heavy(tmp_path):
    """What the way from prompt to picture has no use for costs seconds at every start."""
    heavy = ("torch", "diffusers", "sklearn", "grain", "orbax", "transformers", "scipy", "tqdm")
    heavy += ("tensorboardX", "huggingface_hub", "matplotlib", "pyarrow", "pandas")
    code = f"""
import sys
from jaxsd.cli import run_command
run_command("sample", ["seven", "--steps", "1", "--out", sys.argv[1]])
print([name for name in {heavy} if name in sys.modules])
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(list(tmp_path.glob("*.png"))) == 1
