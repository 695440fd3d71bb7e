"""A step on any mesh is the step on one device, and is what `jax.pmap` would do."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import toy
from jax.sharding import PartitionSpec as P

from jaxsd import families, sharding, training
from jaxsd.errors import JaxsdError
from jaxsd.models import UNet
from jaxsd.nn import Net
from jaxsd.objectives.ddpm import DDPM
from jaxsd.sharding import Rule
from jaxsd.training.placement import compile_step, make_mesh, place_state

STEPS = 3
EVEN_SMALL_ONES = (".=fsdp", ".=fsdp,-", ".=fsdp,-,-,-")  # arrays, by the number of their axes
OPTIONS = training.Options(
    STEPS,
    batch_size=8,
    learning_rate=1e-3,
    warmup_steps=1,
    decay="constant",
    shard=EVEN_SMALL_ONES,
)
TOLERANCE = 1e-5
MESHES = [(8, 1), (2, 4), (1, 8)]


class FixedNoise(DDPM):
    """DDPM with noise and times from the batch, so that a device's share needs no key."""

    def loss(self, params, aux, batch, now):
        alpha, sigma = (a[:, None, None, None] for a in self.schedule.alpha_sigma(batch["t"]))
        z = alpha * batch["image"] + sigma * batch["eps"]
        classes = jax.nn.one_hot(batch["label"], tiny.CLASSES)
        prediction = self.net(params, z, batch["t"], class_labels=classes)
        return jnp.square(prediction - batch["eps"]).mean(), {}


def batches():
    for i in range(STEPS):
        rng = np.random.default_rng(i)
        image = tiny.pictures(8, 1)
        yield {
            "image": image,
            "label": rng.integers(0, tiny.CLASSES, 8),
            "eps": rng.standard_normal(image.shape, np.float32),
            "t": rng.uniform(1, 999, 8).astype(np.float32),
        }


def make(objective_class):
    ddpm = tiny.ddpm()
    return objective_class(ddpm.unet, ddpm.schedule, initial=tiny.parameters(ddpm.net))


def on_mesh(objective, mesh, batches, options=OPTIONS):
    """Losses, and the state after an update for each batch; the smallest arrays are split too."""
    optimizer = training.make_optimizer(options)
    state, aux = place_state(objective, optimizer, options, mesh)
    step = compile_step(training.make_step(objective, optimizer, options), state, options)
    losses = []
    for batch in batches:
        state, metrics = step(state, aux, sharding.split(batch, mesh))
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


def on_pmap(objective, devices):
    """The same with a program for each device, which averages its gradients with the others'."""
    inner = training.make_optimizer(OPTIONS)

    def average_first(grads, state, params):
        return inner.update(jax.lax.pmean(grads, "data"), state, params)

    optimizer = optax.GradientTransformation(inner.init, average_first)
    step = jax.pmap(training.make_step(objective, optimizer, OPTIONS), "data", in_axes=(0, None, 0))
    state, aux = training.init_state(objective, inner, OPTIONS)
    state = jax.tree.map(lambda x: jnp.stack([x] * devices), state)
    losses = []
    for batch in batches():
        split = {n: x.reshape(devices, -1, *x.shape[1:]) for n, x in batch.items()}
        state, metrics = step(state, aux, split)
        losses.append(metrics["loss"].mean())
    return np.array(losses), jax.tree.map(lambda x: x[0], state)


def assert_close(got, want):
    np.testing.assert_allclose(got[0], want[0], atol=TOLERANCE)
    for part in ("params", "ema"):
        a, b = getattr(got[1], part), getattr(want[1], part)
        for name in b:
            np.testing.assert_allclose(a[name], b[name], atol=TOLERANCE, err_msg=name)


def device_bytes(tree):
    """What each device holds of a tree: {device: bytes}."""
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held


# --- Meshes and rules ------------------------------------------------------------------------


def test_a_mesh_takes_all_devices_in_their_order():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()
    assert sharding.make_mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"fsdp": 3}, "fsdp 3 must divide 8 devices"),
        ({"fsdp": 0}, "fsdp 0 must divide"),
        ({"fsdp": 4, "tensor": 4}, "fsdp 4 x tensor 4 must divide 8"),
        ({"data": 4, "fsdp": 4}, "data 4 x fsdp 4 is not 8 devices"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, said):
    with pytest.raises(JaxsdError, match=said):
        sharding.make_mesh(**sizes)


