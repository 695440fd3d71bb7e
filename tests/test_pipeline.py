"""The pipeline: what an image depends on, what is compiled, what is refused, what is written."""

import contextlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused

import jaxsd
from jaxsd.components import Component, make_net
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError
from jaxsd.pipeline import Pipeline
from jaxsd.tokenizer import PromptTruncated

PROMPT, NEGATIVE = "a red seven", "blue"
CALL = {
    "prompts": PROMPT,
    "negative_prompt": NEGATIVE,
    "steps": 3,
    "seeds": 5,
    "guidance_scale": 20.0,
}


def component(config, seed: int) -> Component:
    """Random weights, none of them left at zero: an untrained UNet says 0 whatever it is asked."""
    net, rng = make_net(config), np.random.default_rng(seed)
    params = {}
    for name, shape in net.shapes.items():
        norm = len(shape) == 1 and name.endswith("weight")
        value = rng.normal(norm, 1 / max(np.prod(shape[1:]), 4) ** 0.5, shape)
        params[name] = jnp.asarray(value, jnp.float32)
    return Component(net, params)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> Pipeline:
    words = tiny.tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")
    return Pipeline(
        unet=component(tiny.LATENT_UNET, 0),
        schedule=Schedule(prediction_type="v_prediction", clip_sample=False),
        vae=component(tiny.VAE_CONFIG, 1),
        text_encoder=component(tiny.TEXT, 2),
        tokenizer=words,
    )


@pytest.fixture(scope="module")
def pixel_pipe() -> Pipeline:
    return Pipeline(component(tiny.PIXEL_UNET, 3), Schedule(beta_schedule="cosine"))


def pixels(pipe, **changes) -> np.ndarray:
    images = pipe(**CALL | changes)
    return np.stack([np.asarray(image) for image in images]).astype(int)


# --- What an image depends on ----------------------------------------------------------------


