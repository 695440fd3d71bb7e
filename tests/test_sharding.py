"""A step on four devices is the step on one, and is what `jax.pmap` would do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxsd import sharding, training
from jaxsd.objectives.ddpm import DDPM

STEPS = 3
OPTIONS = training.Options(
    STEPS, batch_size=8, learning_rate=1e-3, warmup_steps=1, decay="constant"
)
TOLERANCE = 1e-5


class FixedNoise(DDPM):
    """DDPM with noise and times from the batch, so that a device's share needs no key."""

    def loss(self, params, aux, batch, key):
        alpha, sigma = (a[:, None, None, None] for a in self.schedule.alpha_sigma(batch["t"]))
        z = alpha * batch["image"] + sigma * batch["eps"]
        classes = jax.nn.one_hot(batch["label"], tiny.CLASSES)
        prediction = self.net(params, z, batch["t"], class_labels=classes)
        return jnp.square(prediction - batch["eps"]).mean(), {}


def batches(fixed: bool):
    for i in range(STEPS):
        rng = np.random.default_rng(i)
        batch = {"image": tiny.pictures(8, 1), "label": rng.integers(0, tiny.CLASSES, 8)}
        if fixed:
            batch["eps"] = rng.standard_normal(batch["image"].shape, np.float32)
            batch["t"] = rng.uniform(1, 999, 8).astype(np.float32)
        yield batch


def make(objective_class):
    ddpm = tiny.ddpm()
    return objective_class(ddpm.unet, ddpm.schedule, initial=tiny.parameters(ddpm.net))


def on_mesh(objective, devices, fixed):
    """Losses and state after STEPS updates on a mesh of so many devices."""
    mesh = sharding.data_mesh(devices)
    optimizer = training.make_optimizer(OPTIONS)
    state = sharding.replicate(training.init_state(objective, optimizer, 0), mesh)
    step = jax.jit(training.make_step(objective, optimizer, OPTIONS), donate_argnums=0)
    losses = []
    for batch in batches(fixed):
        state, metrics = step(state, objective.aux, sharding.split(batch, mesh))
        losses.append(metrics["loss"])
    return np.array([float(loss) for loss in losses]), state


def on_pmap(objective, devices):
    """The same with a program for each device, which averages its gradients with the others'."""
    inner = training.make_optimizer(OPTIONS)

    def average_first(grads, state, params):
        return inner.update(jax.lax.pmean(grads, "data"), state, params)

    optimizer = optax.GradientTransformation(inner.init, average_first)
    step = jax.pmap(training.make_step(objective, optimizer, OPTIONS), "data", in_axes=(0, None, 0))
    state = training.init_state(objective, inner, 0)
    state = jax.tree.map(lambda x: jnp.stack([x] * devices), state)
    losses = []
    for batch in batches(fixed=True):
        split = {n: x.reshape(devices, -1, *x.shape[1:]) for n, x in batch.items()}
        state, metrics = step(state, objective.aux, split)
        losses.append(metrics["loss"].mean())
    return np.array(losses), jax.tree.map(lambda x: x[0], state)


def assert_close(got, want):
    np.testing.assert_allclose(got[0], want[0], atol=TOLERANCE)
    for part in ("params", "ema"):
        a, b = getattr(got[1], part), getattr(want[1], part)
        for name in b:
            np.testing.assert_allclose(a[name], b[name], atol=TOLERANCE, err_msg=name)


@pytest.fixture(scope="module")
def fixed_on_four():
    return on_mesh(make(FixedNoise), 4, fixed=True)


def test_parameters_are_on_every_device_and_stay_there(fixed_on_four):
    mesh = sharding.data_mesh()
    assert mesh.shape == {"data": 4}
    before = sharding.replicate(training.init_state(make(DDPM), optax.sgd(0.1), 0), mesh)
    for state in (before, fixed_on_four[1]):
        for array in jax.tree.leaves(state):
            assert array.sharding.is_fully_replicated
            assert array.sharding.device_set == set(jax.devices())


def test_a_batch_is_split_among_the_devices():
    [first, *_] = batches(fixed=False)
    placed = sharding.split(first, sharding.data_mesh())
    for name, array in placed.items():
        assert {shard.device for shard in array.addressable_shards} == set(jax.devices())
        for shard in array.addressable_shards:
            assert shard.data.shape == (2, *first[name].shape[1:])
            np.testing.assert_array_equal(shard.data, first[name][shard.index])


def test_four_devices_do_what_one_does():
    """With the objective's own noise and dropout, which belong to the batch, not to a device."""
    one, four = (on_mesh(make(DDPM), devices, fixed=False) for devices in (1, 4))
    assert_close(four, one)
    moved = [
        np.abs(one[1].params[n] - v).max() for n, v in tiny.parameters(tiny.ddpm().net).items()
    ]
    assert min(moved) > 100 * TOLERANCE


def test_a_mesh_does_what_pmap_does(fixed_on_four):
    assert_close(fixed_on_four, on_pmap(make(FixedNoise), 4))