LARGE = 1 << 14
NONE, OWN = (), (Rule("conv", (None, None, "fsdp", None)), Rule("norm", ()))


@pytest.mark.parametrize(
    "name, shape, rules, want",
    [
        ("any.weight", (LARGE, 12), NONE, P("fsdp")),
        ("any.weight", (8, LARGE), NONE, P(None, "fsdp")),
        ("the.first.of.equals", (256, 256), NONE, P("fsdp")),
        ("longest.that.divides", (LARGE + 1, 8), NONE, P(None, "fsdp")),
        ("none.divides", (LARGE + 1, 7), NONE, P()),
        ("too.small", (LARGE - 4,), NONE, P()),
        ("but.told.to.norm", (16,), (Rule("norm", ("fsdp",)),), P("fsdp")),
        ("count", (), NONE, P()),
        ("a.conv.weight", (512, 512, 4, 4), OWN, P(None, None, "fsdp")),
        ("a.conv.weight", (512, 512, 3, 3), OWN, P()),  # told to, but cannot
        ("a.conv.moment", (512, 512), OWN, P("fsdp")),  # a rule for other arrays
        ("norm.weight", (LARGE, LARGE), OWN, P()),
        ("attn1.to_q.weight", (320, 1280), sharding.RULES, P("tensor", "fsdp")),
        ("attn1.to_out.0.weight", (320, 1280), sharding.RULES, P("fsdp", "tensor")),
        ("ff.net.0.proj.bias", (LARGE,), sharding.RULES, P("tensor")),
        ("attn1.to_q.weight", (LARGE, 2, 4), sharding.RULES, P("fsdp")),
    ],
)
def test_rules_say_which_axis_is_split(name, shape, rules, want):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    assert sharding.spec(name, shape, mesh, rules) == want
    assert sharding.spec(name, shape, sharding.make_mesh(), rules) == P()


def test_rules_can_be_written():
    assert sharding.parse_rule("conv=-,fsdp") == Rule("conv", (None, "fsdp"))
    assert sharding.parse_rule("a=b|c=-") == Rule("a=b|c", ())
    for wrong in ("conv", "=fsdp", "conv=", "conv=rows", "conv=fsdp,fsdp", "conv(=fsdp"):
        with pytest.raises(JaxsdError, match="sharding rule"):
            sharding.parse_rule(wrong)


def test_stable_diffusion_is_split_evenly():
    """A device holds its share of SD 1.5 and at most 4 % more, on 2 devices as on 64."""
    shapes = Net(UNet(families.get_family("sd1").unet)).shapes
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    total = sum(math.prod(shape) for shape in shapes.values())
    for count in (2, 4, 8, 16, 64):
        mesh = jax.sharding.AbstractMesh((1, count, 1), sharding.AXES)
        specs = [(sharding.spec(n, p.shape, mesh), p.shape) for n, p in params.items()]
        held = sum(math.prod(s) / (count if spec != P() else 1) for spec, s in specs)
        assert held < 1.04 * total / count


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_what_optimizers_keep_is_split_as_the_parameters_are(name):
    shapes = {"linear.weight": (512, 256), "conv.weight": (128, 256, 3, 3), "bias": (24,)}
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    optimizer = training.make_optimizer(training.Options(1, optimizer=name))
    state = jax.eval_shape(optimizer.init, params)
    mesh = sharding.make_mesh(fsdp=8)
    placed = jax.tree.leaves(sharding.shardings(state, mesh, smallest=100))
    specs = {shape: sharding.spec(n, shape, mesh, smallest=100) for n, shape in shapes.items()}
    assert specs == {(512, 256): P("fsdp"), (128, 256, 3, 3): P(None, "fsdp"), (24,): P()}
    for array, where in zip(jax.tree.leaves(state), placed, strict=True):
        if array.shape in specs:
            assert where.spec == specs[array.shape]
        # Adafactor's moments are of rows and columns, and shorter than the parameters
        pieces = 8 if array.size >= 100 else 1
        assert math.prod(where.shard_shape(array.shape)) == array.size // pieces
    assert sum(array.size >= 100 for array in jax.tree.leaves(state)) >= 1


