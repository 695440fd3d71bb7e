"""The comparison of a whole model: its components one after the other, then a trajectory.

The largest ones fill a machine, so PyTorch's and ours are never held together: PyTorch's runs
first and leaves the outputs of its blocks.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.compare import inputs, reference, trajectory
from jaxsd.compare.blocks import Comparison, outline
from jaxsd.compare.plan import Plan, opened
from jaxsd.compare.report import DTYPES, Report, Row, Section, Tolerance, make_row
from jaxsd.components import Component, load_component, make_net
from jaxsd.errors import JaxsdError


def compare(
    model: str | Path,
    *,
    reference_model: str | Path | None = None,
    variant: str | None = None,
    components: Sequence[str] | None = None,
    dtypes: Sequence[str] = DTYPES,
    height: int | None = None,
    width: int | None = None,
    layers: bool = False,
    sampled: trajectory.Sampled | None = None,
    torch_device: str = "cpu",
    tolerance: Tolerance | None = None,
    progress: Callable[[str], Any] | None = None,
    **single_file: Any,
) -> Report:
    """Compares the components of a model, and a sampled trajectory if `sampled` says which.

    model: as for `jaxsd.load`, or the folder of one component, such as a ControlNet. single_file:
    what a single file does not tell, as for `load_parts`: family, config, tokenizer.
    reference_model: what PyTorch reads, if not the same folder: for a model that was converted,
    exported or changed. dtypes: "float32", "bfloat16". height, width: of the pictures; by default
    the model's. layers: every single layer, not only blocks. torch_device: where PyTorch computes,
    "cpu" or "cuda". progress(stage) is called before each stage. JaxsdError for what cannot be
    compared.
    """
    if not dtypes or set(dtypes) - set(DTYPES):
        raise JaxsdError(f"dtypes are {' and '.join(DTYPES)}, not {', '.join(dtypes) or 'none'}")
    reference.require()
    with contextlib.ExitStack() as stack:
        ours = theirs = stack.enter_context(opened(model, variant, **single_file))
        if reference_model is not None:
            theirs = stack.enter_context(opened(reference_model, variant, **single_file))
        kinds = list(ours.parts) if components is None else list(components)
        for side in (ours, theirs):
            if missing := set(kinds) - set(side.parts):
                has, lacks = ", ".join(side.parts), ", ".join(sorted(missing))
                raise JaxsdError(f"{side.file or side.folder} has {has}, not {lacks}")
        plan = Plan(
            model=ours,
            reference=theirs,
            variant=variant,
            dtypes=tuple(dtypes),
            height=height,
            width=width,
            layers=layers,
            torch_device=torch_device,
            tolerance=tolerance or Tolerance(),
            progress=progress or (lambda stage: None),
        )
        # On accelerators, too, float32 means float32.
        stack.enter_context(jax.default_matmul_precision("highest"))
        sections, notes = [compare_component(plan, kind) for kind in kinds], []
        if sampled is not None:
            if reason := trajectory.why_not(plan):
                notes.append(f"trajectory: not compared, {reason}")
            else:
                sections.append(trajectory.compare(plan, sampled))
    name = str(model if reference_model is None else reference_model)
    return Report(str(model), name, plan.tolerance, sections, notes)


def compare_component(plan: Plan, kind: str) -> Section:
    """One component in each dtype; in bfloat16, PyTorch in float32 is the measure of both."""
    config = plan.config(kind)
    net, how = make_net(config), inputs.FED[type(config)]
    given = how.inputs(config, plan.size)
    shapes = outline(net, how.ours, given, plan.layers)

    theirs = {}
    for dtype in dict.fromkeys(("float32", *plan.dtypes)):
        plan.progress(f"{kind}: PyTorch {dtype}")
        module = reference.load(plan.reference, kind, dtype, plan.torch_device, plan.variant)
        theirs[dtype] = reference.record(module, how.theirs, given, shapes)
        del module
        reference.free()

    rows = {}
    for dtype in plan.dtypes:
        plan.progress(f"{kind}: jaxsd {dtype}")
        folder = plan.model.parts[kind].folder
        ours = load_component(folder, getattr(jnp, dtype), plan.variant, kind)
        program = Comparison(net, how.ours, plan.layers)
        rows[dtype] = list(_rows(program, ours, given, theirs["float32"], theirs[dtype], dtype))
        del ours
        reference.free()
    fed = ", ".join(f"{key} {list(value.shape)}" for key, value in given.items())
    unmatched = [block for block in shapes if block not in theirs["float32"]]
    return Section(kind, f"{net.size:,} parameters; {fed}", rows, unmatched)


def _rows(
    program: Comparison,
    ours: Component,
    given: inputs.Inputs,
    exact: dict[str, np.ndarray],
    same: dict[str, np.ndarray],
    dtype: str,
) -> Iterator[Row]:
    """The errors of each block against PyTorch in float32 (`exact`) and in the same dtype."""
    wanted = getattr(jnp, dtype)
    given = {k: v.astype(wanted) if v.dtype == np.float32 else v for k, v in given.items()}
    references = {block: [same[block], exact[block]] for block in exact}
    alone = {}
    if dtype == "float32":
        references = {block: [values] for block, values in exact.items()}
        alone = program.errors(ours.params, given, references, forced=True)
    running = program.errors(ours.params, given, references)
    for block, errors in running.items():
        by_itself = alone[block][0] if alone else None
        yield make_row(block, dtype, errors, same[block], exact[block], by_itself)
