"""A step does what its options say, to the parameters that they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import toy
from toy import OPTIONS, Regression

from jaxsd import kernels, training
from jaxsd.errors import JaxsdError
from jaxsd.objectives import Now
from jaxsd.objectives.denoising import Denoising
from jaxsd.training import Options

SHORT = dataclasses.replace(OPTIONS, steps=8)


def steps_of(objective, options, count):
    """The states before and after each of `count` updates, and the metrics of each."""
    optimizer = training.make_optimizer(options)
    state, aux = training.init_state(objective, optimizer, options)
    states = [state]
    step, metrics = jax.jit(training.make_step(objective, optimizer, options)), []
    for batch in toy.batches(0, count):
        state, values = step(states[-1], aux, batch)
        states.append(state)
        metrics.append(values)
    return states, metrics


def test_ema_is_a_running_mean_that_grows_to_its_decay():
    options = Options(12, learning_rate=0.1, decay="constant", warmup_steps=0, ema_decay=0.5)
    states, _ = steps_of(Regression(), options, 12)
    want = np.asarray(states[0].params["weight"], np.float64)
    for n, state in enumerate(states[1:]):
        decay = min(0.5, (1 + n) / (10 + n))
        want = decay * want + (1 - decay) * np.asarray(state.params["weight"], np.float64)
        np.testing.assert_allclose(state.ema["weight"], want, atol=1e-6)
    assert np.abs(want - states[-1].params["weight"]).max() > 1e-3


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_long_gradients_are_shortened_and_short_ones_left(limit):
    options = dataclasses.replace(SHORT, max_grad_norm=limit)
    states, metrics = steps_of(Regression(), options, 1)
    key = jax.random.fold_in(jax.random.key(options.seed), 0)
    [batch] = toy.batches(0, 1)
    grads = jax.grad(Regression().loss, has_aux=True)(states[0].params, (), batch, Now(key))[0]
    norm = np.sqrt(sum(np.square(np.float64(g)).sum() for g in grads.values()))
    assert 1e-3 < norm < 1e3
    np.testing.assert_allclose(metrics[0]["grad_norm"], norm, rtol=1e-5)
    # Adam's first moment starts as a tenth of what it is given
    moment = optax.tree_utils.tree_get(states[1].opt_state, "mu")
    for name, gradient in grads.items():
        want = gradient * min(1, limit / norm)
        # Against the norm: an entry is a sum of many terms, which may cancel
        np.testing.assert_allclose(moment[name] * 10, want, atol=1e-6 * min(norm, limit))


def test_weight_decay_spares_vectors_and_scalars():
    initial = {"weight": jnp.ones((2, 3)), "bias": jnp.ones(3), "scale": jnp.ones(())}

    class Flat(Regression):
        def loss(self, params, aux, batch, now):
            return sum(0.0 * value.sum() for value in params.values()), {}

    options = Options(10, learning_rate=0.1, warmup_steps=0, decay="constant", weight_decay=0.5)
    states, _ = steps_of(Flat(initial), options, 1)
    after = states[1].params
    np.testing.assert_allclose(after["weight"], 1 - 0.1 * 0.5, rtol=1e-6)
    assert np.all(after["bias"] == 1) and np.all(after["scale"] == 1)


def test_metrics_say_what_the_step_did():
    states, metrics = steps_of(Regression(), SHORT, 3)
    rate = training.learning_rate_schedule(SHORT)
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    rates = [m["learning_rate"] for m in metrics]
    np.testing.assert_allclose(rates, [rate(i) for i in range(3)], rtol=1e-6)
    loss = jax.jit(Regression().loss)
    for i, batch in enumerate(toy.batches(0, 3)):
        key = jax.random.fold_in(jax.random.key(SHORT.seed), i)
        value, more = loss(states[i].params, (), batch, Now(key))
        np.testing.assert_allclose(metrics[i]["loss"], value, rtol=1e-6)
        np.testing.assert_allclose(metrics[i]["size"], more["size"], rtol=1e-6)


def test_a_parameter_may_have_a_learning_rate_of_its_own():
    options = dataclasses.replace(SHORT, warmup_steps=0, rate_factors=("*=0.5", "bias=0"))
    (before, after), _ = steps_of(Regression(), options, 1)
    (_, plain), _ = steps_of(Regression(), dataclasses.replace(options, rate_factors=()), 1)
    want = before.params["weight"] + 0.5 * (plain.params["weight"] - before.params["weight"])
    np.testing.assert_allclose(after.params["weight"], want, atol=1e-7)
    np.testing.assert_array_equal(after.params["bias"], before.params["bias"])


# --- Frozen parameters -----------------------------------------------------------------------


class Layers(Regression):
    """Two layers, the second of which is linear; `seen` is told what a loss was given."""

    def init(self, key):
        return {
            "first.weight": jax.random.normal(key, (toy.SIZE, toy.SIZE)),
            "first.bias": jnp.zeros(toy.SIZE),
            "second.weight": jax.random.normal(jax.random.fold_in(key, 1), (toy.SIZE, toy.SIZE)),
            "second.bias": jnp.zeros(toy.SIZE),
        }

    def loss(self, params, aux, batch, now):
        assert params.keys() == now.ema.keys() == self.init(jax.random.key(0)).keys()
        x = batch["x"].astype(params["first.weight"].dtype)
        for layer in ("first", "second"):
            x = x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"].astype(x.dtype)[None]
        return jnp.square(x.astype(jnp.float32) - batch["y"]).mean(), {}


@pytest.mark.parametrize(
    "chosen, trained",
    [
        ({"train": ("second.*",)}, {"second.weight", "second.bias"}),
        ({"freeze": ("first.*",)}, {"second.weight", "second.bias"}),
        ({"train": ("*.weight",), "freeze": ("second.*",)}, {"first.weight"}),
        ({"train": ("first.?ias", "second.[bw]*")}, {"first.bias", "second.weight", "second.bias"}),
    ],
)
def test_frozen_parameters_have_no_state_and_stay(chosen, trained):
    options = dataclasses.replace(SHORT, weight_decay=0.1, **chosen)
    initial = Layers().init(jax.random.fold_in(jax.random.key(options.seed), 0x696E6974))
    state, aux = training.init_state(Layers(), training.make_optimizer(options), options)
    assert state.params.keys() == state.ema.keys() == trained
    assert aux.frozen.keys() == initial.keys() - trained
    assert aux.whole(state.params).keys() == initial.keys()
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    assert moments.keys() == trained

    (*_, after), _ = steps_of(Layers(), options, 2)
    for name in trained:
        assert np.abs(after.params[name] - initial[name]).max() > 1e-4
    for name, value in aux.frozen.items():
        np.testing.assert_array_equal(value, initial[name])


def test_what_is_trained_beside_frozen_parameters_moves_as_with_all():
    """By sgd, so that no average over all gradients comes in."""
    sgd = optax.sgd(1.0)
    for options in (SHORT, dataclasses.replace(SHORT, freeze=("first.*",))):
        state, aux = training.init_state(Layers(), sgd, options)
        [batch] = toy.batches(0, 1)
        state = state._replace(step=jnp.int32(5))  # warm
        after, _ = jax.jit(training.make_step(Layers(), sgd, options))(state, aux, batch)
        if not options.freeze:
            want = after.params
    for name, value in after.params.items():
        np.testing.assert_allclose(value, want[name], atol=1e-6)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"train": ("*attn2*",)}, ["train", "attn2"]),
        ({"freeze": ("frist.weight",)}, ["freeze", "'frist.weight'", "'first.weight'"]),
        ({"freeze": ("first",)}, ["freeze", "'first'", "first.bias"]),
        ({"train": ("first.*",), "freeze": ("*",)}, ["no parameter", "train"]),
        ({"decayed": ("third.*",)}, ["decayed", "third"]),
        ({"freeze": ("first.*",), "rate_factors": ("first.*=2",)}, ["rate_factors", "first"]),
        ({"rate_factors": ("first.bias",)}, ["PATTERN=FACTOR", "first.bias"]),
        ({"rate_factors": ("first.bias=fast",)}, ["PATTERN=FACTOR", "fast"]),
        ({"rate_factors": ("first.bias=-1",)}, ["PATTERN=FACTOR", "-1"]),
    ],
)
def test_patterns_that_fit_nothing_are_refused_before_the_first_step(wrong, said):
    options = dataclasses.replace(SHORT, **wrong)
    with pytest.raises(JaxsdError) as caught:
        training.init_state(Layers(), training.make_optimizer(options), options)
    assert all(word in str(caught.value) for word in said), caught.value
    assert "\n" not in str(caught.value)


def test_the_memory_of_a_step_follows_from_its_options():
    layer = 4 * toy.SIZE * (toy.SIZE + 1)  # bytes
    of = {}
    for name, changes in {
        "all": {},
        "frozen": {"freeze": ("first.*",)},
        "lion": {"optimizer": "lion"},
        "half": {"dtype": "bfloat16", "freeze": ("first.*",)},
    }.items():
        of[name] = training.state_bytes(Layers(), dataclasses.replace(SHORT, **changes))
    two, counter = {"parameters": 2 * layer, "average": 2 * layer, "gradients": 2 * layer}, 4
    assert of["all"] == two | {"optimizer": 4 * layer + counter, "frozen": 0, "copies": 0}
    one = {"parameters": layer, "average": layer, "gradients": layer, "frozen": layer}
    assert of["frozen"] == one | {"optimizer": 2 * layer + counter, "copies": 0}
    assert of["lion"]["optimizer"] == 2 * layer + counter
    assert of["half"] == of["frozen"] | {"copies": 2 * 2 * toy.SIZE**2}


# --- Parts of a batch ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_accumulated_parts_equal_the_whole_batch(count):
    """With a loss that draws nothing, each part's mean counting the same."""
    whole, parts = dataclasses.replace(SHORT, weight_decay=0.1), []
    for options in (whole, dataclasses.replace(whole, accumulate=count)):
        parts.append(steps_of(Layers(), options, 3))
    (states, metrics), (accumulated, others) = parts
    for one, other in zip(metrics, others, strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6)
    for name, value in states[-1].params.items():
        np.testing.assert_allclose(accumulated[-1].params[name], value, atol=1e-6)