# --- Where things are ------------------------------------------------------------------------


def test_a_batch_is_split_among_the_devices():
    [first, *_] = batches()
    for sizes in [*MESHES, (2, 2, 2)]:
        mesh = sharding.make_mesh(*sizes)
        assert sharding.share(mesh) == (0, 1)
        for name, array in sharding.split(first, mesh).items():
            assert {shard.device for shard in array.addressable_shards} == set(jax.devices())
            rows = 8 // (mesh.shape["data"] * mesh.shape["fsdp"])
            for shard in array.addressable_shards:
                assert shard.data.shape == (rows, *first[name].shape[1:])
                np.testing.assert_array_equal(shard.data, first[name][shard.index])


def test_bytes_on_each_device_fall_with_fsdp():
    """Of the state as it is held and as the compiled step counts it."""
    objective, [batch] = toy.Regression(), toy.batches(0, 1)
    optimizer = training.make_optimizer(OPTIONS)
    for fsdp in (1, 2, 4, 8):
        mesh = sharding.make_mesh(fsdp=fsdp)
        state, aux = place_state(objective, optimizer, OPTIONS, mesh)
        arrays = 4 * 4 * (toy.SIZE**2 + toy.SIZE)  # float32 parameters, EMA and two moments
        scalars = 4 * sum(x.ndim == 0 for x in jax.tree.leaves(state))
        want = arrays // fsdp + scalars
        assert set(device_bytes(state).values()) == {want}
        rows = sharding.split(batch, mesh)
        step = compile_step(training.make_step(objective, optimizer, OPTIONS), state, OPTIONS)
        compiled = step.lower(state, aux, rows).compile()
        memory = compiled.memory_analysis()
        share = sum(x.nbytes for x in batch.values()) // 8
        assert memory.argument_size_in_bytes == want + share
        assert memory.alias_size_in_bytes == want  # donated: the new state is written over the old
        state, _ = compiled(state, aux, rows)
        assert set(device_bytes(state).values()) == {want}


def test_gathering_gives_whole_arrays():
    tree = {"weight": np.arange(64.0).reshape(8, 8), "bias": np.arange(3)}
    mesh = sharding.make_mesh(fsdp=8)
    placed = sharding.place(tree, sharding.shardings(tree, mesh, smallest=0))
    assert placed["weight"].addressable_shards[0].data.shape == (1, 8)
    back = sharding.gather(placed)
    for name, array in tree.items():
        assert isinstance(back[name], np.ndarray)
        np.testing.assert_array_equal(back[name], array)


# --- The same numbers ------------------------------------------------------------------------


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def on_one():
    """With the objective's own noise and dropout, which belong to the batch, not to a device."""
    return on_mesh(make(DDPM), one_device(), batches())


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_does_what_one_device_does(sizes, on_one):
    losses, state = on_mesh(make(DDPM), sharding.make_mesh(*sizes), batches())
    assert_close((losses, state), on_one)
    for array in jax.tree.leaves(state):
        assert array.sharding.device_set == set(jax.devices())
    whole = [x.sharding.is_fully_replicated for x in jax.tree.leaves(state)]
    assert all(whole) if sizes[1] == 1 else np.mean(whole) < 0.5
    moved = [
        np.abs(on_one[1].params[n] - v).max() for n, v in tiny.parameters(tiny.ddpm().net).items()
    ]
    assert min(moved) > 100 * TOLERANCE


def test_a_mesh_does_what_pmap_does():
    mesh = on_mesh(make(FixedNoise), sharding.make_mesh(), batches())
    assert_close(mesh, on_pmap(make(FixedNoise), 8))


