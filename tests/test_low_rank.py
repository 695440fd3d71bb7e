"""Low-rank training: of any objective, from the base to the bit, and what it leaves behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from toy import SIZE, Regression, assert_same_state, batches, logged, run, stopping_after

import jaxsd
from jaxsd import sharding, training
from jaxsd.cli.recipes.text_to_image import TextToImage
from jaxsd.cli.train import run as run_recipe
from jaxsd.errors import JaxsdError
from jaxsd.families import FAMILIES
from jaxsd.models import UNet
from jaxsd.nn import Net
from jaxsd.objectives import Now, Objective
from jaxsd.objectives.low_rank import GROUPS, LowRank, factor_names, targeted
from jaxsd.training import Options, placement
from jaxsd.weights import DIFFUSERS_FILE, lora, lora_files
from jaxsd.weights.lora import LoRA

KEY = jax.random.key(3)
CLOSE = 1e-5  # of the longest number: float32, summed in another order
CONV = "down_blocks.0.resnets.0.conv1.weight"
EVERYTHING = ("*.weight",)


def pixels(**options) -> LowRank:
    """Of a UNet without attention: convolutions and linear layers."""
    inner = tiny.ddpm()
    return LowRank(
        inner, tiny.parameters(inner.net), **{"targets": EVERYTHING, **FACTORS, **options}
    )


FACTORS = {"rank": 2, "alpha": 3.0}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def latents(words) -> LowRank:
    """Of a latent model and its text encoder."""
    inner = tiny.text_to_image(words, train_text=True)
    inner = dataclasses.replace(inner, initial=tiny.parameters(inner.net))
    targets = ("attention", "text-encoders", "convs")
    return LowRank(inner, inner.init(KEY), targets=targets, **FACTORS)


def moved(objective: LowRank, scale: float = 0.1) -> dict[str, jax.Array]:
    """Factors after some training: neither is zero."""
    rng = np.random.default_rng(1)
    shapes = {name: value.shape for name, value in objective.init(KEY).items()}
    return {n: jnp.asarray(rng.normal(0, scale, s), jnp.float32) for n, s in shapes.items()}


def difference(got, want) -> float:
    """The greatest, relative to the longest number."""
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


# --- What is trained -------------------------------------------------------------------------


def assert_starts_as(objective: LowRank, batch):
    base, params = objective.base, objective.init(KEY)
    assert isinstance(objective, Objective)
    for name, value in objective.whole(params).items():
        np.testing.assert_array_equal(value, base[name], name)
    now = Now(KEY, 0, params)
    inner = jax.jit(objective.inner.loss)(base, objective.inner.aux, batch, now._replace(ema=base))
    assert_same_state(jax.jit(objective.loss)(params, objective.aux, batch, now), inner)


@pytest.mark.slow
def test_it_starts_as_the_base_to_the_bit(latents, words):
    ids = jnp.asarray(latents.inner.towers.tokenize(tiny.CAPTIONS))
    assert_starts_as(latents, {"image": jnp.asarray(tiny.pictures(4)), "input_ids": ids})


def test_an_autoencoder(tmp_path):
    """Of which LoRA files know no component but by name."""
    inner = tiny.vae()
    base = tiny.parameters(inner.net)
    objective = LowRank(inner, base, targets=("convs",), component="vae", **FACTORS)
    assert_starts_as(objective, {"image": jnp.asarray(tiny.pictures(4))})
    params = moved(objective)
    objective.export(params, tmp_path)
    read = lora_files.read(tmp_path, {"vae": inner.net}).layers["vae"]
    assert list(read) == objective.changed and read["encoder." + CONV].alpha == 3.0
    merged = jaxsd.weights.load(tmp_path / "vae", like=inner.net)
    assert_same_state(merged, objective.whole(params))


def test_factors_have_pefts_names_shapes_and_beginning():
    objective = pixels(rank=3)
    params = objective.init(KEY)
    down, up = factor_names(CONV)
    assert (down, up) == (CONV[:-6] + "lora_A.weight", CONV[:-6] + "lora_B.weight")
    assert params[down].shape == (3, 8, 3, 3) and params[up].shape == (8, 3, 1, 1)
    linear = [params[n].shape for n in factor_names("time_embedding.linear_1.weight")]
    assert linear == [(3, 8), (32, 3)]
    assert len(params) == 2 * len(objective.changed) == 2 * len(GROUPED)
    for name in objective.changed:
        down, up = (params[factor] for factor in factor_names(name))
        bound = np.prod(down.shape[1:]) ** -0.5
        assert not np.any(up) and 0.5 * bound < np.abs(down).max() <= bound
    other = pixels(rank=3, targets=("convs",)).init(KEY)  # each by its own name
    np.testing.assert_array_equal(other[factor_names(CONV)[0]], params[factor_names(CONV)[0]])
    kept = pixels(initial=params)
    assert kept.init(KEY) is params


SHAPES = tiny.ddpm().net.shapes
GROUPED = [
    n for n, s in SHAPES.items() if n.endswith(".weight") and len(s) > 1 and "class" not in n
]


def test_gradients_are_those_of_the_sum_written_by_hand():
    """W + s up down has the slopes s G down^T and s up^T G, where G is the slope of W."""
    objective, batch = pixels(), {n: jnp.asarray(v) for n, v in tiny.ddpm_batch().items()}
    params, now = moved(objective), Now(KEY)
    whole = dict(objective.base)
    for name in objective.changed:
        down, up = (np.asarray(params[f], np.float64) for f in factor_names(name))
        product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        whole[name] = jnp.asarray(whole[name] + 1.5 * product.reshape(whole[name].shape), "float32")

    def slopes(loss, params, aux):
        return jax.jit(jax.grad(lambda p: loss(p, aux, batch, now)[0]))(params)

    got = slopes(objective.loss, params, objective.aux)
    plain = slopes(objective.inner.loss, whole, objective.inner.aux)
    assert got.keys() == params.keys()
    for name in objective.changed:
        down, up = factor_names(name)
        slope = np.asarray(plain[name], np.float64).reshape(len(plain[name]), -1)
        a, b = (np.asarray(params[f], np.float64) for f in (down, up))
        by_down = 1.5 * b.reshape(len(b), -1).T @ slope
        by_up = 1.5 * slope @ a.reshape(len(a), -1).T
        assert difference(got[down], by_down.reshape(a.shape)) <= CLOSE, down
        assert difference(got[up], by_up.reshape(b.shape)) <= CLOSE, up


def test_the_average_is_whole_too():
    objective, seen = pixels(), []

    def loss(params, aux, batch, now):
        seen.extend([params, now.ema])
        return jnp.zeros(()), {}

    objective.inner.loss = loss
    params, ema = objective.init(KEY), moved(objective)
    objective.loss(params, objective.aux, {}, Now(KEY, 0, ema))
    for got, factors in zip(seen, (params, ema), strict=True):
        assert difference(got[CONV], objective.whole(factors)[CONV]) <= CLOSE
    assert difference(seen[0][CONV], seen[1][CONV]) > 0.01


# --- In the training loop ---------------------------------------------------------------------


class Attention(Regression):
    """y = W_out tanh(W_q x) + b, under the names that rules of sharding know."""

    def init(self, key):
        rng = np.random.default_rng(0)
        drawn = rng.normal(0, SIZE**-0.5, (2, SIZE, SIZE)).astype(np.float32)
        return {"a.to_q.weight": drawn[0], "a.to_out.0.weight": drawn[1], "b": jnp.zeros(SIZE)}

    def loss(self, params, aux, batch, now):
        inside = jnp.tanh(batch["x"] @ params["a.to_q.weight"].T)
        y = inside @ params["a.to_out.0.weight"].T + params["b"][None]
        return jnp.square(y - batch["y"]).mean(), {}


@pytest.fixture(scope="module")
def attention() -> LowRank:
    inner = Attention()
    base = {name: jnp.asarray(value) for name, value in inner.init(KEY).items()}
    return LowRank(inner, base, rank=4, alpha=6.0)


def test_only_factors_change_and_a_killed_training_goes_on(attention, tmp_path):
    whole = run(tmp_path / "whole", attention)
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", attention, stopping_after(5))
    assert_same_state(run(tmp_path / "cut", attention), whole)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")

    names = {factor for name in attention.changed for factor in factor_names(name)}
    assert whole.params.keys() == whole.ema.keys() == names
    shapes = {name: value.shape for name, value in attention.base.items()}
    made = jaxsd.weights.load(tmp_path / "whole" / "model" / DIFFUSERS_FILE, like=shapes)
    changed = [n for n, v in made.items() if not np.array_equal(v, attention.base[n])]
    assert changed == attention.changed == ["a.to_q.weight", "a.to_out.0.weight"]
    file = tmp_path / "whole" / "model" / lora_files.DIFFUSERS_FILE
    read = lora_files.read(file, {"unet": {n: shapes[n] for n in changed}})
    assert_same_state(
        lora.merge({"": attention.base}, [(LoRA({"": read.layers["unet"]}), 1.0)])[""], made
    )


def stepped(objective: LowRank, devices, **options):
    """One step: how the factors are split, their slopes (by Adam's first moment), and metrics."""
    options = Options(8, batch_size=8, warmup_steps=0, max_grad_norm=0.0, **options)
    optimizer = training.make_optimizer(options)
    mesh = placement.make_mesh(options, devices)
    state, aux = placement.place_state(objective, optimizer, options, mesh)
    step = training.make_step(objective, optimizer, options)
    program = placement.compile_step(step, state, options)
    split = {name: tuple(value.sharding.spec) for name, value in state.params.items()}
    state, metrics = program(state, aux, sharding.split(next(batches(0, 1)), mesh))
    return split, optax.tree_utils.tree_get(state.opt_state, "mu"), metrics


def test_a_step_is_the_same_in_parts_and_on_a_mesh(attention):
    """Factors lie where the weight does to which they are added, so that none is gathered."""
    started = dataclasses.replace(attention, initial=moved(attention))
    _, slopes, plain = stepped(started, jax.devices()[:1])
    split, meshed, metrics = stepped(started, jax.devices(), fsdp=2, tensor=2)
    _, parted, _ = stepped(started, jax.devices()[:1], accumulate=2, remat="full")
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=CLOSE)
    for name, slope in slopes.items():
        assert difference(meshed[name], slope) <= CLOSE and np.any(slope)
        assert difference(parted[name], slope) <= CLOSE
    assert split == {
        "a.to_q.lora_A.weight": (None, "fsdp"),
        "a.to_q.lora_B.weight": ("tensor",),
        "a.to_out.0.lora_A.weight": (None, "tensor"),
        "a.to_out.0.lora_B.weight": ("fsdp",),
    }