def test_every_part_draws_for_itself():
    class Drawing(Regression):
        def loss(self, params, aux, batch, now):
            # the gradient is what was drawn for each part, and where its rows were
            drawn = jax.random.normal(now.key, ())
            return params["weight"][0, 0] * drawn + 0.0 * params["bias"].sum(), {
                "drawn": drawn,
                "row": batch["row"].mean(),
                "product": drawn * batch["row"].mean(),
            }

    options = dataclasses.replace(SHORT, accumulate=4)
    optimizer = training.make_optimizer(options)
    state, aux = training.init_state(Drawing(), optimizer, options)
    batch = {"row": jnp.arange(8, dtype=jnp.float32)}
    _, metrics = jax.jit(training.make_step(Drawing(), optimizer, options))(state, aux, batch)
    key = jax.random.fold_in(jax.random.key(options.seed), 0)
    drawn = np.array([jax.random.normal(jax.random.fold_in(key, i), ()) for i in range(4)])
    rows = np.arange(8).reshape(2, 4).mean(0)
    np.testing.assert_allclose(metrics["drawn"], drawn.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["row"], 3.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["product"], (drawn * rows).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], abs(drawn.mean()), rtol=1e-5)


# --- Not finite ------------------------------------------------------------------------------


class Breaking(Regression):
    """Breaks at steps where the batch says so: in the loss, or in its gradient alone."""

    def loss(self, params, aux, batch, now):
        loss, metrics = super().loss(params, aux, batch, now)
        weight = params["weight"][0, 0]
        # sqrt has an infinite slope at 0, where it is finite
        slope = jnp.sqrt(jnp.where(batch["slope"].any(), weight - weight, 1.0))
        return loss + slope + jnp.where(batch["loss"].any(), jnp.inf, 0.0), metrics