class Perceptron(toy.Regression):
    """y = W2 relu(W1 x): the two layers that `tensor` splits, one by outputs, one by inputs."""

    def init(self, key):
        first, second = jax.random.normal(key, (2, toy.SIZE, toy.SIZE)) / 6
        return {"fc1.weight": first, "fc1.bias": first[0], "fc2.weight": second}

    def loss(self, params, aux, batch, now):
        x = batch["x"] + 0.1 * jax.random.normal(now.key, batch["x"].shape).astype(batch["x"].dtype)
        hidden = x @ params["fc1.weight"].astype(x.dtype).T + params["fc1.bias"][None]
        y = jax.nn.relu(hidden) @ params["fc2.weight"].astype(x.dtype).T
        return jnp.square(y - batch["y"]).mean(), {}


def test_layers_are_split_over_tensor_too():
    mesh, options = sharding.make_mesh(2, 2, 2), dataclasses.replace(OPTIONS, shard=())
    losses, state = on_mesh(Perceptron(), mesh, toy.batches(0, STEPS), options)
    assert_close((losses, state), on_mesh(Perceptron(), one_device(), toy.batches(0, STEPS)))
    specs = {name: array.sharding.spec for name, array in state.params.items()}
    assert specs["fc1.weight"] == P("tensor", "fsdp") and specs["fc1.bias"] == P("tensor")
    assert specs["fc2.weight"] == P("fsdp", "tensor")


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "muon"])
def test_parts_of_a_batch_and_every_optimizer_are_the_same_on_a_mesh(optimizer):
    options = dataclasses.replace(OPTIONS, optimizer=optimizer, accumulate=2, batch_size=16)
    batches = [jax.tree.map(lambda x: np.concatenate([x, -x]), b) for b in toy.batches(0, STEPS)]
    got = on_mesh(Perceptron(), sharding.make_mesh(fsdp=4), batches, options)
    assert not got[1].params["fc1.weight"].sharding.is_fully_replicated
    assert_close(got, on_mesh(Perceptron(), one_device(), batches, options))


def test_bfloat16_on_a_mesh_is_as_near_as_it_rounds():
    options = dataclasses.replace(OPTIONS, dtype="bfloat16")
    full = on_mesh(Perceptron(), one_device(), toy.batches(0, STEPS))
    half = on_mesh(Perceptron(), sharding.make_mesh(fsdp=4), toy.batches(0, STEPS), options)
    np.testing.assert_allclose(half[0], full[0], rtol=2**-8)
    assert np.abs(half[0] - full[0]).max() > 1e-6
    assert all(x.dtype == jnp.float32 for x in half[1].params.values())


def test_a_step_that_is_not_finite_is_skipped_on_a_mesh():
    batches = list(toy.batches(0, STEPS))
    batches[1]["x"][5, 3] = np.nan  # of one device alone
    losses, state = on_mesh(toy.Regression(), sharding.make_mesh(fsdp=4), batches)
    assert np.isnan(losses).tolist() == [False, True, False]
    assert int(state.skipped) == 1 and int(state.skipped_in_a_row) == 0
    assert_close((losses, state), on_mesh(toy.Regression(), one_device(), batches))


def test_a_training_goes_on_with_other_devices_and_another_mesh(tmp_path, monkeypatch):
    def run(workdir, stop, fsdp, count=8):
        options = dataclasses.replace(toy.OPTIONS, steps=12, fsdp=fsdp, shard=EVEN_SMALL_ONES)
        mesh = make_mesh(options, jax.devices()[:count])
        monkeypatch.setattr(training.loop, "make_mesh", lambda _: mesh)

        def batches(start, last):
            yield from toy.batches(start, min(last, stop))
            if stop < last:
                raise InterruptedError

        return training.train(toy.Regression(), batches, options, tmp_path / workdir, {})

    whole = run("whole", 12, fsdp=1)
    for stop, fsdp, count in [(4, 8, 8), (8, 2, 4)]:
        with pytest.raises(InterruptedError):
            run("moved", stop, fsdp, count)
    moved = run("moved", 12, fsdp=2)
    assert moved.params["weight"].addressable_shards[0].data.shape == (toy.SIZE // 2, toy.SIZE)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("moved", "whole")]
    losses = [[json.loads(row)["loss"] for row in log.splitlines()] for log in logs]
    assert len(losses[0]) == 6
    assert_close((losses[0], moved), (losses[1], whole))
