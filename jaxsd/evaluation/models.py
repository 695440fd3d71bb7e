"""Draws pictures from a model of digits and measures them (`report.py` says how)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.components import Component
from jaxsd.data import digits
from jaxsd.errors import JaxsdError
from jaxsd.evaluation import report
from jaxsd.evaluation.drawing import Sampling, draw
from jaxsd.evaluation.same_noise import Observer, Teacher
from jaxsd.pipeline import Pipeline
from jaxsd.tokenizer import Tokenizer


def is_pixel_model(pipe: Pipeline) -> bool:
    """Whether the model draws 8x8 scans (else 32x32 coloured pictures); JaxsdError if neither."""
    size = (*pipe.default_size, 3 if pipe.vae else pipe.latent_channels)
    if size == (8, 8, 1) and pipe.unet.config.projection_class_embeddings_input_dim == 10:
        return True
    if size == (32, 32, 3) and pipe.tokenizer is not None:
        return False
    raise JaxsdError(f"evaluate measures models of digits; this one makes {size[0]}x{size[1]} px")


def evaluate_model(pipe: Pipeline, how: Sampling, teacher: Teacher | None = None) -> report.Summary:
    """Mean and spread of every metric over the sampling seeds, and what a picture costs."""
    pixel, rows = is_pixel_model(pipe), []
    seen = Observer(pipe, how, teacher)
    for seed in how.sampling_seeds:
        if pixel:
            labels = np.arange(how.count) % 10
            drawn = np.concatenate([*seen.pictures([str(label) for label in labels], seed)])
            scans = drawn[..., 0] / np.float32(127.5) - 1
            row = report.evaluate_scans(scans, labels, seed)
        else:
            prompts, wanted = full_prompts(how.count, seed)
            drawn = np.concatenate([*seen.pictures(prompts, seed)])
            row = report.evaluate_pictures(drawn, wanted, seed)
        rows.append(row | seen.rmse())
    return report.summarise(rows) | seen.costs()


def full_prompts(count: int, seed: int) -> tuple[list[str], list[digits.Attributes]]:
    """Captions that name everything, over balanced digits, random colours and wordings."""
    rng = np.random.default_rng(seed)
    prompts = []
    while len(prompts) < count:
        stroke, background = rng.choice(digits.COLOUR_NAMES, size=2, replace=False)
        text = digits.caption(rng, len(prompts) % 10, str(stroke), str(background))
        if None not in digits.parse_caption(text):
            prompts.append(text)
    return prompts, [digits.parse_caption(text) for text in prompts]


def zero_shot(clip: Component, tokenizer: Tokenizer, seed: int = 0) -> dict[str, float]:
    """How often CLIP's nearest caption is right, on the 450 held-out scans in random colours.

    Ten captions name a digit, eight a stroke colour, eight a background colour; chance is .1,
    .125 and .125.
    """
    rng = np.random.default_rng(seed)
    scans, labels = digits.load_scans("test")
    drawn = [digits.colour_scan(scan, rng) for scan in scans]
    pictures = jnp.asarray(np.stack([2 * picture - 1 for picture, _, _ in drawn]))

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    image = unit(
        jax.jit(lambda p, x: clip.net(p, x, method="image_features"))(clip.params, pictures)
    )

    def accuracy(captions: Sequence[str], names: Sequence[str], truth: Sequence[str]) -> float:
        ids = jnp.asarray(tokenizer(captions))
        text = unit(clip.net(clip.params, ids, method="text_features"))
        said = np.asarray(jnp.einsum("ip,tp->it", image, text).argmax(1))
        return float(np.mean([names[i] == right for i, right in zip(said, truth, strict=True)]))

    words, colours = digits.DIGIT_WORDS, digits.COLOUR_NAMES
    return {
        "digit": accuracy(
            [f"the digit {word}" for word in words], words, [words[label] for label in labels]
        ),
        "stroke": accuracy([f"something {c}" for c in colours], colours, [d[1] for d in drawn]),
        "background": accuracy(
            [f"a {c} background" for c in colours], colours, [d[2] for d in drawn]
        ),
    }


def negative_prompt_shares(
    pipe: Pipeline, how: Sampling, prompt: str = "a seven"
) -> dict[str, dict[str, float]]:
    """For each colour: the share of strokes in it, without and with its name as negative prompt.

    `how.count` pictures each, with the same seeds, of a prompt that leaves the colour free.
    "digit" is the share in which the digit is still the one asked for. JaxsdError for a model that
    has no unconditional half.
    """
    if pipe.guidance_embedded:
        raise JaxsdError(
            "this model was distilled with its guidance and has no unconditional half: negative "
            "prompts can do nothing"
        )
    wanted = digits.parse_caption(prompt)[0]

    def look(negative: str) -> tuple[np.ndarray, float]:
        pictures = draw(pipe, [prompt] * how.count, how, how.sampling_seeds[0], negative) / 255
        scans, strokes, _ = digits.recover(pictures)
        return strokes, float((report.judges().predict(2 * scans - 1) == wanted).mean())

    free, digit = look("")
    shares = {"(none)": {"without": float("nan"), "with": float("nan"), "digit": digit}}
    for colour in digits.COLOUR_NAMES:
        strokes, digit = look(colour)
        shares[colour] = {
            "without": float((free == colour).mean()),
            "with": float((strokes == colour).mean()),
            "digit": digit,
        }
    return shares