def test_an_image_depends_on_its_seed_alone(pipe):
    seeds = [7, 2**32 - 1, 0]

    def latents(seeds):
        cond, uncond = (pipe.encode([text] * len(seeds)) for text in (PROMPT, NEGATIVE))
        return pipe.denoise(pipe.noise(seeds), cond, uncond, steps=4, eta=0.7, seeds=seeds)

    together = latents(seeds)
    pictures = pipe.decode_array(together).astype(int)
    for i, seed in enumerate(seeds):
        alone = latents([seed])
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-5, atol=1e-5)
        assert np.abs(pictures[i] - pipe.decode_array(alone)[0].astype(int)).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": "a blue three"},
        {"seeds": 6},
        {"steps": 4},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"negative_prompt": "white"},
        {"eta": 1.0},
        {"sampler": "dpmpp_2m"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_option_counts(pipe, change):
    assert np.abs(pixels(pipe) - pixels(pipe, **change)).max() > 2


def test_the_same_call_gives_the_same_image(pipe):
    np.testing.assert_array_equal(pixels(pipe), pixels(pipe))
    # Without noise on the way eta's sampler says nothing; at scale 1 neither does the other prompt.
    np.testing.assert_array_equal(pixels(pipe), pixels(pipe, sampler="ddim", eta=0.0))
    same = [pixels(pipe, guidance_scale=1.0, negative_prompt=text) for text in ("", "blue")]
    assert np.abs(same[0] - same[1]).max() <= 1


def test_one_negative_prompt_for_each_image(pipe):
    texts = ["blue", "a green one", ""]
    together = pixels(pipe, seeds=[5, 5, 5], negative_prompt=texts)
    for picture, text in zip(together, texts, strict=True):
        assert np.abs(picture - pixels(pipe, negative_prompt=text)[0]).max() <= 1


def test_one_prompt_for_each_image(pipe):
    texts = ["a red seven", "a green one on white", "nine"]
    together = pixels(pipe, seeds=[5, 5, 5], prompts=texts)
    for picture, text in zip(together, texts, strict=True):
        assert np.abs(picture - pixels(pipe, prompts=text)[0]).max() <= 1


def test_the_callback_sees_the_steps_in_order(pipe):
    seen = []
    cond, uncond = pipe.encode([PROMPT]), pipe.encode([NEGATIVE])

    def latents(**kwargs):
        return pipe.denoise(pipe.noise([5]), cond, uncond, steps=4, sampler="dpmpp_2m", **kwargs)

    last = latents(callback=lambda *now: seen.append(now))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == [800, 600, 400, 200]
    assert all(x.shape == (1, 4, 4, 4) for _, _, x in seen)
    np.testing.assert_array_equal(seen[-1][2], last)
    np.testing.assert_array_equal(last, latents())


def test_classes_in_pixel_space(pixel_pipe):
    call = {"seeds": [1, 2], "steps": 2}
    by_name, by_number = (
        pixel_pipe(prompts, **call) for prompts in (["seven", " Three"], ["7", "3"])
    )
    assert [image.size for image in by_name] == [(8, 8)] * 2 and by_name[0].mode == "L"
    for a, b in zip(by_name, by_number, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- What is compiled --------------------------------------------------------------------------


@contextlib.contextmanager
def compilations():
    """Counts the programs that the backend compiles meanwhile."""
    count = []

    def listen(event, seconds, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            count.append(kwargs.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_values_compile_nothing(pipe, untraced):
    pipe(**CALL)
    with compilations() as count:
        for change in (
            {"prompts": "a blue three"},
            {"prompts": NEGATIVE},
            {"negative_prompt": ""},
            {"prompts": "", "negative_prompt": ""},
            {"seeds": 123},
            {"steps": 11},
            {"guidance_scale": 3.0},
            {"guidance_rescale": 0.5},
            {"eta": 0.5},
            {"callback": lambda i, t, x: None},
        ):
            pipe(**CALL | change)
            assert not count, (change, count)
        (image,) = pipe(**CALL, height=12, width=16)
        assert count  # it does count: another shape is another program
    assert image.size == (16, 12) and image.mode == "RGB"


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"height": 9}, "multiples of 2, not 9x8"),
        ({"width": 0}, "multiples of 2"),
        ({"steps": 0}, "steps"),
        ({"steps": -5}, "not -5"),
        ({"steps": 1001}, "1000"),
        ({"seeds": -1}, "seeds"),
        ({"seeds": [0, 2**32]}, "seeds"),
        ({"seeds": []}, "seed"),
        ({"eta": 1.5}, "eta"),
        ({"eta": -0.1}, "eta"),
        ({"prompts": ["one", "two"], "seeds": [0, 1, 2]}, "2 prompts for 3 seeds"),
        ({"prompts": []}, "0 prompts for 1 seeds"),
        ({"negative_prompt": ["", "", ""], "seeds": [0, 1]}, "3 negative prompts for 2 seeds"),
        ({"sampler": "plms"}, "ddim, ddpm, euler, dpmpp_2m"),
        ({"clip_skip": 1}, "clip_skip must be from 0 to 0"),
        ({"clip_skip": -1}, "clip_skip"),
    ],
)
def test_calls_that_cannot_be(pipe, wrong, said):
    assert said in refused(pipe, **CALL | wrong)


@pytest.mark.parametrize("name", ["ten", "10", "-1", "a seven", "1.0"])
def test_unknown_classes(pixel_pipe, name):
    assert "0 to 9" in refused(pixel_pipe, name, steps=1)


def test_a_long_prompt_is_cut_with_a_warning(pipe):
    long = "a red seven on white, " * 5 + "a green nine"
    with pytest.warns(PromptTruncated, match="a green nine"):
        cut = pipe.encode([long])["encoder_hidden_states"]
    with pytest.warns(PromptTruncated) as warnings:
        twice = pipe.encode([long, long])["encoder_hidden_states"]
    assert len(warnings) == 1
    np.testing.assert_allclose(twice[0], cut[0], rtol=1e-5, atol=1e-5)


# --- Files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipe.save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to be spoilt."""
    return shutil.copytree(saved, tmp_path / "model")


