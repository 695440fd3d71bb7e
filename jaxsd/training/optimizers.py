"""From gradients to updates: learning rates and optimizers."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxsd.training.names import decays
from jaxsd.training.options import Options


def learning_rate_schedule(options: Options) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then (unless constant) decay to the last step."""
    warmup = min(options.warmup_steps, options.steps)
    rest = max(options.steps - warmup, 1)
    rate, end = options.learning_rate, options.final_learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(rate, rest, alpha=end / rate),
        "linear": optax.linear_schedule(rate, end, rest),
        "constant": optax.constant_schedule(rate),
    }[options.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, rate, max(warmup, 1)), after], [warmup])


def make_optimizer(options: Options) -> optax.GradientTransformation:
    """Gradients to updates for a learning rate of 1, by which the step multiplies them.

    So the rate follows the number of the step, also past updates that were skipped. Gradients are
    clipped by their global norm first. Decay is decoupled from them (Loshchilov & Hutter 2019).
    """
    b1, b2, eps = options.beta1, options.beta2, options.epsilon
    kinds = {
        "adamw": lambda: optax.adam(1.0, b1, b2, eps),
        # Shazeer & Stern 2018, with an absolute learning rate and without momentum. Of a kernel
        # [out, in, kh, kw] the two largest axes are factored.
        "adafactor": lambda: optax.adafactor(1.0, multiply_by_parameter_scale=False),
        "lion": lambda: optax.lion(1.0, b1, b2, weight_decay=0.0),  # Chen et al. 2023
        "muon": lambda: _muon(options.momentum, optax.adam(1.0, b1, b2, eps)),
    }
    limit = options.max_grad_norm
    return optax.chain(
        _clipped(limit) if limit else optax.identity(),
        kinds[options.optimizer](),
        optax.add_decayed_weights(
            -options.weight_decay, lambda params: decays(options, cast(Any, params))
        ),
    )


def _clipped(limit: float) -> optax.GradientTransformationExtraArgs:
    """By their global norm, with one factor: optax divides each array, and XLA then keeps it."""

    def clip(updates: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any):
        """norm: where it is known already."""
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(updates) if norm is None else norm))
        return jax.tree.map(lambda x: x * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), clip)


def _muon(momentum: float, otherwise: optax.GradientTransformation) -> Any:
    """Muon (Jordan et al. 2024) for matrices and kernels, a row for each output.

    Vectors and tables of embeddings, which are no maps, are left to the other optimizer.
    """

    def axes(updates: Any) -> Any:  # of those that are Muon's; the others are masked
        return jax.tree.map(
            lambda x: contrib.MuonDimensionNumbers(tuple(range(1, x.ndim)), 0), updates
        )

    def kind(params: Any) -> dict[str, str]:
        return {
            name: "otherwise" if x.ndim < 2 or name.endswith("embedding.weight") else "muon"
            for name, x in params.items()
        }

    def scale(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda x: -x * max(1.0, x.shape[0] ** 2 / x.size) ** 0.5, updates)

    matrices = optax.chain(
        contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=axes), optax.stateless(scale)
    )
    return optax.partition({"muon": matrices, "otherwise": otherwise}, kind)