@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # for which it has two forms
def test_an_update_that_is_not_finite_is_skipped_and_counted(platform):
    options = dataclasses.replace(SHORT, warmup_steps=0)  # at a rate of 0 nothing would move
    optimizer = training.make_optimizer(options)
    state, aux = training.init_state(Breaking(), optimizer, options)

    @jax.jit
    def step(*given):
        with kernels.compiling_for(platform):
            return training.make_step(Breaking(), optimizer, options)(*given)

    broken = {1: "loss", 3: "slope", 4: "loss"}
    counts = []
    for i, batch in enumerate(toy.batches(0, 7)):
        batch |= {kind: np.full(8, broken.get(i) == kind) for kind in ("loss", "slope")}
        after, metrics = step(state, aux, batch)
        assert int(after.step) == i + 1
        same = [
            np.array_equal(a, b)
            for part in ("params", "ema", "opt_state")
            for a, b in zip(
                jax.tree.leaves(getattr(after, part)),
                jax.tree.leaves(getattr(state, part)),
                strict=True,
            )
        ]
        assert all(same) if i in broken else not any(same)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
        assert bool(metrics["finite"]) == (i not in broken)
        assert bool(np.isfinite(metrics["loss"])) == (broken.get(i) != "loss")
        assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (
            after.skipped,
            after.skipped_in_a_row,
        )
        counts.append((int(after.skipped), int(after.skipped_in_a_row)))
        state = after
    assert counts == [(0, 0), (1, 1), (1, 0), (2, 1), (3, 2), (3, 0), (3, 0)]


