"""The training loop: one for every objective.

A step is a pure function of (state, aux, batch, seed): its key is fold_in(key(seed), step), its
batch is batch number `step` of the data. Nothing else is random, so a training that was killed and
started again ends with the same bits as one that was left alone.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsd import sharding
from jaxsd.checkpoints import Checkpoints
from jaxsd.errors import JaxsdError
from jaxsd.nn import Params
from jaxsd.objectives import Objective
from jaxsd.weights import read_json, write_json
from jaxsd.weights.files import replacing


class TrainState(NamedTuple):
    """What a checkpoint holds: everything that a step changes."""

    step: jax.Array  # int32: updates made so far
    params: Params
    ema: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Options:
    """How to train. `steps` is the length of the whole training, of which decay is a function."""

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay: str = "cosine"  # "cosine" or "linear" to 0, or "constant"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    save_every: int = 500
    log_every: int = 50
    sample_every: int = 1000

    def __post_init__(self):
        at_least_one = ("steps", "batch_size", "save_every", "log_every", "sample_every")
        if bad := [name for name in at_least_one if getattr(self, name) < 1]:
            raise JaxsdError(f"{bad[0]} must be at least 1, not {getattr(self, bad[0])}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise JaxsdError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise JaxsdError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise JaxsdError(f"seed must be from 0 to 4294967295, not {self.seed}")
        if self.decay not in ("cosine", "linear", "constant"):
            raise JaxsdError(f"decay is cosine, linear or constant, not {self.decay!r}")
        if not 0 <= self.ema_decay < 1:
            raise JaxsdError(f"ema_decay must be in [0, 1), not {self.ema_decay}")


# Options that decide what is told and kept on the way, not what comes out: free on resuming.
REPORTING = {"save_every", "log_every", "sample_every"}


def learning_rate_schedule(options: Options) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then decay to 0 at the last step (or none)."""
    warmup = min(options.warmup_steps, options.steps)
    rest = max(options.steps - warmup, 1)
    rate = options.learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "constant": optax.constant_schedule(rate),
    }[options.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, rate, max(warmup, 1)), after], [warmup])


def make_optimizer(options: Options) -> optax.GradientTransformation:
    """AdamW behind a gradient clip by global norm; only matrices and kernels decay."""
    return optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(options),
            b2=0.99,
            weight_decay=options.weight_decay,
            mask=_matrices,
        ),
    )


def _matrices(params: Any) -> Any:
    return {name: value.ndim > 1 for name, value in params.items()}


