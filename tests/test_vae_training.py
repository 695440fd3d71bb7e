"""Training a VAE: the terms of its loss, who learns from which, and what is exported."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from PIL import Image

from jaxsd import components, weights
from jaxsd.cli.recipes.vae import VAE
from jaxsd.errors import JaxsdError
from jaxsd.hub import PRETRAINED
from jaxsd.models.discriminator import DiscriminatorConfig
from jaxsd.nn import Net, rematerialise
from jaxsd.objectives import Now
from jaxsd.objectives.vae import LAST_LAYER, PREFIX, Adversary, kl_divergence
from jaxsd.pictures import to_uint8
from jaxsd.training.step import initial_params
from jaxsd.weights import single

KEY = jax.random.key(3)
NOW = Now(KEY)
ADVERSARY = Adversary(DiscriminatorConfig(4, layers=1, norm="batch"), start=2)


class Spy(Net):
    """Stands in for a VAE: four latents of each 2x2 patch, and a picture of a single colour."""

    def __init__(self):
        self.config = tiny.VAE_CONFIG

    def __call__(self, params, x, method):
        if method == "decode_features":
            return x
        if method == "render":
            shape = (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], 3)
            return jnp.broadcast_to(jnp.tanh(x).mean((1, 2, 3), keepdims=True), shape)
        b, h, w, c = x.shape
        patches = x.reshape(b, h // 2, 2, w // 2, 2, c).mean(-1)
        mean = patches.transpose(0, 1, 3, 2, 4).reshape(b, h // 2, w // 2, 4)
        return mean, 0.5 * mean - 1


@pytest.fixture(scope="module")
def plain():
    objective = tiny.vae()
    return objective, tiny.parameters(objective.net)


@pytest.fixture(scope="module")
def adversarial():
    """An objective with a discriminator, and what training it starts from."""
    objective = tiny.vae(adversary=ADVERSARY)
    objective = dataclasses.replace(objective, initial=tiny.parameters(objective.net))
    return objective, objective.init(KEY)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(want[name]), name)


def test_kl_divergence_is_the_expected_log_ratio():
    z = np.linspace(-40, 40, 400_001)
    for mean, logvar in [(0.0, 0.0), (1.5, -2.0), (-0.3, 1.2)]:
        log_q = -0.5 * (np.log(2 * np.pi) + logvar + (z - mean) ** 2 / np.exp(logvar))
        log_p = -0.5 * (np.log(2 * np.pi) + z**2)
        want = np.trapezoid(np.exp(log_q) * (log_q - log_p), z)
        got = kl_divergence(jnp.float32(mean), jnp.float32(logvar))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_vae_loss_is_reconstruction_plus_weighted_divergence(reconstruction):
    objective = tiny.vae(kl_weight=0.3, reconstruction=reconstruction)
    objective.net, image = Spy(), tiny.pictures(4)
    loss, logged = objective.loss({}, (), {"image": jnp.asarray(image)}, NOW)

    mean, logvar = (np.asarray(x, np.float64) for x in Spy()({}, image, "encode"))
    eps = np.asarray(jax.random.normal(KEY, mean.shape), np.float64)
    rebuilt = np.tanh(mean + np.exp(logvar / 2) * eps).mean((1, 2, 3), keepdims=True)
    difference = rebuilt - image
    kl = np.mean((mean**2 + np.exp(logvar) - 1 - logvar) / 2)
    l1, l2 = np.abs(difference).mean(), np.square(difference).mean()
    np.testing.assert_allclose(loss, (l1 if reconstruction == "l1" else l2) + 0.3 * kl, rtol=1e-5)
    np.testing.assert_allclose(logged["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(logged["l1"], l1, rtol=1e-5)
    # Decibels below the range, which is 2
    np.testing.assert_allclose(logged["psnr"], 20 * np.log10(2 / np.sqrt(l2)), rtol=1e-5)


def test_the_scaling_factor_gives_latents_unit_deviation(plain):
    objective, params = plain
    mean, logvar = objective._encode(params, jnp.asarray(objective.samples))
    noise = np.random.default_rng(0).standard_normal((20, *mean.shape))
    drawn = np.exp(np.asarray(logvar) / 2) * noise
    latents = np.asarray(mean) + drawn
    # Neither the means nor the variances are all there is
    assert 0.2 < np.std(mean) / np.std(latents) < 0.98
    np.testing.assert_allclose(objective.scaling_factor(params) * np.std(latents), 1, atol=0.02)


def test_an_exported_vae_opens_with_the_measured_scale(plain, tmp_path):
    objective, params = plain
    objective.export(params, tmp_path)
    vae = components.load_component(tmp_path / "vae")
    assert_equal(vae.params, params)
    assert vae.net.config.scaling_factor == pytest.approx(objective.scaling_factor(params))


def test_the_preview_of_a_vae_is_pictures_above_their_reconstructions(plain):
    objective, params = plain
    picture = objective.preview(params)
    assert picture.shape == (2 * 9 - 1, 8 * 9 - 1, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[:8, :8], to_uint8(objective.samples[0]))


def test_the_scaling_factor_can_stay(plain, tmp_path):
    objective, params = plain
    kept = dataclasses.replace(objective, keep_scaling_factor=True)
    kept.export(params, tmp_path)
    vae = components.load_component(tmp_path / "vae")
    assert vae.net.config == tiny.VAE_CONFIG and vae.net.config.scaling_factor == 0.7


# --- With a discriminator --------------------------------------------------------------------


def test_a_discriminator_is_trained_with_the_vae_but_not_exported(adversarial, tmp_path):
    objective, params = adversarial
    own = {name for name in params if name.startswith(PREFIX)}
    assert params.keys() - own == objective.net.shapes.keys()
    layers = ("0.weight", "0.bias", "2.weight", "3.weight", "3.bias", "5.weight", "5.bias")
    assert own == {f"{PREFIX}main.{name}" for name in layers}
    objective.export(params, tmp_path)
    exported = components.load_component(tmp_path / "vae").params
    assert_equal(exported, {name: params[name] for name in objective.net.shapes})


class LinearSpy(Spy):
    """One whose decoder is a matrix, its last layer."""

    def __call__(self, params, x, method):
        if method == "render":
            x = jnp.einsum("bhwz,cz->bhwc", x, params[LAST_LAYER])
            return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        return super().__call__(params, x, method)


def test_four_devices_share_one_discriminator(adversarial):
    """Its batch statistics are those of the whole batch, and so is the weight of its opinion."""
    objective = dataclasses.replace(adversarial[0])
    objective.net = LinearSpy()
    # Not as drawn for a training, whose answers are small: with none beyond 1 or -1 real and made
    # pictures push the last bias equally, and its gradient is zero
    own = tiny.parameters(objective._discriminator)
    params = {PREFIX + name: value for name, value in own.items()}
    params[LAST_LAYER] = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    slope = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    now, found = NOW._replace(step=jnp.int32(ADVERSARY.start)), {}
    for count in (1, 4):
        mesh = Mesh(jax.devices()[:count], ("data",), axis_types=(AxisType.Auto,))
        copied, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        batch = jax.device_put({"image": tiny.pictures(8)}, split)
        placed = jax.device_put((params, now), copied)
        found[count] = slope(placed[0], (), batch, placed[1])
    for values in zip(*map(jax.tree.leaves, (found[4][0], found[1][0])), strict=True):
        np.testing.assert_allclose(*values, rtol=1e-5)
    for name, want in found[1][1].items():
        assert np.abs(want).max() > 0 or name.endswith("main.2.weight"), name
        np.testing.assert_allclose(found[4][1][name], want, atol=1e-5, err_msg=name)
    assert found[1][0][1]["adversarial_weight"] > 0


@pytest.mark.parametrize("remat", ["none", "full"])
def test_networks_compute_in_bfloat16_and_losses_in_float32(adversarial, remat):
    objective, params = adversarial
    objective = dataclasses.replace(objective, dtype="bfloat16")
    params = {n: v.astype(jnp.bfloat16) if v.ndim > 1 else v for n, v in params.items()}
    with rematerialise(remat):
        slope = jax.value_and_grad(objective.loss, has_aux=True)
        traced = jax.make_jaxpr(slope)(params, (), {"image": jnp.asarray(tiny.pictures(4))}, NOW)
    kinds = re.findall(r":(\w+)\[[\d,]+\] = conv_general_dilated", str(traced))
    assert len(kinds) > 50 and set(kinds) == {"bf16"}
    assert all(array.dtype == jnp.float32 for array in traced.out_avals[:8])  # loss and metrics
    assert ("policy=<function nothing_saveable" in str(traced)) == (remat == "full")


def test_pictures_too_small_for_a_discriminator_are_refused():
    with pytest.raises(JaxsdError, match="8 pixels .* need 24"):
        tiny.vae(adversary=Adversary())


# --- The recipe ------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures without captions."""
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (24, 20 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


def test_fine_tuning_on_pictures(pictures, plain, tmp_path):
    objective, params = plain
    components.save_component(tmp_path / "model", objective.net, params)
    recipe = VAE(
        workdir=tmp_path / "run",
        data=str(pictures),
        resolution=16,
        model=str(tmp_path / "model"),
        freeze=("encoder.*", "quant_conv.*"),
        batch_size=8,
        discriminator_start=5,
        discriminator_layers=2,
        dtype="bfloat16",
    )
    made, make_batches = recipe.build()
    [batch] = make_batches(0, 1)
    assert batch["image"].shape == (8, 16, 16, 3) and batch["image"].dtype == np.float32
    assert np.abs(batch["image"]).max() <= 1 and made.samples.shape == (1024, 16, 16, 3)
    assert made.vae == tiny.VAE_CONFIG and made.dtype == "bfloat16"
    assert made.adversary == Adversary(DiscriminatorConfig(layers=2), start=5)
    trained, frozen = initial_params(made, recipe)
    assert_equal({**trained, **frozen} | params, {**trained, **frozen})
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in frozen)
    assert {name.split(".")[0] for name in trained} == {
        "decoder", "discriminator", "post_quant_conv",
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_a_vae_starts_from_a_single_file(prefix, tmp_path):
    vae = components.load_component(PRETRAINED / "digits" / "vae")
    names = single.VAE.names(vae.params)
    arrays = {}
    for name, value in vae.params.items():
        convolution = ".attn_1." in names[name] and value.ndim == 2
        arrays[prefix + names[name]] = value[:, :, None, None] if convolution else value
    arrays["loss.logvar"] = jnp.zeros(())
    weights.save(arrays, tmp_path / "vae.safetensors")
    recipe = VAE(workdir=tmp_path / "run", model=str(tmp_path / "vae.safetensors"))
    assert_equal(recipe.build()[0].init(KEY), vae.params)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolution": 18}, "18x18 .* divides by 4"),
        ({"perceptual": "nowhere.pth"}, "cannot read nowhere.pth"),
        ({"data": "digits", "discriminator_start": 0, "discriminator_layers": 4}, "need 48"),
        ({"discriminator_start": -1}, "discriminator_start must be at least 0"),
        ({"discriminator_start": 1, "discriminator_layers": 9}, "1 to 6 layers, not 9"),
        ({"discriminator_start": 1, "discriminator_norm": "batch", "accumulate": 2}, "accumulate"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0"),
        ({"family": "digits-ddpm"}, "has no VAE"),
    ],
)
def test_what_the_recipe_refuses(options, said, pictures, tmp_path):
    options = {"data": str(pictures), "resolution": 32, "min_size": 1} | options
    recipe = VAE(workdir=tmp_path / "run", batch_size=8, **options)
    with pytest.raises(JaxsdError, match=said):
        recipe.build()
