"""Textual inversion: what is trained, how it begins, what it leaves, and what is refused."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from refusals import refused
from toy import assert_same_state, stopping_after

import jaxsd
from jaxsd import training
from jaxsd.cli.recipes.textual_inversion import TextualInversion as Recipe
from jaxsd.cli.train import main
from jaxsd.data.templates import TEMPLATES, captions
from jaxsd.objectives import Now, Objective
from jaxsd.objectives.textual_inversion import ROWS, TextualInversion
from jaxsd.weights import embeddings

KEY = jax.random.key(3)
TABLE = "text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def objective(words, xl=False, **changes) -> TextualInversion:
    base = tiny.text_to_image(words, xl, caption_dropout=0.0)
    base = dataclasses.replace(base, initial=tiny.parameters(base.net))
    return TextualInversion(base, **{"token": "<cat>", "initialize_from": "seven"} | changes)


@pytest.fixture(scope="module")
def model(words, tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny", words)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return tiny.save_pictures(tmp_path_factory.mktemp("pictures"))


# --- The objective ------------------------------------------------------------------------------


@pytest.mark.parametrize("xl", [False, True])
def test_at_first_the_word_means_what_it_begins_as(words, xl):
    """The network is told of a caption with the new word what it is told of one with the old."""
    made = objective(words, xl)
    params, base = made.init(KEY), made.base
    assert isinstance(made, Objective)
    assert params.keys() == {name + ROWS for name in base.towers.text}
    base.net, told = tiny.Spy(), []
    image = jnp.asarray(tiny.pictures(2))

    def look(tokenize, word, loss, params, aux):
        ids = tokenize([f"a {word}", f"a blue {word} on white"])
        loss(params, aux, {"image": image, "input_ids": jnp.asarray(ids)}, Now(KEY))
        told.append(base.net.conditioning)

    look(made.tokenize, "<cat>", made.loss, params, made.aux)
    look(base.towers.tokenize, "seven", base.loss, {}, base.aux)
    assert told[0].keys() == told[1].keys()
    jax.tree.map(np.testing.assert_array_equal, *told)


def test_every_vector_begins_as_the_words(words):
    made = objective(words, vectors=3)
    [row] = words.ids("seven")
    [rows] = made.init(KEY).values()
    np.testing.assert_array_equal(rows, [made.base.towers.params["text_encoder"][TABLE][row]] * 3)
    [ids] = made.tokenize(["a <cat>"])
    assert ids[0, 1:6].tolist() == [*words.ids("a"), *range(len(words), len(words) + 3),
                                    words.eos_token_id]  # fmt: skip


def test_in_half_precision_the_network_is_kept_in_it(words):
    unet = objective(words, dtype="bfloat16").aux["unet"]
    assert {value.dtype for value in unet.values() if value.ndim > 1} == {jnp.dtype("bfloat16")}
    assert {value.dtype for value in unet.values() if value.ndim == 1} == {jnp.dtype("float32")}


# --- In the training loop -----------------------------------------------------------------------

OPTIONS = ("--token", "<cat>", "--initialize-from", "seven", "--batch-size", "8")


def recipe(model, pictures, workdir, **options) -> Recipe:
    given = {"token": "<cat>", "initialize_from": "seven", "batch_size": 8, "steps": 4}
    return Recipe(model=str(model), data=str(pictures), workdir=workdir, **given | options)


@pytest.mark.slow
def test_only_the_rows_change_and_a_killed_training_goes_on(model, pictures, tmp_path):
    asked = recipe(model, pictures, tmp_path, vectors=2, save_every=1, learning_rate=0.01)
    made, make_batches = asked.build()
    made.preview = lambda params: None

    def run(name, batches):
        return training.train(made, batches, asked, tmp_path / name, {})

    whole = run("whole", make_batches)
    with pytest.raises(InterruptedError):
        run("cut", stopping_after(2, make_batches))
    assert_same_state(run("cut", make_batches), whole)
    assert whole.params.keys() == whole.ema.keys() == {"text_encoder" + ROWS}
    assert np.abs(whole.params["text_encoder" + ROWS] - made.init(KEY)["text_encoder" + ROWS]).min()


@pytest.mark.slow
def test_the_command(model, pictures, tmp_path):
    """Its files and its folder make the same picture, and of the model the new rows are new."""
    words = ("--model", model, "--data", pictures, "--workdir", tmp_path, "--steps", 4)
    words += (*OPTIONS, "--vectors", 2, "--whole-model", "--learning-rate", 0.01)
    main(["textual-inversion", *map(str, words)])
    folder = tmp_path / "model"
    word = embeddings.read(folder)
    again = embeddings.read(folder / "<cat>.safetensors")
    assert word.token == again.token == "<cat>" and again.vectors.keys() == {"text_encoder"}
    np.testing.assert_array_equal(again.vectors["text_encoder"], word.vectors["text_encoder"])
    preview = np.asarray(Image.open(tmp_path / "samples" / "preview_0000004.png"))
    assert preview.shape == (2 * 9 - 1, 4 * 9 - 1, 3) and preview.std() > 10

    whole, plain = jaxsd.load(folder), jaxsd.load(model)
    for name, component in plain.components.items():
        for key, value in component.params.items():
            got = whole.params[name][key]
            if key == TABLE:
                value = value[: len(plain.tokenizer)]  # beyond which the model has unused rows
                np.testing.assert_array_equal(got[len(value) :], word.vectors["text_encoder"])
                got = got[: len(value)]
            np.testing.assert_array_equal(got, value, key)
    plain.add_embedding(folder)
    both = [pipe("a blue <cat>", 0, steps=2)[0] for pipe in (whole, plain)]
    np.testing.assert_array_equal(*map(np.asarray, both))


# --- Captions -----------------------------------------------------------------------------------


def test_captions_are_drawn_of_the_templates(model, pictures, tmp_path):
    asked = recipe(model, pictures, tmp_path, template=("{}", "a {} on {}"))
    made, _ = asked.build()
    told = captions("<cat>", asked.template)
    assert told == ("<cat>", "a <cat> on <cat>")
    for workdir in (tmp_path / "a", tmp_path / "b"):
        own = dataclasses.replace(asked, workdir=workdir)
        examples = own.examples("pictures", made.base, str(pictures), told)
        drawn = [examples[i]["caption"] for i in range(60)]
        counts = [drawn.count(text) for text in told]
        assert sum(counts) == 60 and min(counts) > 15  # each in its turn, by chance
        assert drawn[:20] != drawn[20:40]
        seen = drawn if workdir.name == "a" else seen  # noqa: F821
    assert drawn == seen  # by the seed and the number alone
    assert examples[0]["image"].shape == (8, 8, 3)  # the model's own size
    for kind in TEMPLATES.values():
        assert all("<cat>" in text for text in captions("<cat>", kind))


# --- Refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"initialize_from": "hippopotamus"}, "'hippopotamus' it has as 12: h, i, p,"),
        ({"initialize_from": "red seven"}, "as 2: red</w>, seven</w>"),
        ({"initialize_from": ""}, "it has as 0: none"),
        ({"token": "my cat"}, "a word without blanks, slashes and parentheses, such as <cat>"),
        ({"token": "a/b"}, "'a/b' cannot be one"),
        ({"token": ""}, "'' cannot be one"),
        ({"token": "red"}, "'red' is a token already: choose another, such as <red>"),
        ({"vectors": 0}, "vectors must be at least 1, not 0"),
    ],
)
def test_words_that_cannot_be(words, changes, told):
    assert told in refused(objective, words, **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": None}, "give the model that is to be taught with --model"),
        ({"model": "digits-ddpm"}, "is no latent model: it has no VAE"),
        ({"model": "digits-lcm"}, "this UNet was distilled with its guidance (LCM)"),
        ({"template": ("a photo",)}, "'a photo' has no place for the token: write {} there"),
        ({"data": "digits"}, "digits are no pictures of one thing"),
        ({"data": "/nowhere"}, "/nowhere does not exist"),
        ({"resolution": 7}, "sides must be multiples of 2"),
        ({"min_size": 9}, "no usable picture among the 3"),
    ],
)
def test_what_the_recipe_refuses(model, pictures, tmp_path, changes, told):
    asked = dataclasses.replace(recipe(model, pictures, tmp_path), **changes)
    assert told in refused(asked.build)