def test_in_half_precision_what_stays_is_kept_in_it():
    """To the bit as whole training has it, whose matrices are cast from float32 at each step."""
    inner = tiny.ddpm()
    inner.denoising = dataclasses.replace(inner.denoising, dtype="bfloat16")
    base = tiny.parameters(inner.net)
    objective = LowRank(inner, base, targets=("convs",), dtype="bfloat16", **FACTORS)
    kept = objective.aux["base"]
    halves = {name for name, value in kept.items() if value.dtype == jnp.bfloat16}
    assert halves == {name for name, value in base.items() if value.ndim > 1} - {*objective.changed}
    cast = {n: v.astype(jnp.bfloat16) if v.ndim > 1 else v for n, v in base.items()}
    batch, start = tiny.ddpm_batch(), objective.init(KEY)
    want = jax.jit(inner.loss)(cast, inner.aux, batch, Now(KEY))
    assert_same_state(jax.jit(objective.loss)(start, objective.aux, batch, Now(KEY)), want)
    assert objective.whole(start)["conv_in.weight"].dtype == jnp.float32  # for the export


# --- What it leaves behind ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_folder_and_the_file_on_the_base_make_the_same_picture(latents, tmp_path):
    params = moved(latents)
    latents.inner.export(latents.base, tmp_path / "base")
    latents.export(params, tmp_path / "model")
    base, merged = (jaxsd.load(tmp_path / name) for name in ("base", "model"))

    def picture(pipe):
        return np.asarray(pipe("a red seven", 0, steps=2)[0], np.int32)

    plain = picture(base)
    base.add_lora(tmp_path / "model")
    [added] = base.loras
    assert {c: len(layers) for c, layers in added.layers.items()} == {"unet": 42, "text_encoder": 6}
    assert np.abs(picture(base) - picture(merged)).max() <= 1
    assert np.abs(picture(base) - plain).max() > 10  # it does something
    for name, value in latents.whole(params).items():
        tower, _, own = name.rpartition("text_encoder.")
        held = merged.params["text_encoder"][own] if "text_encoder." in name else None
        held = merged.params["unet"][name] if held is None else held
        np.testing.assert_array_equal(held, value, name)
    again = latents.lora(params).layers
    for component, layers in added.layers.items():
        for name, layer in layers.items():
            assert layer.alpha == 3.0
            np.testing.assert_array_equal(layer.down, again[component][name].down)
            np.testing.assert_array_equal(layer.up, again[component][name].up)


