"""LoRA: the sum is the one defined, every spelling is read; what does not fit is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from lora_examples import CONV, NETS, OUT, PLACES, PROJ, K, Q, example, factors, tensors_of, write

from jaxsd import weights
from jaxsd.errors import JaxsdError
from jaxsd.families import FAMILIES
from jaxsd.inspection import inspect
from jaxsd.models import CLIPTextModel, CLIPTextModelWithProjection, UNet
from jaxsd.nn import Net
from jaxsd.weights import lora, lora_files, lora_names
from jaxsd.weights.headers import read_entries
from jaxsd.weights.ldm import unet_names
from jaxsd.weights.lora import Layer, LoRA


def change(layer: Layer, shape) -> np.ndarray:
    """alpha / r up @ down, in float64."""
    down = layer.down.astype(np.float64).reshape(layer.rank, -1)
    return (layer.alpha / layer.rank * (layer.up.astype(np.float64) @ down)).reshape(shape)


def assert_equal(a: LoRA, b: LoRA):
    assert a.layers.keys() == b.layers.keys()
    for component, layers in a.layers.items():
        assert layers.keys() == b.layers[component].keys()
        for name, layer in layers.items():
            other = b.layers[component][name]
            assert layer.alpha == other.alpha
            for x, y in ((layer.down, other.down), (layer.up, other.up)):
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)


# --- Sums ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sum_is_the_one_defined(dtype):
    loras = [(example(2, seed=1, alpha=1.0), 0.7), (example(3, seed=2, alpha=6.0), -0.2)]
    params = {
        name: {n: jnp.asarray(v, dtype) for n, v in tiny.parameters(net).items()}
        for name, net in NETS.items()
    }
    merged = lora.merge(params, loras)
    for component, name in PLACES:
        base = params[component][name]
        exact = np.asarray(base, np.float64) + sum(
            scale * change(one.layers[component][name], base.shape) for one, scale in loras
        )
        ours = merged[component][name]
        assert ours.dtype == base.dtype
        half = np.abs(exact).max() * (2**-23 if dtype == "float32" else 2**-9)  # one rounding
        assert np.abs(np.asarray(ours, np.float64) - exact).max() <= 4 * half
    untouched = params["unet"].keys() - {name for _, name in PLACES}
    for name in untouched:
        np.testing.assert_array_equal(merged["unet"][name], params["unet"][name])


def test_a_convolution_after_a_convolution():
    """The change of a kernel is `down`, then `up`, run as the two convolutions that they are."""

    def conv(x, kernel):
        kernel = jnp.asarray(kernel, jnp.float32)
        dimensions = ("NCHW", "OIHW", "NCHW")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)

    rng = np.random.default_rng(0)
    shape = NETS["unet"].shapes[CONV]
    x = jnp.asarray(rng.normal(size=(1, shape[1], 5, 5)), jnp.float32)
    layer = factors(shape)
    live = lora.live([LoRA({"unet": {CONV: layer}})], "unet")
    added = lora.apply({CONV: jnp.zeros(shape)}, live, jnp.ones(1))[CONV]
    expected = conv(conv(x, layer.down), layer.up[:, :, None, None])
    np.testing.assert_allclose(conv(x, added), expected, rtol=1e-5, atol=1e-5)


def test_the_scale_compiles_nothing():
    loras = [example(2), example(3, seed=9)]
    params = {name: jnp.zeros(shape) for name, shape in NETS["unet"].shapes.items()}
    live = lora.live(loras, "unet")
    run = jax.jit(lambda *inputs: lora.apply(*inputs))
    for scales in ([1.0, 0.0], [0.5, 0.25], [0.0, 0.0]):
        out = run(params, live, jnp.asarray(scales))[CONV]
        parts = (
            s * change(one.layers["unet"][CONV], out.shape)
            for s, one in zip(scales, loras, strict=True)
        )
        np.testing.assert_allclose(out, sum(parts), rtol=1e-5, atol=1e-5)
    assert run._cache_size() == 1


def test_a_lora_that_leaves_a_component_alone():
    one, two = LoRA({"text_encoder": example().layers["text_encoder"]}), example(seed=5)
    assert lora.live([one], "unet") == {}
    assert set(lora.live([one, two], "unet")[Q]) == {1}  # and gets the second scale


def test_each_layer_has_its_alpha(tmp_path):
    """diffusers 0.42 mixes up kohya's alphas of attention layers where they differ."""
    layers = {
        name: dataclasses.replace(layer, alpha=2.0**i)
        for i, (name, layer) in enumerate(example().layers["unet"].items())
    }
    file = lora_files.save(LoRA({"unet": layers}), tmp_path, "kohya")
    zeros = {name: jnp.zeros(NETS["unet"].shapes[name]) for name in layers}
    merged = lora.merge({"unet": zeros}, [(lora_files.read(file, NETS), 1.0)])["unet"]
    for name, layer in layers.items():
        expected = change(layer, zeros[name].shape)
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-4)