def init_state(objective: Objective, optimizer: optax.GradientTransformation, seed: int):
    """The state before the first step."""
    initial = objective.init(jax.random.fold_in(jax.random.key(seed), 0x696E6974))
    # Copies: params and ema are donated, so they may share memory neither with each other nor with
    # what `init` was given. With a dtype, lest a weakly typed value make step 2 compile anew.
    params, ema = (
        {name: jnp.array(value, value.dtype, copy=True) for name, value in initial.items()}
        for _ in range(2)
    )
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, options: Options
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The function (state, aux, batch) -> (state, metrics) of one update, not yet jitted."""
    rate = learning_rate_schedule(options)

    def step(state: TrainState, aux: Any, batch: Any):
        key = jax.random.fold_in(jax.random.key(options.seed), state.step)
        (loss, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(
            state.params, aux, batch, key
        )
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and integer counts
            learning_rate = jnp.asarray(rate(state.step), jnp.float32)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        # Early on the average would be mostly the initial values: let it grow to its full length.
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(options.ema_decay, (1 + count) / (10 + count))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        metrics = {
            "loss": loss,
            **metrics,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate,
        }
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step


def train(
    objective: Objective,
    make_batches: Callable[[int, int], Iterator[Any]],
    options: Options,
    workdir: str | Path,
    config: dict[str, Any],
) -> TrainState:
    """Trains to `options.steps`, from the newest checkpoint in `workdir` if there is one.

    make_batches(start, stop) yields batches number start ... stop - 1. `config` is what decides
    the result; it is written to `workdir/config.json`, and a workdir with another one is refused.
    Leaves metrics.jsonl, tensorboard/, samples/, checkpoints/ and, at the end, model/: a diffusers
    folder made of the averaged (EMA) parameters.
    """
    from tensorboardX import SummaryWriter
    from tqdm import tqdm

    workdir = Path(workdir)
    _claim(workdir, config)
    mesh = sharding.data_mesh()
    if options.batch_size % mesh.size:
        raise JaxsdError(f"batch_size {options.batch_size} must divide by {mesh.size} devices")

    optimizer = make_optimizer(options)
    state = sharding.replicate(init_state(objective, optimizer, options.seed), mesh)
    aux = sharding.replicate(objective.aux, mesh)
    with contextlib.ExitStack() as stack:  # also when interrupted: what is being saved, is saved
        checkpoints = Checkpoints(workdir / "checkpoints")
        stack.callback(checkpoints.close)
        if checkpoints.latest is not None:
            state = checkpoints.restore(state)
        start = int(state.step)
        with _writing(workdir):
            log = stack.enter_context(_open_log(workdir / "metrics.jsonl", start))
            writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
            stack.callback(writer.close)

        step = jax.jit(make_step(objective, optimizer, options), donate_argnums=0)
        bar = tqdm(total=options.steps, initial=start, unit="step", mininterval=1.0)
        progress = stack.enter_context(bar)
        clock, logged = time.perf_counter(), start
        for i, batch in enumerate(make_batches(start, options.steps), start + 1):
            state, metrics = step(state, aux, sharding.split(batch, mesh))
            progress.update()
            if i % options.log_every == 0 or i == options.steps:
                row = {name: float(value) for name, value in metrics.items()}
                seconds = time.perf_counter() - clock
                row["images_per_second"] = (i - logged) * options.batch_size / seconds
                clock, logged = time.perf_counter(), i
                log.write(json.dumps({"step": i, **row}) + "\n")
                log.flush()
                for name, value in row.items():
                    writer.add_scalar(name, value, i)
                progress.set_postfix(
                    loss=f"{row['loss']:.4f}", img_s=f"{row['images_per_second']:.0f}"
                )
            if i % options.save_every == 0 or i == options.steps:
                checkpoints.save(i, state)
            if i % options.sample_every == 0 or i == options.steps:
                _save_preview(objective.preview(state.ema), workdir / "samples", i, writer)
    objective.export(jax.tree.map(jnp.asarray, state.ema), workdir / "model")
    return state


def _save_preview(picture: np.ndarray | None, folder: Path, step: int, writer: Any) -> None:
    if picture is None:
        return
    from PIL import Image

    folder.mkdir(exist_ok=True)
    Image.fromarray(picture).save(folder / f"step_{step:07}.png")
    writer.add_image("samples", picture, step, dataformats="HWC")


def _claim(workdir: Path, config: dict[str, Any]) -> None:
    """Writes config.json, or checks that the one there says the same."""
    file = workdir / "config.json"
    config = json.loads(json.dumps(config))
    if not file.exists():
        write_json(file, config)
        return
    old = read_json(file)
    names = sorted({*old, *config} - REPORTING)
    if changed := [name for name in names if old.get(name) != config.get(name)]:
        said = "; ".join(f"{n} {old.get(n)!r}, now {config.get(n)!r}" for n in changed)
        raise JaxsdError(
            f"{workdir} holds a training with other options ({said}): resume it with "
            "the same ones, or take another --workdir"
        )


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place, reason = error.filename or workdir, error.strerror or error
        raise JaxsdError(f"cannot write {place}: {reason}") from None


def _open_log(file: Path, last: int) -> IO[str]:
    """Opens the log to be continued after step `last`: what follows is about to come again."""
    if file.exists():
        rows = file.read_text(encoding="utf-8").splitlines()
        kept = [row for row in rows if _step_of(row) <= last]
        with replacing(file) as temporary:
            temporary.write_text("".join(row + "\n" for row in kept), encoding="utf-8")
    return open(file, "a", encoding="utf-8")


def _step_of(row: str) -> int | float:
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):  # cut off by a kill
        return float("inf")