def listing(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_round_trip(pipe, saved):
    again = jaxsd.load(saved)
    assert again.schedule == pipe.schedule
    assert not again.zero_empty_prompt
    np.testing.assert_array_equal(
        *(again.encode([text])["encoder_hidden_states"] for text in (None, ""))
    )
    assert again.params.keys() == pipe.params.keys()
    for name, params in pipe.params.items():
        assert again.components[name].net.config == pipe.components[name].net.config
        assert params.keys() == again.params[name].keys()
        for key, value in params.items():
            np.testing.assert_array_equal(value, again.params[name][key])
    np.testing.assert_array_equal(pipe.tokenizer([PROMPT]), again.tokenizer([PROMPT]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(pipe, tmp_path, dtype):
    pipe.save(tmp_path / "half", dtype=dtype)
    for wanted, found in ((None, dtype), (jnp.float32, "float32"), (jnp.bfloat16, "bfloat16")):
        params = jaxsd.load(tmp_path / "half", dtype=wanted).params
        assert {str(value.dtype) for part in params.values() for value in part.values()} == {found}


def test_saving_replaces_what_stood_there(pipe, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "unet" / "config.json").write_text("{}")
    before = listing(folder)
    pipe.save(folder)
    assert listing(folder) == before and os.listdir(folder.parent) == ["model"]
    assert (folder / "notes.txt").read_text() == "mine"
    jaxsd.load(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("file", ["scheduler_config.json", "model_index.json"])
@pytest.mark.parametrize("new", [True, False])
def test_a_failing_save_leaves_nothing_half_written(pipe, folder, monkeypatch, error, file, new):
    write = jaxsd.weights.write_json

    def fail(path, values):
        if path.name == file:
            raise error
        write(path, values)

    target = folder.with_name("other") if new else folder
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    monkeypatch.setattr("jaxsd.weights.write_json", fail)
    with pytest.raises(JaxsdError if isinstance(error, OSError) else KeyboardInterrupt):
        pipe.save(target)
    after = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    assert after == before and os.listdir(folder.parent) == ["model"]


def test_an_output_folder_that_cannot_be(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(pipe.save, tmp_path / "file" / "model")
    assert "cannot write" in refused(pipe.save, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "" and os.listdir(tmp_path) == ["file"]


def test_saving_here(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save(".")
    assert "model_index.json" in os.listdir(tmp_path)
    assert not list(tmp_path.parent.glob(".*partial"))


def test_models_that_are_none(tmp_path):
    assert "unknown model 'no-such-model'" in refused(jaxsd.load, "no-such-model")
    assert "no model_index.json" in refused(jaxsd.load, tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "weights.safetensors" in refused(jaxsd.load, tmp_path / "weights.safetensors")
    assert "nobody/nothing" in refused(jaxsd.load, "nobody/nothing")  # the Hub is out of reach


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_folder_without_a_component(folder, name):
    shutil.rmtree(folder / name)
    assert f"lacks {name}/" in refused(jaxsd.load, folder)


@pytest.mark.parametrize(
    "file",
    [
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
    ],
)
def test_a_missing_or_truncated_file(folder, file):
    path = folder / file
    whole = path.read_bytes()
    path.unlink()
    assert str(path.parent) in refused(jaxsd.load, folder)
    if path.suffix != ".txt":
        path.write_bytes(whole[: len(whole) // 2])
        assert str(path) in refused(jaxsd.load, folder)


def test_a_misshapen_weight(pipe, folder):
    params = dict(pipe.params["vae"])
    params["quant_conv.bias"] = jnp.zeros(3)
    del params["post_quant_conv.weight"]
    jaxsd.weights.save(params, folder / "vae")
    said = refused(jaxsd.load, folder)
    assert "quant_conv.bias [3] instead of [8]" in said
    assert "1 missing: post_quant_conv.weight" in said


@pytest.mark.parametrize("file", ["unet", "vae", "scheduler"])
def test_an_option_that_is_not_known(folder, file):
    (path,) = (folder / file).glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"an_option_of_tomorrow": 1}))
    assert "an_option_of_tomorrow" in refused(jaxsd.load, folder)


@pytest.mark.parametrize("index", ["[]", "{", "{}", '{"unet": ["diffusers", "Other"]}'])
def test_a_broken_index(folder, index):
    (folder / "model_index.json").write_text(index)
    refused(jaxsd.load, folder)
