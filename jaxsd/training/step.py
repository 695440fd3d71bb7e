"""One update: a pure function of the state, the batch and the seed."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxsd import kernels
from jaxsd.kernels import cpu, gpu, tpu
from jaxsd.nn import Params, rematerialise
from jaxsd.objectives import Now, Objective
from jaxsd.training.names import rate_factors, split_params
from jaxsd.training.optimizers import learning_rate_schedule, make_optimizer
from jaxsd.training.options import Options


class TrainState(NamedTuple):
    """What a checkpoint holds: everything that a step changes. Parameters are the trained ones."""

    step: jax.Array  # int32: updates so far, with those that were skipped
    params: Params
    ema: Params
    opt_state: Any
    skipped: jax.Array  # int32: updates that were not made, for the loss or gradient was not finite
    skipped_in_a_row: jax.Array  # int32: of these, the last ones without any other in between


class Aux(NamedTuple):
    """What a step reads and leaves as it is."""

    objective: Any  # the objective's own
    frozen: Params

    def whole(self, trained: Params) -> Params:
        """All parameters of the objective, as its `loss`, `preview` and `export` expect them."""
        return {**self.frozen, **trained}


def state_of(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step of a training of these parameters; a pure function.

    Copies: params and ema are donated, so they may share memory neither with each other nor with
    what was given.
    """
    # With a dtype, lest a weakly typed value make step 2 compile anew
    params, ema = (
        {name: jnp.array(value, jnp.float32, copy=True) for name, value in params.items()}
        for _ in range(2)
    )
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, ema, optimizer.init(params), skipped, in_a_row)


def initial_params(objective: Objective, options: Options) -> tuple[Params, Params]:
    """What training starts from: (trained, frozen)."""
    key = jax.random.fold_in(jax.random.key(options.seed), 0x696E6974)
    return split_params(objective.init(key), options)


def init_state(
    objective: Objective, optimizer: optax.GradientTransformation, options: Options
) -> tuple[TrainState, Aux]:
    """The state before the first step, and what all steps read."""
    trained, frozen = initial_params(objective, options)
    return state_of(trained, optimizer), Aux(objective.aux, frozen)


def state_bytes(objective: Objective, options: Options) -> dict[str, int]:
    """Bytes of what a step holds throughout, by what it is; activations come on top.

    "copies" are those of parameters in the dtype that is computed in.
    """

    def held() -> dict[str, Any]:
        state, aux = init_state(objective, make_optimizer(options), options)
        whole = aux.whole(state.params)
        copies = _computed_in(whole, options.dtype)
        return {
            "parameters": state.params,
            "average": state.ema,
            "optimizer": state.opt_state,
            "gradients": state.params,
            "frozen": aux,
            "copies": {n: copy for n, copy in copies.items() if copy.dtype != whole[n].dtype},
        }

    return {
        kind: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for kind, tree in jax.eval_shape(held).items()
    }


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, options: Options
) -> Callable[[TrainState, Aux, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The function (state, aux, batch) -> (state, metrics) of one update, not yet jitted."""
    rate = learning_rate_schedule(options)
    constrain = getattr(objective, "constrain", None)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, aux: Aux, batch: Any):
        # Cast once, before the loss: where they are sharded, the copies are what is gathered
        params, ema = (
            _computed_in(aux.whole(trained), options.dtype) for trained in (state.params, state.ema)
        )
        frozen = {name: params[name] for name in aux.frozen}
        trained = {name: params[name] for name in state.params}

        def loss_of(trained: Params, batch: Any, key: jax.Array):
            with rematerialise(options.remat):
                now = Now(key, state.step, ema)
                return objective.loss({**frozen, **trained}, aux.objective, batch, now)

        key = jax.random.fold_in(jax.random.key(options.seed), state.step)
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, metrics), grads = _accumulate(gradient, trained, batch, key, options.accumulate)
        if kernels.platform() == "gpu":
            grads = jax.tree.map(gpu.in_order, grads)
        grad_norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):
            learning_rate = jnp.asarray(rate(state.step), jnp.float32)
        factors, decay = rate_factors(options, state.params), _ema_decay(options, state.step)

        def updated(held: tuple[Params, Params, Any], grads: Params):
            params, ema, opt_state = held
            with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and integer counts
                updates, opt_state = optimizer.update(grads, opt_state, params, norm=grad_norm)
            updates = cast(Params, updates)
            params = {
                name: value + learning_rate * factors[name] * updates[name]
                for name, value in params.items()
            }
            if constrain is not None:
                params = constrain(params)
            ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
            return params, ema, opt_state

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        held = state.params, state.ema, state.opt_state
        params, ema, opt_state = _updated_if(finite, updated, held, grads)
        missed = 1 - finite.astype(jnp.int32)
        skipped, in_a_row = state.skipped + missed, (state.skipped_in_a_row + missed) * missed
        metrics = {
            "loss": loss,
            **metrics,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "finite": finite.astype(jnp.float32),
            "skipped": skipped,
            "skipped_in_a_row": in_a_row,
        }
        return TrainState(state.step + 1, params, ema, opt_state, skipped, in_a_row), metrics

    return step


def _updated_if(
    finite: jax.Array, updated: Callable[[Any, Any], Any], held: Any, grads: Params
) -> Any:
    """updated(held, grads) where finite, else held; in the memory of what was held."""
    if kernels.platform() == "gpu":  # where XLA copies what leaves a branch, and fuses the choice
        new = updated(held, grads)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, held)
    # On CPU a choice between old and new made copies of both
    return jax.lax.cond(finite, updated, lambda held, _: held, held, grads)


def compiler_options(options: Options, platform: str) -> dict[str, str]:
    """What `jax.jit` must be told of a step on devices of this platform, as jax names it.

    XLA's CPU backend removes the barriers between what is computed again and what was computed
    first, and then finds that both are the same: its memory would stay as without `remat`. TPUs are
    told of weights that are split (`kernels/tpu.py`).
    """
    if platform == "tpu" and options.fsdp * options.tensor > 1:
        return tpu.GATHERED
    if platform == "cpu":
        barriers = {"xla_disable_hlo_passes": "cse_barrier_expander"}
        return cpu.all_cores() | (barriers if options.remat != "none" else {})
    return {}


def _computed_in(params: Params, dtype: str) -> Params:
    """Matrices and kernels in this dtype. Vectors stay: norms compute in float32 anyway."""
    return {
        name: value.astype(jnp.dtype(dtype)) if value.ndim > 1 else value
        for name, value in params.items()
    }


def _accumulate(gradient: Callable, params: Params, batch: Any, key: jax.Array, count: int):
    """The mean of `gradient` over `count` parts of the batch, in float32."""
    if count == 1:
        values, grads = gradient(params, batch, key)
        return values, jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    # Part i takes rows i, i + count ...: of every device's share the same number
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Params, part: tuple[jax.Array, Any]):
        values, grads = gradient(params, part[1], jax.random.fold_in(key, part[0]))
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32) / count, total, grads), values

    nothing = {name: jnp.zeros(value.shape, jnp.float32) for name, value in params.items()}
    grads, values = jax.lax.scan(add, nothing, (jnp.arange(count), parts))
    return jax.tree.map(lambda x: x.mean(0), values), grads


def _ema_decay(options: Options, step: jax.Array) -> jax.Array:
    """Early on the average would be mostly the initial values: it grows to its full length."""
    n = step.astype(jnp.float32)
    grown = 1 - (1 + n) ** -options.ema_power if options.ema_power else (1 + n) / (10 + n)
    return jnp.minimum(options.ema_decay, grown)
