"""Requests with pictures and other options: what counts, what compiles nothing, what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from refusals import refused
from test_pipeline import CALL, compilations, component, pixels

import jaxsd
from jaxsd.data import digits
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError
from jaxsd.models import (
    ControlNetConfig,
    TinyVAEConfig,
)
from jaxsd.networks import Start
from jaxsd.pipeline import Pipeline
from jaxsd.previews import linear
from jaxsd.weights.embeddings import Embedding
from jaxsd.weights.lora import Layer, LoRA

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (8, 8, 3), np.uint8)
MASK = np.zeros((8, 8), np.uint8)
MASK[2:6, 4:] = 255


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


def make(words, **changes) -> Pipeline:
    return Pipeline(
        unet=component(dataclasses.replace(tiny.LATENT_UNET, **changes), 0),
        schedule=Schedule(prediction_type="v_prediction", clip_sample=False),
        vae=component(tiny.VAE_CONFIG, 1),
        text_encoder=component(tiny.TEXT, 2),
        tokenizer=words,
    )


@pytest.fixture(scope="module")
def pipe(words) -> Pipeline:
    return make(words)


def test_guidance_for_each_image(pipe):
    scales = [3.0, 1.0, 8.0]
    together = pixels(pipe, seeds=[5, 5, 5], guidance_scale=scales)
    for picture, scale in zip(together, scales, strict=True):
        assert np.abs(picture - pixels(pipe, guidance_scale=scale)[0]).max() <= 1
    assert np.abs(together[0] - together[2]).max() > 2


def test_guidance_of_one_or_less_is_none(pipe):
    cond, uncond = pipe.encode(["a red seven"]), pipe.encode(["blue"])
    latents = [
        pipe.denoise(pipe.noise([5]), cond, other, steps=3, guidance_scale=scale)
        for other, scale in ((None, 7.5), (uncond, 1.0), (uncond, 0.0))
    ]
    for other in latents[1:]:
        np.testing.assert_array_equal(latents[0], other)


def test_strength_goes_from_the_picture_to_none_of_it(pipe):
    clean = pipe.encode_pictures(PICTURE[None] / np.float32(127.5) - 1)
    distances = []
    for strength in (0.1, 0.5, 1.0):
        cond = pipe.encode(["a red seven"])
        start = Start(clean, strength)
        out = pipe.denoise(
            pipe.noise([5]), cond, None, steps=10, start=start, sampler="ddim", guidance_scale=1.0
        )
        distances.append(float(jnp.abs(out - clean).mean()))
    assert distances == sorted(distances) and distances[0] < 0.5 * distances[-1]


@pytest.mark.parametrize("kind", ["1x1", "transparent", "turned", "16 bits", "palette"])
def test_pictures_of_every_kind_are_started_from_as_they_are_seen(pipe, tmp_path, kind):
    file, seen, exif = tmp_path / "given.png", Image.fromarray(PICTURE), Image.Exif()
    given = seen
    if kind == "1x1":
        given = Image.new("RGB", (1, 1), (200, 30, 40))
        seen = Image.new("RGB", (8, 8), (200, 30, 40))
    elif kind == "transparent":
        given = Image.new("RGBA", (8, 8), (0, 0, 255, 0))
        seen = Image.new("RGB", (8, 8), "white")
    elif kind == "turned":
        exif[0x0112] = 6  # a quarter turn
        seen = seen.transpose(Image.Transpose.ROTATE_270)
    elif kind == "16 bits":
        given = Image.fromarray(PICTURE[..., 0].astype(np.uint16) * 257)
        seen = Image.fromarray(PICTURE[..., 0])
    else:
        given = seen.quantize(16)
        seen = given.convert("RGB")
    given.save(file, exif=exif)
    how = {"strength": 0.7, "height": 8, "width": 8}
    found = pixels(pipe, image=file, **how)
    np.testing.assert_array_equal(found, pixels(pipe, image=seen, **how))
    assert (found != pixels(pipe, image=MASK, **how)).any()


def test_what_the_mask_protects_stays(pipe):
    clean = pipe.encode_pictures(PICTURE[None] / np.float32(127.5) - 1)
    mask = jnp.zeros((1, 4, 4, 1)).at[:, :, 2:].set(1)
    cond = pipe.encode(["a red seven"])
    for sampler in ("ddim", "euler", "dpmpp_2m"):
        start = Start(clean, 1.0, mask)
        out = pipe.denoise(pipe.noise([5]), cond, None, steps=5, start=start, sampler=sampler)
        np.testing.assert_array_equal(out[:, :, :2], clean[:, :, :2])
        assert np.abs(out[:, :, 2:] - clean[:, :, 2:]).max() > 0.1


def test_values_compile_nothing(pipe, untraced):
    call = CALL | {"image": PICTURE, "mask": MASK, "strength": 0.7, "steps": 5}
    pipe(**call)
    with compilations() as count:
        for change in (
            {"strength": 0.9},
            {"image": PICTURE[::-1]},
            {"mask": MASK[:, ::-1]},
            {"steps": 8},
            {"guidance_scale": [4.0]},
        ):
            pipe(**call | change)
            assert not count, (change, count)


def test_a_callback_sees_the_steps_that_are_taken(pipe):
    seen = []
    call = CALL | {"image": PICTURE, "strength": 0.5, "steps": 10, "sampler": "dpmpp_2m"}
    watched = pixels(pipe, **call, callback=lambda i, t, x: seen.append(i))
    assert seen == [5, 6, 7, 8, 9]
    np.testing.assert_array_equal(watched, pixels(pipe, **call))


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("pictures", [{}, {"image": PICTURE, "mask": MASK}], ids=["", "mask"])
def test_a_model_that_refines_itself_changes_nothing(pipe, sampler, pictures):
    call = CALL | {"steps": 10, "sampler": sampler} | pictures
    half = pipe.sample(**call, denoising_end=0.6)
    both = pipe.sample(**call, latents=half, denoising_start=0.6)
    np.testing.assert_allclose(both, pipe.sample(**call), rtol=1e-4, atol=1e-4)
    together = pipe(**call, refiner=pipe, refiner_start=0.6)
    np.testing.assert_array_equal(np.asarray(together[0]), pipe.decode_array(both)[0])


def test_long_prompts_are_read_whole(pipe):
    long = "a red seven on white, " * 5
    whole = pixels(pipe, prompts=long + "a green nine", chunks=None)
    other = pixels(pipe, prompts=long + "a blue three", chunks=None)
    assert np.abs(whole - other).max() > 2
    count = pipe.chunks([long])
    assert pipe.encode([long], chunks=count)["encoder_hidden_states"].shape == (1, 16 * count, 8)
    # A prompt that fits is the same either way.
    np.testing.assert_array_equal(pixels(pipe), pixels(pipe, chunks=None))


def test_weights_in_prompts(pipe):
    plain = pixels(pipe, prompts="a red seven")
    np.testing.assert_array_equal(plain, pixels(pipe, prompts="a (red:1.0) seven"))
    assert np.abs(plain - pixels(pipe, prompts="a (red:1.8) seven")).max() > 2
    assert np.abs(plain - pixels(pipe, prompts="a (red) seven")).max() > 0  # literal parentheses


def test_tiles(pipe):
    large = CALL | {"height": 32, "width": 24}
    whole = pixels(pipe, **large)
    pipe.vae_tile = 8
    try:
        tiled = pixels(pipe, **large)
        small = pixels(pipe, height=16, width=16)  # one tile
        latents = pipe.encode_pictures(RNG.uniform(-1, 1, (1, 32, 24, 3)).astype(np.float32))
        assert latents.shape == (1, 16, 12, 4)
    finally:
        pipe.vae_tile = 0
    assert whole.shape == tiled.shape and 0 < np.abs(whole - tiled).mean() < 20
    np.testing.assert_array_equal(small, pixels(pipe, height=16, width=16))


def test_a_linear_preview_has_the_colours():
    """On real scans, though it was fitted to random latents; the best linear map reaches .87."""
    pipe, rng = jaxsd.load("digits"), np.random.default_rng(0)
    scans = digits.load_scans("test")[0][:16]
    drawn = np.stack([2 * digits.colour_scan(scan, rng)[0] - 1 for scan in scans])
    latents = pipe.encode_pictures(drawn.astype(np.float32))
    preview, pictures = linear(pipe)(latents).astype(float), pipe.decode_array(latents)
    assert preview.shape == (16, 8, 8, 3)
    pooled = pictures.reshape(16, 8, 4, 8, 4, 3).mean((2, 4))
    assert np.corrcoef(preview.ravel(), pooled.ravel())[0, 1] > 0.7


def test_loras_are_live(words):
    pipe = make(words)
    plain = pixels(pipe)
    rng = np.random.default_rng(1)

    def lora(component: str) -> LoRA:
        layers = {}
        for name, shape in pipe.components[component].net.shapes.items():
            if name.endswith(("to_q.weight", "to_v.weight", "q_proj.weight", "fc1.weight")):
                down, up = rng.normal(size=(2, shape[1])), rng.normal(size=(shape[0], 2))
                layers[name] = Layer(down.astype(np.float32), up.astype(np.float32), 1.0)
        return LoRA({component: layers})

    pipe.add_lora(lora("unet"), 0.0)
    pipe.add_lora(lora("text_encoder"), 0.0)
    np.testing.assert_array_equal(plain, pixels(pipe))
    seen = [plain]
    with compilations() as count:
        for scales in ([0.7, 0.0], [0.0, 0.7], [0.7, 0.7]):
            pipe.lora_scales = scales
            seen.append(pixels(pipe))
            assert all(np.abs(seen[-1] - before).max() > 2 for before in seen[:-1])
        assert not count
    pipe.merge_loras()
    assert not pipe.loras and np.abs(pixels(pipe) - seen[-1]).max() <= 1


def test_a_new_word(words, tmp_path):
    """It means what it was taught, goes with the model when that is saved, and costs no other."""
    pipe = make(words)
    plain = pixels(pipe)
    vectors = np.random.default_rng(2).normal(size=(2, 8)).astype(np.float32)
    pipe.add_embedding(Embedding("<cat>", {"text_encoder": vectors}))
    np.testing.assert_array_equal(plain, pixels(pipe))
    taught = pixels(pipe, prompts="a red <cat>")
    assert np.abs(taught - pixels(make(words), prompts="a red <cat>")).max() > 2
    assert "<cat>" in refused(pipe.add_embedding, Embedding("<cat>", {"text_encoder": vectors}))
    narrow = Embedding("<dog>", {"text_encoder": vectors[:, :5]})
    assert "5" in refused(pipe.add_embedding, narrow)
    pipe.save(tmp_path / "model")
    again = jaxsd.load(tmp_path / "model")
    np.testing.assert_array_equal(taught, pixels(again, prompts="a red <cat>"))


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"image": PICTURE, "strength": 0.0}, "strength"),
        ({"image": PICTURE, "strength": 1.5}, "not 1.5"),
        ({"image": PICTURE, "strength": 0.1, "steps": 3}, "less than one step"),
        ({"mask": MASK}, "give the picture"),
        ({"image": [PICTURE, PICTURE, PICTURE], "seeds": [0, 1]}, "3 pictures for 2 seeds"),
        ({"image": "no-such.png"}, "no-such.png"),
        ({"control_images": [PICTURE]}, "1 control pictures for 0 ControlNets"),
        ({"denoising_end": 1.5}, "denoising_end must be from 0 to 1"),
        ({"denoising_end": 0.0}, "of 3 steps none is left"),
        ({"denoising_start": 1.0}, "of 3 steps none is left"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"guidance_rescale": 7.0}, "guidance_rescale"),
        ({"strength": 0.5}, "a picture that sampling starts from"),
        ({"image": []}, "no pictures"),
        ({"eta": 0.5, "sampler": "euler"}, "except with ddim, tcd"),
        ({"latents": jnp.zeros((2, 4, 4, 4)), "denoising_start": 0.5}, "[2, 4, 4, 4]"),
    ],
)
def test_requests_that_cannot_be(pipe, wrong, said):
    assert said in refused(pipe, **CALL | wrong)


def test_a_pixel_model_starts_from_grey_pictures():
    pipe = Pipeline(component(tiny.PIXEL_UNET, 3), Schedule(beta_schedule="cosine"))
    (image,) = pipe("7", image=PICTURE, strength=0.5, steps=4)
    assert image.size == (8, 8) and image.mode == "L"
    assert "for text" in refused(pipe, "7", clip_skip=1)


def test_a_tiny_vae_will_do(pipe, words):
    config = TinyVAEConfig(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    small = make(words)
    small.components["vae"] = component(config, 7)
    assert pixels(small, image=PICTURE).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"cross_attention_dim": 12}, "cross_attention_dim 12 where it has 8"),
        ({"block_out_channels": (8, 12)}, "block_out_channels"),
        ({"conditioning_embedding_out_channels": (4, 4, 4)}, "4 times"),
    ],
)
def test_a_controlnet_for_another_model(pipe, change, said):
    other = component(control_config(**change), 5)
    unet = component(WITH_MIDDLE, 0)
    with pytest.raises(JaxsdError, match=said):
        Pipeline(unet, pipe.schedule, controlnets=[other], **whats_left(pipe))


WITH_MIDDLE = dataclasses.replace(
    tiny.LATENT_UNET, mid_block_type="UNetMidBlock2DCrossAttn", in_channels=9
)


def control_config(**changes) -> ControlNetConfig:
    own = ControlNetConfig.from_unet(WITH_MIDDLE)
    fits = dataclasses.replace(own, conditioning_embedding_out_channels=(4, 4))
    return dataclasses.replace(fits, **changes)


def whats_left(pipe) -> dict:
    parts = {name: pipe.components[name] for name in ("vae", "text_encoder")}
    return parts | pipe.tokenizers


def test_a_controlnet_beside_an_inpainting_model(pipe):
    """It is given the latents without the mask, and its picture counts."""
    net = component(control_config(), 5)
    unet = component(WITH_MIDDLE, 0)
    pipe = Pipeline(unet, pipe.schedule, controlnets=[net], **whats_left(pipe))
    call = CALL | {"image": PICTURE, "mask": MASK}
    one, other = (pixels(pipe, **call, control_images=p) for p in (PICTURE, PICTURE[::-1]))
    assert np.abs(one - other).max() > 2
    np.testing.assert_array_equal(one, pixels(pipe, **call, control_images=[PICTURE]))


def test_models_that_edit_want_their_pictures(words):
    instruct = make(words, in_channels=8)
    assert "give it a picture" in refused(instruct, **CALL)
    assert "leave out the mask" in refused(instruct, **CALL, image=PICTURE, mask=MASK)
    inpaint = make(words, in_channels=9)
    assert "give it a picture and a mask" in refused(inpaint, **CALL)
    assert "give it a mask" in refused(inpaint, **CALL, image=PICTURE)
    depth = make(words, in_channels=5)
    assert "1 channels more" in refused(depth, **CALL, image=PICTURE)


def test_a_model_that_is_told_the_guidance(words):
    """One pass, whatever the scale; the scale still counts."""
    pipe = make(words, time_cond_proj_dim=16)
    call = CALL | {"negative_prompt": None}
    a, b = (pixels(pipe, **call | {"guidance_scale": scale}) for scale in (4.0, 8.0))
    assert np.abs(a - b).max() > 2
    assert "negative prompt" in refused(pipe, **CALL)
