"""Contrastive training: the loss over the whole batch of all devices, its limits, its exports."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from scipy.special import log_softmax

from jaxsd import components, training, weights
from jaxsd.cli.recipes.clip import CLIP as Recipe
from jaxsd.errors import JaxsdError
from jaxsd.models import CLIPModel, CLIPTextConfig, CLIPVisionConfig
from jaxsd.nn import Net, rematerialise
from jaxsd.objectives import Now
from jaxsd.objectives.clip import MAX_SCALE, PixelStatistics, contrastive_loss
from jaxsd.tokenizer import Tokenizer

NOW = Now(jax.random.key(3))
AXES = ("data", "fsdp")  # over which a batch is split
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5


@pytest.fixture(scope="module")
def contrast(tmp_path_factory):
    """An objective with parameters and a batch for it."""
    words = tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    objective = tiny.clip(words)
    batch = {name: jnp.asarray(value) for name, value in tiny.captioned_batch(words).items()}
    return objective, tiny.parameters(objective.net), batch


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(want[name]), name)


def test_contrastive_loss_is_the_symmetric_cross_entropy():
    rng = np.random.default_rng(0)
    text, image = rng.normal(size=(2, 6, 5))
    text, image = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, image))
    logits = 7.5 * text @ image.T
    want = -sum(np.diag(log_softmax(logits, axis)).mean() for axis in (0, 1)) / 2
    loss, logged = contrastive_loss(jnp.float32(text), jnp.float32(image), jnp.float32(7.5))
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert logged["top1"] == pytest.approx(np.mean(logits.argmax(1) == np.arange(6)))


# --- On several devices ----------------------------------------------------------------------


def features(count, width=5):
    """Linear towers' inputs and weights: their features are close enough to be confused."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, count, width)) + 0.5 * rng.normal(size=(1, count, width))
    return [jnp.float32(x) for x in (*inputs, *rng.normal(size=(2, width, width)), 7.5)]


def slope(loss):
    """A jitted function of `features`: (loss, gradients by weights and scale)."""

    def run(texts, images, text_tower, image_tower, scale):
        towers = ((texts, text_tower), (images, image_tower))
        units = (x @ w / jnp.linalg.norm(x @ w, axis=-1, keepdims=True) for x, w in towers)
        return loss(*units, scale)

    return jax.jit(jax.value_and_grad(run, (2, 3, 4)))


@pytest.fixture(scope="module")
def mesh():
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


def split(tree, mesh):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(AXES)))


def copied(tree, mesh):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def placed(values, mesh):
    return *split(values[:2], mesh), *copied(values[2:], mesh)


def whole(text, image, scale):
    return contrastive_loss(text, image, scale)[0]


def on_each_device(mesh, gathers):
    """The loss written out per device: own rows against all (or, wrongly, only its own) others."""
    rows, everywhere = PartitionSpec(AXES), PartitionSpec()

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, rows, everywhere), out_specs=everywhere
    )
    def loss(text, image, scale):
        texts, images = text, image
        if gathers:
            texts, images = (jax.lax.all_gather(x, AXES, tiled=True) for x in (text, image))
        own = scale * (text * image).sum(-1)
        wrong = [
            jax.nn.logsumexp(scale * jnp.einsum("ip,jp->ij", mine, all_of_other), axis=1) - own
            for mine, all_of_other in ((text, images), (image, texts))
        ]
        return jax.lax.pmean((wrong[0].mean() + wrong[1].mean()) / 2, AXES)

    return loss


def differences(got, want):
    gradients = zip(got[1], want[1], strict=True)
    apart = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in gradients)
    return abs(float(got[0] - want[0])), apart


def test_the_batch_of_all_devices_is_one_batch(mesh):
    """Equal to one device and to gathering by hand; losses of each device's own batch are not."""
    values = features(32)
    want = slope(whole)(*values)
    everywhere = placed(values, mesh)
    for loss in (whole, on_each_device(mesh, True)):
        apart = differences(slope(loss)(*everywhere), want)
        assert apart[0] <= LOSS_TOLERANCE and apart[1] <= GRADIENT_TOLERANCE, apart
    apart = differences(slope(on_each_device(mesh, False))(*everywhere), want)
    assert apart[0] > 0.1 and apart[1] > 0.01, apart


def test_no_device_holds_all_similarities(mesh):
    """Each has its rows alone, and less of them than if both towers' were worked out by hand."""
    count = 1024
    everywhere = placed(features(count), mesh)
    compiled = slope(whole).lower(*everywhere).compile()
    by_hand = slope(on_each_device(mesh, True)).lower(*everywhere).compile()
    shapes = set(re.findall(r"f32\[(\d+),(\d+)\]", compiled.as_text()))
    assert ("256", "1024") in shapes and not {("1024", "1024"), ("1024", "256")} & shapes
    temporary = [c.memory_analysis().temp_size_in_bytes for c in (compiled, by_hand)]
    assert temporary[0] < temporary[1] < 4 * 256 * 1024 * 12
    one = slope(whole).lower(*features(count)).compile()
    assert temporary[0] < one.memory_analysis().temp_size_in_bytes / 3