def test_an_update_copies_nothing_of_the_state():
    """On CPU, too: beside the gradient there is a weight transposed for the loss, and no more."""
    options, optimizer = SHORT, training.make_optimizer(SHORT)
    wide = Regression({"weight": jnp.ones((1024, toy.SIZE)), "bias": jnp.zeros(1024)})
    state, aux = training.init_state(wide, optimizer, options)
    step = jax.jit(training.make_step(wide, optimizer, options), donate_argnums=0)
    batch = {"x": np.ones((8, toy.SIZE), np.float32), "y": np.ones((8, 1024), np.float32)}
    made = step.lower(state, aux, batch).compile({"xla_backend_optimization_level": "3"})
    weight, activations = 4 * 1024 * toy.SIZE, 4 * 8 * 1024
    assert weight <= made.memory_analysis().temp_size_in_bytes < 2 * (weight + activations)


def test_the_learning_rate_follows_the_step_past_skipped_updates():
    optimizer = training.make_optimizer(SHORT)
    rate = training.learning_rate_schedule(SHORT)
    moves = {}
    for first in ("skipped", "made"):
        state, aux = training.init_state(Breaking(), optimizer, SHORT)
        step = jax.jit(training.make_step(Breaking(), optimizer, SHORT))
        for i, batch in enumerate(toy.batches(0, 2)):
            broken = np.full(8, i == 0 and first == "skipped")
            before, (state, metrics) = (
                state,
                step(state, aux, batch | {"loss": broken, "slope": np.zeros(8, bool)}),
            )
        assert metrics["learning_rate"] == pytest.approx(float(rate(1)))
        moves[first] = np.abs(state.params["weight"] - before.params["weight"]).max()
    # Adam's first update has a length of 1 in every direction
    np.testing.assert_allclose(moves["skipped"], rate(1), rtol=1e-3)


# --- bfloat16 --------------------------------------------------------------------------------


def test_bfloat16_is_for_matrices_and_for_computing_alone():
    seen = {}

    class Watched(Layers):
        def loss(self, params, aux, batch, now):
            seen.update({name: value.dtype for name, value in params.items()})
            seen.update({f"ema {name}": value.dtype for name, value in now.ema.items()})
            return super().loss(params, aux, batch, now)

    options = dataclasses.replace(SHORT, dtype="bfloat16", freeze=("first.weight",), accumulate=2)
    states, metrics = steps_of(Watched(), options, 4)
    for name in ("first.weight", "second.weight", "ema second.weight"):
        assert seen[name] == jnp.bfloat16
    assert seen["second.bias"] == jnp.float32
    for leaf in jax.tree.leaves((states[-1], metrics[-1])):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    _, exact = steps_of(Layers(), dataclasses.replace(options, dtype="float32"), 4)
    for one, other in zip(metrics, exact, strict=True):
        # Sums of 32 products, each rounded to 8 bits
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=0.02)
        np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=0.02)
    assert metrics[0]["loss"] != exact[0]["loss"]


def test_every_layer_of_a_latent_model_follows_the_dtype_of_its_inputs(tmp_path):
    """Traced only: promotion is strict here, so a float32 left over would raise."""
    words = tiny.tokenizer(tmp_path)
    objective = tiny.text_to_image(words, denoising=Denoising(dtype="bfloat16"))
    options = Options(8, batch_size=4, dtype="bfloat16", remat="selective")
    optimizer = training.make_optimizer(options)
    step, products = training.make_step(objective, optimizer, options), []

    def start():
        return training.init_state(objective, optimizer, options)

    batch = {"image": tiny.pictures(4), "input_ids": objective.towers.tokenize(tiny.CAPTIONS)}
    jaxpr = jax.make_jaxpr(step)(*jax.eval_shape(start), batch)
    text = str(jaxpr)
    for line in text.splitlines():
        if "conv_general_dilated" in line:
            products.append(line.split(":")[1].split("[")[0])
    # The UNet's, forward and backward; the VAE, which is frozen, is left in float32
    assert products.count("bf16") > 2 * products.count("f32") > 0