# --- Files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_round_trip(tmp_path, form, dtype):
    """Every bit, alpha's too, which no half precision holds."""
    made = example(3, alpha=1.1) if form == "peft" else example(3, alpha=float(np.float32(1.1)))
    file = lora_files.save(made, tmp_path / "new", form, dtype)
    assert file == tmp_path / "new" / "pytorch_lora_weights.safetensors"
    again = lora_files.read(tmp_path / "new", NETS)
    wanted = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    rounded = {
        component: {
            name: Layer(layer.down.astype(wanted), layer.up.astype(wanted), layer.alpha)
            for name, layer in layers.items()
        }
        for component, layers in made.layers.items()
    }
    assert_equal(again, LoRA(rounded))
    lora_files.save(again, tmp_path / "twice.safetensors", form)
    assert_equal(lora_files.read(tmp_path / "twice.safetensors", NETS), again)


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_ranks_and_alphas_of_their_own(tmp_path, form):
    made = example(4, alpha=1.0)
    for rank, (component, name) in enumerate(PLACES[::2], 1):
        shape = NETS[component].shapes[name]
        made.layers[component][name] = factors(shape, rank, alpha=rank + 0.5)
    assert_equal(lora_files.read(lora_files.save(made, tmp_path, form), NETS), made)


def test_a_lora_of_a_vae(tmp_path):
    """diffusers' VAE loads it by this prefix; kohya never named one."""
    name, shape = "decoder.conv_in.weight", (8, 4, 3, 3)
    made = LoRA({"vae": {name: factors(shape, 2, alpha=3.0)}})
    file = lora_files.save(made, tmp_path)
    assert_equal(lora_files.read(file, {"vae": {name: shape}}), made)
    with pytest.raises(JaxsdError, match="kohya has no names for vae: save it as peft"):
        lora_files.save(made, tmp_path, "kohya")


LCM = (  # what the LCM-LoRAs change
    r"to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|conv_shortcut|"
    r"samplers\.0\.conv|time_emb_proj"
)
STEM = Q.removesuffix(".weight")
LDM = "input_blocks.3.1.transformer_blocks.0.attn2.to_q"
UNDER = STEM.replace(".", "_")
SPELLINGS = [
    (f"lora_unet_{UNDER}.lora_down.weight", f"lora_unet_{UNDER}.lora_up.weight"),
    (f"unet.{STEM}.lora_A.weight", f"unet.{STEM}.lora_B.weight"),
    (f"unet.{STEM}.lora_A.style.weight", f"unet.{STEM}.lora_B.style.weight"),
    (
        f"diffusion_model.{LDM}.lora_up.weight".replace("up", "down"),
        f"diffusion_model.{LDM}.lora_up.weight",
    ),
    (f"base_model.model.{STEM}.lora_A.weight", f"base_model.model.{STEM}.lora_B.weight"),
    (f"unet.base_model.model.{STEM}.lora_A.weight", f"unet.base_model.model.{STEM}.lora_B.weight"),
    (f"unet.{STEM}.lora.down.weight", f"unet.{STEM}.lora.up.weight"),
    tuple(
        f"unet.{STEM}_lora.{part}.weight".replace("attn2.", "attn2.processor.")
        for part in ("down", "up")
    ),
    tuple(
        f"{STEM}_lora.{part}.weight".replace("attn2.", "attn2.processor.")  # save_attn_procs
        for part in ("down", "up")
    ),
]


@pytest.mark.parametrize("down, up", SPELLINGS)
def test_spellings(tmp_path, down, up):
    layer = factors(NETS["unet"].shapes[Q])
    file = write(tmp_path / "a.safetensors", {down: layer.down, up: layer.up})
    assert_equal(lora_files.read(file, NETS), LoRA({"unet": {Q: layer}}))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i8", "i4", ml_dtypes.bfloat16])
