"""Single files: written and read back, told apart, and what is inside of no use or of no kind."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused

from jaxsd import conversion
from jaxsd.components import Component, Parts, load_parts, make_index, make_net, save_parts
from jaxsd.diffusion.schedule import Schedule
from jaxsd.families import FAMILIES
from jaxsd.models import CLIPTextProjectionConfig
from jaxsd.weights import ldm, load, save, single
from jaxsd.weights.entries import Entry, row_major
from jaxsd.weights.headers import read_entries

TEXT = dataclasses.replace(tiny.TEXT, num_hidden_layers=2)
OPEN_CLIP = dataclasses.replace(TEXT, hidden_act="gelu")
BIG = CLIPTextProjectionConfig(
    **dataclasses.asdict(OPEN_CLIP) | {"hidden_size": 12, "projection_dim": 12}
)
XL_UNET = dataclasses.replace(
    tiny.LATENT_UNET,
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2),
    attention_head_dim=(2, 4),
    mid_block_type="UNetMidBlock2DCrossAttn",
    cross_attention_dim=20,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=32,
)
SD1 = {"unet": tiny.LATENT_UNET, "vae": tiny.VAE_CONFIG, "text_encoder": TEXT}
MODELS = {
    "sd1": SD1,
    "sd1-inpaint": SD1 | {"unet": dataclasses.replace(tiny.LATENT_UNET, in_channels=9)},
    "sd2": SD1
    | {
        "unet": dataclasses.replace(tiny.LATENT_UNET, use_linear_projection=True),
        "text_encoder": OPEN_CLIP,
    },
    "sdxl": SD1 | {"unet": XL_UNET, "text_encoder_2": BIG},
    "sdxl-refiner": {
        "unet": dataclasses.replace(XL_UNET, cross_attention_dim=12),
        "vae": tiny.VAE_CONFIG,
        "text_encoder_2": BIG,
    },
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


def make(kind: str, words, dtype=jnp.float32) -> Parts:
    nets = {name: make_net(config) for name, config in MODELS[kind].items()}
    components = {
        name: Component(net, {k: v.astype(dtype) for k, v in tiny.parameters(net, i).items()})
        for i, (name, net) in enumerate(nets.items())
    }
    names = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    tokenizers = {names[name]: words for name in nets if name in names}
    schedule = Schedule(prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    return Parts(components, schedule, tokenizers, make_index(MODELS[kind], schedule))


# Of the same parts as the others: the slow tests have them
LATER = ("sd1-inpaint", "sdxl-refiner")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=[pytest.mark.slow] if kind in LATER else []) for kind in MODELS
    ],
)
def model(request, words, tmp_path_factory):
    """(kind, its parts, its folder, its single file)"""
    parts, place = make(request.param, words), tmp_path_factory.mktemp(request.param)
    save_parts(parts, place / "folder")
    conversion.save_single(parts.components, place / "model.safetensors")
    return request.param, parts, place / "folder", place / "model.safetensors"


@pytest.fixture(scope="module")
def sd1(words, tmp_path_factory):
    parts, place = make("sd1", words), tmp_path_factory.mktemp("sd1-alone")
    save_parts(parts, place / "folder")
    conversion.save_single(parts.components, place / "model.safetensors")
    return parts, place / "folder", place / "model.safetensors"


def assert_same(ours: Parts, parts: Parts) -> None:
    assert ours.components.keys() == parts.components.keys()
    for name, component in parts.components.items():
        assert ours.components[name].net.config == component.net.config
        for key, value in component.params.items():
            mine = ours.components[name].params[key]
            assert mine.dtype == value.dtype
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(value), err_msg=key)
    assert ours.schedule == parts.schedule and ours.index == parts.index
    assert ours.tokenizers.keys() == parts.tokenizers.keys()


def contents(file) -> dict[str, jnp.ndarray]:
    return load(file, {name: entry.shape for name, entry in read_entries(file).items()})


# --- Round trips -----------------------------------------------------------------------------


def test_folder_and_file_and_back(model):
    _, parts, folder, file = model
    assert_same(load_parts(folder), parts)
    assert_same(load_parts(file, config=folder), parts)


def test_names_in_the_file(model):
    kind, _, _, file = model
    names = read_entries(file).keys()
    towers = {
        "sd1": "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
        "sd2": "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight",
        "sdxl": "conditioner.embedders.1.model.text_projection",
        "sdxl-refiner": "conditioner.embedders.0.model.transformer.resblocks.0.ln_1.bias",
    }
    assert towers[kind.removesuffix("-inpaint")] in names
    assert "model.diffusion_model.input_blocks.2.0.op.weight" in names
    assert "first_stage_model.decoder.mid.attn_1.proj_out.weight" in names


@pytest.mark.parametrize(
    "how",
    [{"dtype": jnp.float16}, pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow)],
    ids=["float16", "bfloat16"],
)
def test_converted(model, tmp_path, how):
    """From a folder to a file, to Orbax, to a folder: the same bits, cast once."""
    _, parts, folder, _ = model
    conversion.convert(folder, tmp_path / "a.safetensors", **how)
    conversion.convert(tmp_path / "a.safetensors", tmp_path / "b", config=folder, orbax=True)
    conversion.convert(tmp_path / "b", tmp_path / "c", target_variant="fp16")
    assert (tmp_path / "c/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    cast = {
        name: Component(c.net, {k: v.astype(how["dtype"]) for k, v in c.params.items()})
        for name, c in parts.components.items()
    }
    expected = dataclasses.replace(parts, components=cast)
    assert_same(load_parts(tmp_path / "b"), expected)
    assert_same(load_parts(tmp_path / "c", variant="fp16"), expected)


def test_targets_that_cannot_be(sd1, tmp_path):
    _, folder, file = sd1
    for name in ("a.ckpt", "a.bin"):
        assert "pickles are only read" in refused(conversion.convert, folder, tmp_path / name)
    target = tmp_path / "a.safetensors"
    assert "is a folder" in refused(conversion.convert, folder, target, orbax=True)
    assert "there already" in refused(conversion.convert, folder, file)
    assert "there already" in refused(conversion.convert, file, folder)
    message = refused(conversion.convert, "digits-ddpm", target)
    assert "a single file holds a UNet, a VAE and a text tower; this model has unet" in message
    assert not target.exists()


# --- What else a file may hold ---------------------------------------------------------------


def test_what_is_of_no_use_is_ignored(sd1, tmp_path):
    parts, folder, file = sd1
    idle = """betas alphas_cumprod sqrt_one_minus_alphas_cumprod posterior_mean_coef1 logvar
    model_ema.decay model_ema.num_updates scale_factor first_stage_model.loss.logvar
    first_stage_model.loss.discriminator.main.0.weight cond_stage_model.logit_scale
    cond_stage_model.transformer.text_model.embeddings.position_ids
    cond_stage_model.transformer.vision_model.pre_layrnorm.weight
    cond_stage_model.transformer.text_projection.weight
    cond_stage_model.transformer.visual_projection.weight""".split()
    save(contents(file) | {name: jnp.ones(2) for name in idle}, tmp_path / "a.safetensors")
    assert_same(load_parts(tmp_path / "a.safetensors", config=folder), parts)


@pytest.mark.parametrize(
    "name",
    [
        "edm_mean",  # changes the pictures
        "embedding_manager.initial_embeddings.weight",
        "model.diffusion_model.input_blocks.1.2.norm.weight",
        "first_stage_model.encoder.norm_out.extra",
        "cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1.bias",
        "lora_unet_down.weight",
    ],
)
def test_what_is_unknown_is_refused(sd1, tmp_path, name):
    _, folder, file = sd1
    save(contents(file) | {name: jnp.ones(2)}, tmp_path / "a.safetensors")
    message = refused(load_parts, tmp_path / "a.safetensors", config=folder)
    assert name.removeprefix("first_stage_model.").split(".")[-1] in message


def test_moving_averages(sd1, tmp_path):
    parts, folder, file = sd1
    whole = contents(file)
    unet = {n: v for n, v in whole.items() if n.startswith("model.diffusion_model.")}
    assert ldm.ema_name("model.diffusion_model.out.0.bias") == "model_ema.diffusion_modelout0bias"
    averages = {ldm.ema_name(name): value + 1 for name, value in unet.items()}
    save(whole | averages, tmp_path / "both.safetensors")
    both = tmp_path / "both.safetensors"
    assert_same(load_parts(both, config=folder), parts)
    averaged = load_parts(both, config=folder, use_ema=True)
    np.testing.assert_array_equal(
        np.asarray(averaged.components["unet"].params["conv_in.bias"]),
        np.asarray(parts.components["unet"].params["conv_in.bias"] + 1),
    )
    assert "no moving averages" in refused(load_parts, file, config=folder, use_ema=True)
    averages.popitem()
    save(whole | averages, both)
    assert "1 missing" in refused(load_parts, both, config=folder, use_ema=True)


def test_the_last_layer_of_sd2_is_not_read(words, tmp_path):
    parts = make("sd2", words)
    save_parts(parts, tmp_path / "folder")
    conversion.save_single(parts.components, tmp_path / "a.safetensors")
    whole = contents(tmp_path / "a.safetensors")
    extra = {
        name.replace("resblocks.1.", "resblocks.2."): value
        for name, value in whole.items()
        if "resblocks.1." in name
    }
    extra["cond_stage_model.model.text_projection"] = jnp.ones((8, 8))
    assert len(extra) == 13
    save(whole | extra, tmp_path / "b.safetensors")
    assert_same(load_parts(tmp_path / "b.safetensors", config=tmp_path / "folder"), parts)
    beyond = {n.replace("resblocks.2.", "resblocks.3."): v for n, v in extra.items()}
    save(whole | extra | beyond, tmp_path / "c.safetensors")
    message = refused(load_parts, tmp_path / "c.safetensors", config=tmp_path / "folder")
    assert "12 unexpected" in message


# --- Which family ----------------------------------------------------------------------------


def header(width: int, channels: int, **more: tuple[int, ...]) -> dict[str, Entry]:
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, channels, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (
            320,
            width,
        ),
        **more,
    }
    return {n: Entry("file", "F16", s, 0, row_major(s, 2)) for n, s in shapes.items()}


def test_families_are_told_by_shapes():
    for (width, channels), names in single.FAMILIES.items():
        assert single.family(header(width, channels)) == names
        for name in names:  # as the table of families has it
            unet = FAMILIES[name].unet
            assert (unet.cross_attention_dim, unet.in_channels) == (width, channels)
    assert single.family(header(1024, 4, v_pred=(0,))) == ("sd2-v",)
    assert single.family(header(768, 5)) == ()
    marks = single.schedule_marks(header(2048, 4, v_pred=(0,), ztsnr=(0,)))
    schedule = dataclasses.replace(FAMILIES["sdxl"].schedule, **marks)
    assert schedule.prediction_type == "v_prediction" and schedule.rescale_betas_zero_snr
    assert single.schedule_marks(header(2048, 4)) == {}
    assert single.family({}) == ()


def test_a_family_that_must_be_named(sd1, tmp_path):
    _, folder, file = sd1
    assert "no family that comes with jaxsd; pass config" in refused(load_parts, file)
    assert "does not fit the model" in refused(load_parts, file, family="sd1")
    assert "holds no text_encoder_2" in refused(load_parts, file, family="sdxl")
    assert "unknown family" in refused(load_parts, file, family="sd9")
    assert "are for single files" in refused(load_parts, folder, family="sd1")
    save(
        {
            "model.diffusion_model.input_blocks.0.0.weight": jnp.zeros((4, 4, 3, 3)),
            "model.diffusion_model.input_blocks.1.1.a.attn2.to_k.weight": jnp.zeros((4, 1024)),
        },
        tmp_path / "sd2.safetensors",
    )
    message = refused(load_parts, tmp_path / "sd2.safetensors")
    assert "pass family, one of sd2, sd2-v, sd-turbo" in message
    save({"a": jnp.zeros(1)}, tmp_path / "other.safetensors")
    assert "not a model in a single file" in refused(load_parts, tmp_path / "other.safetensors")


# --- The vocabulary --------------------------------------------------------------------------


def configs_only(folder, target):
    """A folder with configs, but neither weights nor a tokenizer."""
    for file in folder.glob("*/*config.json"):
        if "tokenizer" not in file.parent.name:
            (target / file.parent.name).mkdir(parents=True)
            (target / file.parent.name / file.name).write_bytes(file.read_bytes())
    (target / "model_index.json").write_bytes((folder / "model_index.json").read_bytes())
    return target


def test_where_a_vocabulary_is_found(model, words, tmp_path):
    kind, parts, folder, file = model
    bare = configs_only(folder, tmp_path / "configs")
    message = refused(load_parts, file, config=bare)
    assert "pass tokenizer" in message and "openai/clip-vit-large-patch14" in message
    for place in (words.folder, folder):
        found = load_parts(file, config=bare, tokenizer=place).tokenizers
        assert found.keys() == parts.tokenizers.keys()
        assert all(len(each) == len(words) for each in found.values())
    conversion.save_single(parts.components, tmp_path / "a.safetensors")
    words.save(tmp_path / "tokenizer")
    found = load_parts(tmp_path / "a.safetensors", config=bare).tokenizers
    # OpenCLIP's towers are padded with "!", id 0, OpenAI's with the end token.
    pads = {name: int(each(["a"], 8)[0, -1]) for name, each in found.items()}
    expected = {"tokenizer": words.eos_token_id, "tokenizer_2": 0}
    expected |= {"tokenizer": 0} if kind == "sd2" else {}
    assert pads == {name: expected[name] for name in pads}
    assert "no tokenizer 'no/such'" in refused(load_parts, file, config=bare, tokenizer="no/such")
