"""The loop around the steps: from the newest checkpoint to the last step, told on the way."""

import contextlib
import functools
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from jaxsd import processes, sharding
from jaxsd.checkpoints import Checkpoints, Keep
from jaxsd.nn import Params
from jaxsd.objectives import Now, Objective
from jaxsd.training.environment import record
from jaxsd.training.evaluators import (
    Evaluator,
    Goal,
    Results,
    check_metrics,
    due,
    measure,
    parse_goal,
)
from jaxsd.training.faults import Signals, Watch
from jaxsd.training.logs import Tracker, open_log, write_report
from jaxsd.training.optimizers import make_optimizer
from jaxsd.training.options import Options
from jaxsd.training.placement import compile_step, make_mesh, place_state
from jaxsd.training.prefetch import Prefetch
from jaxsd.training.step import Aux, TrainState, make_step
from jaxsd.training.throughput import Meter, Profile, count_flops
from jaxsd.training.workdir import claim


def train(
    objective: Objective,
    make_batches: Callable[[int, int], Iterator[Any]],
    options: Options,
    workdir: str | Path,
    config: dict[str, Any],
    *,
    evaluators: Sequence[Evaluator] = (),
) -> TrainState:
    """Trains to `options.steps`, from the newest checkpoint in `workdir` if there is one.

    Or as far as it takes to reach `options.stop_when`. That is measured of the state alone, again
    where a training is resumed, so that one that was killed ends at the same step.

    make_batches(start, stop) yields batches number start ... stop - 1. `config` is what decides
    the result; it is written to `workdir/config.json`, and a workdir with another one is refused.
    Leaves metrics.jsonl, tensorboard/, samples/, checkpoints/, environment.json, report.html and,
    at the end, model/: a diffusers folder made of the averaged (EMA) parameters.

    SIGTERM and SIGINT end the step and save it; then SystemExit(0) or KeyboardInterrupt is raised.
    JaxsdError if the disk is full or `max_skipped` updates in a row were not finite; what was saved
    before stays.
    """
    from tqdm import tqdm

    workdir, mesh = Path(workdir), make_mesh(options)
    claim(workdir, config, options)
    evaluators = [_previews(objective, options), *evaluators]
    goal = parse_goal(options.stop_when)
    wanted = [name for name in (options.keep_best, goal and goal.metric) if name is not None]
    check_metrics(wanted, evaluators)
    keep = Keep(options.keep, options.keep_best, options.keep_highest, options.keep_every)
    optimizer = make_optimizer(options)
    with contextlib.ExitStack() as stack:  # also when interrupted: what is being saved, is saved
        signals = stack.enter_context(Signals())
        if options.report and processes.is_first():
            stack.callback(write_report, workdir)  # the last of all, whatever ends the training
        checkpoints = Checkpoints(workdir / "checkpoints", keep)
        stack.callback(checkpoints.close)
        state, aux = place_state(objective, optimizer, options, mesh, checkpoints.restore)
        step = compile_step(make_step(objective, optimizer, options), state, options)
        start = stop = int(state.step)
        if not _is_there(goal, evaluators, aux.whole(state.ema), start):
            stop = options.steps
        processes.first(functools.partial(record, workdir, start))
        told = (options.wandb_project, options.report)
        log = stack.enter_context(open_log(workdir, start, config, *told))
        profile = Profile(workdir / "profile", options.profile_start, options.profile_steps)
        stack.callback(profile.close)
        watch = Watch(options.max_skipped, signals)
        place = functools.partial(sharding.split, mesh=mesh)
        batches = Prefetch(make_batches(start, stop), place, watch.give_up)
        stack.callback(batches.close)
        meter = Meter(options.batch_size, lambda batch: _flops(objective, state, aux, batch))
        bar = stack.enter_context(
            tqdm(
                total=options.steps,
                initial=start,
                unit="step",
                mininterval=1.0,
                disable=not processes.is_first(),
            )
        )

        for i, batch in enumerate(batches, start + 1):
            state, metrics = step(state, aux, batch)
            last = i == options.steps
            watch.after(i, metrics["skipped_in_a_row"])
            meter.after(batch, metrics, batches.waited)
            profile.after(i - start, metrics)
            bar.update()

            row, measured = {}, {}
            if asked := due(evaluators, i, last):
                jax.block_until_ready(metrics)  # else steps under way would take no time
                with meter.aside():
                    params = aux.whole(state.ema)
                    measured = _evaluate(asked, params, i, wanted, log)
                    if not last and goal is not None and goal.reached(measured):
                        last = True
                        others = [each for each in evaluators if each not in asked]
                        measured |= _evaluate(others, params, i, wanted, log)
            if i % options.log_every == 0 or last:
                row = {name: float(value) for name, value in metrics.items()}
                row |= meter.row(batches.waited)
                bar.set_postfix(loss=f"{row['loss']:.4f}")
            if row or measured:
                # Before the checkpoint from which it is not redone
                with meter.aside():
                    processes.first(functools.partial(log.scalars, i, row | measured))
            if i % options.save_every == 0 or last or options.keep_best in measured:
                watch.settle()
                checkpoints.save(i, state, measured)
            checkpoints.check()
            if watch.told or (last and i < stop):
                break
        if watch.told:
            watch.settle()
            checkpoints.save(int(state.step), state)
    if watch.told:
        _end(signals, int(state.step), workdir)
    _export(objective, aux.whole(state.ema), workdir / "model")
    if options.report:
        processes.first(functools.partial(write_report, workdir))
    return state