def test_alpha_is_any_number(tmp_path, dtype, shape):
    file = lora_files.save(example(), tmp_path, "kohya")
    name = f"lora_unet_{UNDER}.alpha"
    alpha = np.full(shape, 3, dtype)
    again = lora_files.read(
        write(tmp_path / "a.safetensors", tensors_of(file) | {name: alpha}), NETS
    )
    assert again.layers["unet"][Q].alpha == 3.0 and again.layers["unet"][OUT].alpha == 2.0


def test_matrices_for_1x1_kernels(tmp_path):
    """Whether a projection is a 1x1 convolution or linear differs between programs."""
    shape = NETS["unet"].shapes[PROJ]
    layer = factors(shape)
    stem = f"unet.{PROJ.removesuffix('.weight')}"
    flat = {f"{stem}.lora_A.weight": layer.down[:, :, 0, 0], f"{stem}.lora_B.weight": layer.up}
    again = lora_files.read(write(tmp_path / "a.safetensors", flat), NETS)
    assert_equal(again, LoRA({"unet": {PROJ: layer}}))


def test_a_kernel_in_the_middle(tmp_path):
    """LoCon: 1x1, then k x k, then 1x1."""
    out, inside, *kernel = NETS["unet"].shapes[CONV]
    rng = np.random.default_rng(0)
    down, mid, up = (
        rng.normal(size=size).astype(np.float32)
        for size in ((3, inside, 1, 1), (2, 3, *kernel), (out, 2, 1, 1))
    )
    stem = "lora_unet_" + CONV.removesuffix(".weight").replace(".", "_")
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    file = write(tmp_path / "a.safetensors", {f"{stem}.{n}": value for n, value in parts.items()})
    read = lora_files.read(file, NETS)
    expected = np.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    added = lora.merge({"unet": {CONV: jnp.zeros(expected.shape)}}, [(read, 1.0)])["unet"][CONV]
    np.testing.assert_allclose(added, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sd1-lcm", "sd2", "sdxl"])
def test_names_are_unambiguous_at_full_size(family):
    """No two parameters have one underscored name, and LDM's are known."""
    found = FAMILIES[family]
    networks = {"unet": UNet(found.unet), "text_encoder": CLIPTextModel(found.text_encoder)}
    if found.text_encoder_2:
        networks["text_encoder_2"] = CLIPTextModelWithProjection(found.text_encoder_2)
    for component, network in networks.items():
        shapes = {n: s for n, s in Net(network).shapes.items() if n.endswith("weight") and s[1:]}
        places = lora_names.parameters(component, shapes)
        spelt = {name: name for name in shapes}
        if component == "unet":
            shared = [name for name in shapes if "cond_proj" not in name]  # LDM knew no LCM
            spelt |= {other: name for name, other in unet_names(shared).items()}
        else:
            spelt |= {name.removeprefix("text_model."): name for name in shapes}
        underscored = {
            name.removesuffix(".weight").replace(".", "_"): meant for name, meant in spelt.items()
        }
        assert len(underscored) == len(spelt)
        assert {name: places[name] for name in underscored} == underscored
    changed = [n for n in Net(networks["unet"]).shapes if re.search(rf"({LCM})\.weight$", n)]
    assert len(changed) == {"sdxl": 788}.get(family, 278)  # as many as the LCM-LoRAs have


def test_description(tmp_path):
    made = LoRA({"unet": {Q: factors((768, 320), 16), K: factors((320, 768), 16)}})
    told = lora_names.describe(read_entries(lora_files.save(made, tmp_path, "kohya")))
    assert told == "LoRA, rank 16, Stable Diffusion 1.x, 2 layers, kohya names"
    wide = LoRA({"unet": {Q: factors((640, 640), 4), K: factors((640, 2048), 8)}})
    told = lora_names.describe(read_entries(lora_files.save(wide, tmp_path)))
    assert told == "LoRA, ranks 4 to 8, Stable Diffusion XL, 2 layers, PEFT names"
    assert inspect(tmp_path / lora_files.DIFFUSERS_FILE).kind == told
    weights.save({"conv.weight": jnp.zeros((2, 2))}, tmp_path / "plain.safetensors")
    assert lora_names.describe(read_entries(tmp_path / "plain.safetensors")) is None