# --- The temperature -------------------------------------------------------------------------


def test_beyond_its_limit_the_temperature_counts_as_the_limit(contrast, tmp_path):
    objective, params, batch = contrast
    limit, beyond = (params | {"logit_scale": jnp.float32(x)} for x in (MAX_SCALE, 6.0))
    run = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (want, logged), slopes = run(limit, (), batch, NOW)
    (got, _), others = run(beyond, (), batch, NOW)
    assert got == want and logged["temperature"] == pytest.approx(0.01)
    assert slopes["logit_scale"] == others["logit_scale"] != 0  # so that it can come back

    objective.export(beyond, tmp_path)
    exported = weights.load(tmp_path / "clip", objective.net)["logit_scale"]
    assert float(exported) == MAX_SCALE


@pytest.mark.parametrize("towards", [-1.0, 1.0])
def test_an_update_ends_at_the_limit(towards):
    """Whatever the optimizer's momentum: the parameter itself does not go on, and comes back."""

    class Pull:
        """The scale of a CLIP, pulled up or down with a force of one."""

        aux = ()
        constrain = tiny.CLIP.constrain

        def init(self, key):
            return {"logit_scale": jnp.float32(4.6), "other": jnp.float32(4.6)}

        def loss(self, params, aux, batch, now):
            up = jnp.where(now.step < 5, 1.0, towards)
            return -up * (params["logit_scale"] + params["other"]), {}

        def preview(self, params):
            return None

        def export(self, params, folder):
            pass

    options = training.Options(10, learning_rate=0.1, warmup_steps=1, decay="constant")
    objective, optimizer = Pull(), training.make_optimizer(options)
    state, aux = training.init_state(objective, optimizer, options)
    step, scales = jax.jit(training.make_step(objective, optimizer, options)), []
    for _ in range(10):
        state, _ = step(state, aux, {})
        scales.append(float(state.params["logit_scale"]))
        assert float(state.ema["logit_scale"]) <= MAX_SCALE + 1e-6
    assert scales[4] == MAX_SCALE and float(state.params["other"]) > 4.7
    assert (scales[-1] < MAX_SCALE - 0.01) == (towards < 0) and max(scales) == MAX_SCALE


def test_parts_of_a_batch_are_no_batch(tmp_path):
    with pytest.raises(JaxsdError, match="accumulate: the loss compares all pictures"):
        Recipe(workdir=tmp_path, accumulate=2).build()


# --- Pictures in, models out -----------------------------------------------------------------


def test_towers_compute_in_bfloat16_and_the_loss_in_float32(contrast):
    objective, params, batch = contrast
    objective = dataclasses.replace(objective, dtype="bfloat16")
    params = {n: v.astype(jnp.bfloat16) if v.ndim > 1 else v for n, v in params.items()}
    with rematerialise("full"):
        traced = str(jax.make_jaxpr(jax.grad(objective.loss, has_aux=True))(params, (), batch, NOW))
    kinds = re.findall(r":(\w+)\[([\d,]+)\] = dot_general", traced)
    similarities = [kind for kind, shape in kinds if shape == "4,4"]
    assert set(similarities) == {"f32"} and [kind for kind, _ in kinds].count("bf16") > 30
    assert "policy=<function nothing_saveable" in traced  # computed again, as "full" says


def test_by_default_pictures_are_taken_as_they_are():
    pictures = jnp.asarray(tiny.pictures(3))
    np.testing.assert_array_equal(PixelStatistics()(pictures), pictures)
    openai = PixelStatistics((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    want = ((np.asarray(pictures, np.float64) + 1) / 2 - openai.mean) / openai.std
    np.testing.assert_allclose(openai(pictures), want, rtol=1e-6, atol=1e-6)


def test_an_exported_clip_gives_text_tower_tokenizer_and_both_towers(contrast, tmp_path):
    objective, params, batch = contrast
    objective.export(params, tmp_path)
    text = components.load_component(tmp_path / "text_encoder")
    words = Tokenizer(tmp_path / "tokenizer")
    assert len(words) == text.net.config.vocab_size
    assert words.eos_token_id == text.net.config.eos_token_id
    length = text.net.config.max_position_embeddings
    np.testing.assert_array_equal(words(tiny.CAPTIONS, length), batch["input_ids"])
    assert_equal(text.params, {name: params[name] for name in text.net.shapes})

    config = weights.read_json(tmp_path / "clip" / "config.json")
    towers = CLIPModel(
        CLIPTextConfig.from_json(config["text_config"]),
        CLIPVisionConfig.from_json(config["vision_config"]),
    )
    assert_equal(weights.load(tmp_path / "clip", Net(towers)), params)
    assert len(Tokenizer(tmp_path / "clip")) == len(words)
    pixels = weights.read_json(tmp_path / "clip" / "preprocessor_config.json")
    assert pixels["image_mean"] == pixels["image_std"] == [0.5] * 3
    assert pixels["crop_size"] == {"height": 8, "width": 8}