def _previews(objective: Objective, options: Options) -> Evaluator:
    def preview(params: Params, step: int) -> Results:
        picture = objective.preview(params)
        return {} if picture is None else {"preview": picture}

    return Evaluator("samples", options.sample_every, preview)


def _evaluate(
    evaluators: Sequence[Evaluator],
    params: Params,
    step: int,
    wanted: Collection[str],
    log: Tracker,
) -> dict[str, float]:
    """Logs the pictures; the numbers, which all processes know, are for the log and the loop."""
    gathered = sharding.gather(params)

    def ask() -> dict[str, float]:
        here = jax.tree.map(jnp.asarray, gathered)
        numbers, pictures = measure(evaluators, here, step, wanted)
        for name, picture in pictures.items():
            log.image(step, name, picture)
        return numbers

    return processes.first(ask)


def _is_there(
    goal: Goal | None, evaluators: Sequence[Evaluator], params: Params, step: int
) -> bool:
    """Whether a training that is resumed after this step had come to its end there."""
    if goal is None or step == 0:
        return False
    asked = due([each for each in evaluators if goal.is_of(each)], step, last=False)
    return bool(asked) and goal.reached(_evaluate(asked, params, step, (), Tracker()))


def _export(objective: Objective, params: Params, folder: Path) -> None:
    """The first process writes, the others wait: whoever ends may take its devices along."""
    gathered = sharding.gather(params)

    def write() -> None:
        objective.export(jax.tree.map(jnp.asarray, gathered), folder)

    processes.first(write)


def _flops(objective: Objective, state: TrainState, aux: Aux, batch: Any) -> float:
    """FLOPs of loss and gradient: of the model, whatever is computed twice to save memory."""
    now = Now(jax.random.key(0), state.step, aux.whole(state.ema))

    def loss(trained: Params, aux: Aux, batch: Any, now: Now) -> Any:
        return objective.loss(aux.whole(trained), aux.objective, batch, now)

    return count_flops(jax.grad(loss, has_aux=True), state.params, aux, batch, now)


def _end(signals: Signals, step: int, workdir: Path) -> NoReturn:
    name = "another process's signal" if signals.received is None else signals.received.name
    print(
        f"stopped by {name} after step {step}, which {workdir} holds: the same command resumes it"
    )
    if signals.received == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(0)