def test_previews_and_held_out_losses_are_of_the_whole(latents):
    ddpm = pixels()
    batch, keys = tiny.ddpm_batch(), jax.random.split(KEY, 8)
    params = moved(ddpm)
    got = jax.jit(ddpm.loss_by_bucket)(params, ddpm.aux, batch, keys)
    want = jax.jit(ddpm.inner.loss_by_bucket)(ddpm.whole(params), ddpm.inner.aux, batch, keys)
    np.testing.assert_allclose(got, want, rtol=CLOSE)
    pipe = ddpm.pipeline(params)
    assert_same_state(pipe.params["unet"], ddpm.whole(params))
    seen = []
    ddpm.inner.preview = seen.append
    ddpm.preview(params)
    assert_same_state(seen, [ddpm.whole(params)])


# --- What is chosen, and refused ----------------------------------------------------------------


def test_four_groups_are_the_layers_of_lcm_loras():
    shapes = Net(UNet(FAMILIES["sd1"].unet)).shapes
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    counts = {group: len(targeted([group], params)) for group in list(GROUPS)[:4]}
    assert counts == {"attention": 128, "feed-forward": 32, "convs": 64, "projections": 54}
    assert len(targeted(list(GROUPS)[:4], params)) == sum(counts.values()) == 278


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "lora_rank must be at least 1, not 0"),
        ({"alpha": 0.0}, "lora_alpha must be above 0, not 0.0"),
        ({"alpha": float("nan")}, "lora_alpha must be above 0, not nan"),
        ({"targets": ("attention",)}, "'attention' fits no linear layer or convolution"),
        ({"targets": ("conv",)}, "'conv' fits no .* near is .'convs'"),
        ({"targets": ("*.bias",)}, "fits no linear layer"),
        ({"targets": ()}, "name at least one of attention, feed-forward, convs"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(JaxsdError, match=message) as error:
        pixels(**changes)
    assert "\n" not in str(error.value)


# --- The recipe -------------------------------------------------------------------------------


def recipe(tmp_path, **options) -> TextToImage:
    return TextToImage(workdir=tmp_path / "run", model="digits", **options)


def test_a_dry_run_counts_what_is_trained(tmp_path, capsys):
    run_recipe(recipe(tmp_path, lora_rank=4, lora_targets=("*.attn2.to_q.weight",), dry_run=True))
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    shapes = jaxsd.load("digits").unet.shapes
    widths = [shape[0] for name, shape in shapes.items() if name.endswith("attn2.to_q.weight")]
    assert widths and rows["trained"] == f"{sum(2 * 4 * width for width in widths):,}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 4.0}, "lora_alpha needs a --lora-rank"),
        ({"lora_targets": ("convs",)}, "lora_targets needs a --lora-rank"),
        ({"lora_rank": -1}, "lora_rank must be at least 1, not -1"),
        ({"lora_rank": 4, "model": None}, "lora_rank: .* give --model"),
    ],
)
def test_what_the_recipe_refuses(options, message, tmp_path):
    asked = dataclasses.replace(recipe(tmp_path), **options)
    with pytest.raises(JaxsdError, match=message):
        asked.maybe_low_rank(pixels(targets=("convs",)).inner)
