"""Options say what they want, and optimizers do what their papers say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd import training
from jaxsd.errors import JaxsdError
from jaxsd.training import Options


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"save_every": 0},
        {"log_every": -1},
        {"sample_every": 0},
        {"decay": "exponential"},
        {"optimizer": "sgd"},
        {"dtype": "float16"},
        {"remat": "some"},
        {"accumulate": 3},
        {"final_learning_rate": -0.1},
        {"beta1": 1.0},
        {"momentum": float("nan")},
        {"epsilon": 0.0},
        {"ema_power": -1.0},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"max_grad_norm": -1.0},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"seed": -1},
    ],
)
def test_options_that_cannot_be_are_refused_by_name(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(JaxsdError, match=f"^{name} .*{value}"):
        Options(**{"steps": 10} | wrong)


@pytest.mark.parametrize(
    "decay, middle, end", [("cosine", 0.25, 0), ("linear", 0.25, 0), ("constant", 0.5, 0.5)]
)
def test_the_learning_rate_warms_up_and_decays_to_the_last_step(decay, middle, end):
    options = Options(110, learning_rate=0.5, warmup_steps=10, decay=decay)
    rate = training.learning_rate_schedule(options)
    want = {0: 0, 5: 0.25, 10: 0.5, 60: middle, 110: end}
    np.testing.assert_allclose([rate(i) for i in want], list(want.values()), atol=1e-7)
    quarter = {"cosine": 0.5 * (1 + np.cos(np.pi / 4)) / 2, "linear": 0.375, "constant": 0.5}
    np.testing.assert_allclose(rate(35), quarter[decay], atol=1e-7)


def test_warm_up_may_be_absent_or_longer_than_the_training():
    none, long = (
        training.learning_rate_schedule(Options(10, learning_rate=1.0, warmup_steps=n))
        for n in (0, 40)
    )
    assert none(0) == 1 and none(10) == pytest.approx(0, abs=1e-7)
    np.testing.assert_allclose([long(i) for i in (0, 5, 10)], [0, 0.5, 1])


def test_the_learning_rate_may_end_above_zero():
    for decay, middle in (("cosine", 0.3), ("linear", 0.3)):
        options = Options(
            110, learning_rate=0.5, warmup_steps=10, decay=decay, final_learning_rate=0.1
        )
        rate = training.learning_rate_schedule(options)
        np.testing.assert_allclose([rate(i) for i in (10, 60, 110)], [0.5, middle, 0.1], rtol=1e-6)


# --- Optimizers ------------------------------------------------------------------------------

SHAPES = {
    "conv.weight": (6, 2, 3, 3),
    "linear.weight": (4, 6),
    "linear.bias": (4,),
    "position_embedding.weight": (5, 4),
}


def moved(options: Options, steps: int = 3) -> tuple[list[dict], list[dict], list[dict], object]:
    """Parameters before, and all gradients and updates of so many steps, and the last state."""
    rng = np.random.default_rng(0)
    optimizer = training.make_optimizer(options)
    params = {n: jnp.asarray(rng.normal(size=shape), jnp.float32) for n, shape in SHAPES.items()}
    state, every = optimizer.init(params), ([], [], [])
    for _ in range(steps):
        grads = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
        for kept, values in zip(every, (params, grads, updates), strict=True):
            kept.append({n: np.asarray(value, np.float64) for n, value in values.items()})
        params = {n: value + 0.1 * updates[n] for n, value in params.items()}
    return *every, state


PLAIN = Options(10, max_grad_norm=0.0)


def test_lion_takes_the_sign_of_an_average_and_decays():
    """Chen et al. 2023, algorithm 2."""
    options = dataclasses.replace(PLAIN, optimizer="lion", beta1=0.8, beta2=0.7, weight_decay=0.5)
    params, grads, updates, _ = moved(options)
    for name in SHAPES:
        average = np.zeros(SHAPES[name])
        for p, g, u in zip(params, grads, updates, strict=True):
            decay = 0.5 * p[name] * (len(SHAPES[name]) > 1)
            want = -np.sign(0.8 * average + 0.2 * g[name]) - decay
            np.testing.assert_allclose(u[name], want, atol=1e-6, err_msg=name)
            average = 0.7 * average + 0.3 * g[name]


def test_muon_orthogonalises_matrices_and_kernels_and_leaves_the_rest_to_adam():
    """Jordan et al. 2024, with Nesterov's momentum debiased as in Adam (Dozat 2016)."""
    options = dataclasses.replace(PLAIN, optimizer="muon", momentum=0.9)
    _, grads, updates, _ = moved(options)
    plain = moved(dataclasses.replace(options, optimizer="adamw"), 1)[2][0]
    for name in ("linear.bias", "position_embedding.weight"):
        np.testing.assert_allclose(updates[0][name], plain[name], atol=1e-6)
    for name in ("conv.weight", "linear.weight"):
        outputs, *inputs = SHAPES[name]
        average = np.zeros((outputs, np.prod(inputs)))
        for t, (g, u) in enumerate(zip(grads, updates, strict=True), 1):
            gradient = g[name].reshape(average.shape)
            average = 0.9 * average + 0.1 * gradient
            ahead = 0.9 * average / (1 - 0.9 ** (t + 1)) + 0.1 * gradient / (1 - 0.9**t)
            x = ahead / np.linalg.norm(ahead)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            want = -x * np.sqrt(max(1, outputs / np.prod(inputs)))
            # Five iterations in float32 multiply their rounding by 3.4445^5 = 485 at most
            np.testing.assert_allclose(u[name].reshape(want.shape), want, atol=3e-5, err_msg=name)
            assert np.linalg.svd(x)[1].min() > 0.5


@pytest.mark.parametrize(
    "optimizer, copies", [("adamw", 2), ("lion", 1), ("muon", 1), ("adafactor", 0)]
)
def test_optimizers_hold_what_their_help_says(optimizer, copies):
    options = dataclasses.replace(PLAIN, optimizer=optimizer)
    params = {"weight": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
    state = jax.eval_shape(training.make_optimizer(options).init, params)
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert copies <= size / (512 * 256) < copies + 0.01


def test_the_parameters_that_decay_may_be_chosen():
    options = dataclasses.replace(
        PLAIN, weight_decay=0.5, decayed=("linear.*", "position*"), optimizer="adamw"
    )
    params, _, with_decay, _ = moved(options, 1)
    without = moved(dataclasses.replace(options, weight_decay=0.0), 1)[2]
    for name in SHAPES:
        share = 0.0 if name == "conv.weight" else 0.5
        want = without[0][name] - share * params[0][name]
        np.testing.assert_allclose(with_decay[0][name], want, atol=1e-6)
