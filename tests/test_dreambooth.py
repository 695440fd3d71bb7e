"""DreamBooth: the loss of two halves, the class's pictures, the recipe, and what is refused."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from refusals import refused
from toy import assert_same_state

import jaxsd
from jaxsd.cli.recipes.dreambooth import DreamBooth as Recipe
from jaxsd.cli.train import run
from jaxsd.editing import class_pictures
from jaxsd.editing.class_pictures import Drawing
from jaxsd.objectives import Now
from jaxsd.objectives.dreambooth import PRIOR, DreamBooth
from jaxsd.objectives.text_to_image import TextToImage
from jaxsd.weights import lora_files

KEY = jax.random.key(3)
CLASS = "a seven"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(words, tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny", words)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return tiny.save_pictures(tmp_path_factory.mktemp("pictures"))


# --- The loss -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(words):
    """The objective, with a spy in the network's place, and a batch of the thing and the class."""
    base = tiny.text_to_image(words, caption_dropout=0.0)
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    ids = base.towers.tokenize(["a sks seven"] * 3 + [CLASS] * 3)
    image = tiny.pictures(6)
    batch = {"image": image[:3], "input_ids": ids[:3]}
    batch |= {PRIOR + "image": image[3:], PRIOR + "input_ids": ids[3:]}
    objective = DreamBooth(**fields, prior_weight=0.25)
    objective.net = tiny.Spy()
    return objective, {name: jnp.asarray(value) for name, value in batch.items()}


def test_the_loss_is_the_things_plus_the_weighted_classs(made):
    """By hand: every row's error, of what the spy says for the noise that was drawn."""
    objective, batch = made
    loss, logged = objective.loss({}, objective.aux, batch, Now(KEY))
    key_latent, _, key = jax.random.split(KEY, 3)
    key_t, key_eps, _ = jax.random.split(key, 3)
    order = [0, 3, 1, 4, 2, 5]  # the thing's and the class's rows in turn
    image, ids = (
        jnp.concatenate([batch[n], batch[PRIOR + n]])[jnp.asarray(order)]
        for n in ("image", "input_ids")
    )
    towers = objective.towers
    mean, logvar = towers.moments(towers.params["vae"], image)
    drawn = jax.random.normal(key_latent, mean.shape)
    x0 = np.asarray((mean + jnp.exp(logvar / 2) * drawn) * towers.scaling_factor, np.float64)
    eps = np.asarray(jax.random.normal(key_eps, x0.shape), np.float64)
    t = objective.schedule.random_times(key_t, 6, False)
    alpha, sigma = (
        np.asarray(a, np.float64)[:, None, None, None] for a in objective.schedule.alpha_sigma(t)
    )
    said = np.tanh(alpha * x0 + sigma * eps) + np.asarray(t)[:, None, None, None] / 1000
    errors = np.square(said - (alpha * eps - sigma * x0)).mean((1, 2, 3))
    own, prior = errors[[0, 2, 4]].mean(), errors[[1, 3, 5]].mean()
    np.testing.assert_allclose(logged["loss_instance"], own, rtol=1e-5)
    np.testing.assert_allclose(logged["loss_prior"], prior, rtol=1e-5)
    np.testing.assert_allclose(loss, own + 0.25 * prior, rtol=1e-5)
    states = towers.states(towers.params, ids)["encoder_hidden_states"]
    told = objective.net.conditioning["encoder_hidden_states"]
    np.testing.assert_allclose(told, states, atol=1e-6)


def test_without_the_class_it_is_fine_tuning(made):
    objective, batch = made
    batch = {n: value for n, value in batch.items() if not n.startswith(PRIOR)}
    plain = TextToImage.loss(objective, {}, objective.aux, batch, Now(KEY))
    assert_same_state(objective.loss({}, objective.aux, batch, Now(KEY)), plain)


# --- The class's pictures -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(model):
    return jaxsd.load(model)


HOW = Drawing(CLASS, seed=5, steps=2, guidance_scale=1.0, batch_size=2)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_they_are_drawn_by_their_number_and_what_is_missing_is_drawn_again(pipe, tmp_path):
    whole, cut, other = (tmp_path / name for name in ("whole", "cut", "other"))
    numbers = class_pictures.missing(whole, 5, CLASS)
    assert numbers == [0, 1, 2, 3, 4]
    done = []
    class_pictures.draw(pipe, whole, numbers, HOW, done.append)
    assert done == [2, 2, 1] and class_pictures.missing(whole, 5, CLASS) == []

    class Killed(Exception):
        pass

    def kill(count):
        raise Killed

    with pytest.raises(Killed):
        class_pictures.draw(pipe, cut, numbers, HOW, kill)
    assert class_pictures.missing(cut, 5, CLASS) == [2, 3, 4]
    (cut / "class-00000.png").unlink()
    class_pictures.draw(pipe, cut, class_pictures.missing(cut, 5, CLASS), HOW)
    a, b = pixels(whole), pixels(cut)
    assert [*a] == [*b] == [f"class-{i:05}.png" for i in range(5)]
    for name, picture in a.items():
        np.testing.assert_array_equal(b[name], picture)
    class_pictures.draw(pipe, other, [1, 3], dataclasses.replace(HOW, seed=6))
    kinds = {picture.tobytes() for picture in [*a.values(), *pixels(other).values()]}
    assert len(kinds) == 7  # no two alike

    with Image.open(whole / "class-00003.png") as opened:
        notes = opened.info
    want = pipe(CLASS, int(notes["seed"]), 2, 1.0)[0]
    assert notes["prompt"] == CLASS
    np.testing.assert_array_equal(a["class-00003.png"], np.asarray(want))


def test_pictures_of_ones_own_count(pictures, tmp_path):
    assert class_pictures.missing(pictures, 5, CLASS) == [0, 1]
    assert class_pictures.missing(pictures, 3, CLASS) == []
    assert class_pictures.missing(pictures, 0, CLASS) == []
    told = refused(class_pictures.missing, tmp_path, 0, CLASS)
    assert "holds no picture of the class, and none is to be drawn" in told


def test_pictures_of_another_prompt_are_not_taken_for_these(pipe, tmp_path):
    class_pictures.draw(pipe, tmp_path, [0], HOW)
    told = refused(class_pictures.missing, tmp_path, 1, "a three")
    assert "class-00000.png was drawn for 'a seven', not 'a three'" in told
    (tmp_path / "class-00000.png").write_bytes(b"no picture")
    assert "remove it, to have it drawn again" in refused(
        class_pictures.missing, tmp_path, 1, CLASS
    )


# --- The recipe ---------------------------------------------------------------------------------


def recipe(model, pictures, workdir, **options) -> Recipe:
    given = {"instance_prompt": "a sks seven", "batch_size": 8, "steps": 2}
    return Recipe(model=str(model), instance_data=str(pictures), workdir=workdir, **given | options)


PRIOR_OPTIONS = {
    "class_prompt": CLASS,
    "num_class_images": 3,
    "class_steps": 2,
    "class_guidance_scale": 1.0,
}


@pytest.mark.slow
def test_factors_of_unet_and_text_encoder_with_the_prior(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(DreamBooth, "preview", lambda self, params: None)
    asked = recipe(
        model,
        pictures,
        tmp_path / "run",
        **PRIOR_OPTIONS,
        token="sks",
        train_text_encoder=True,
        lora_rank=2,
        learning_rate=0.01,
    )
    run(asked)
    folder = tmp_path / "run"
    assert len(pixels(folder / "class")) == 3
    rows = (folder / "metrics.jsonl").read_text()
    assert "loss_instance" in rows and "loss_prior" in rows
    base, tuned = jaxsd.load(model), jaxsd.load(folder / "model")
    nets = {name: component.net for name, component in base.components.items()}
    lora = lora_files.read(folder / "model", nets)
    assert lora.layers.keys() == {"unet", "text_encoder"}
    for name, params in base.params.items():
        changed = {n for n, v in params.items() if not np.array_equal(v, tuned.params[name][n])}
        assert changed == lora.layers.get(name, {}).keys()


def test_a_dry_run_draws_nothing(model, pictures, tmp_path, capsys):
    run(recipe(model, pictures, tmp_path / "run", **PRIOR_OPTIONS, dry_run=True))
    assert not (tmp_path / "run").exists()
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    size = jaxsd.load(model).unet.size
    assert rows["parameters"] == rows["trained"] == f"{size:,}"


def test_batches_hold_both_halves(model, pictures, tmp_path):
    asked = recipe(model, pictures, tmp_path, **PRIOR_OPTIONS, class_data=pictures)
    asked.prepare()
    assert not list(pictures.glob("class-*"))  # there are enough
    objective, make_batches = asked.build()
    assert objective.preview_prompts == ("a sks seven", CLASS)
    first, second = make_batches(0, 2)
    for names, told in (("", "a sks seven"), (PRIOR, CLASS)):
        want = np.repeat(objective.towers.tokenize([told]), 8, 0)
        np.testing.assert_array_equal(first[f"{names}input_ids"], want)
        assert first[f"{names}image"].shape == (8, 8, 8, 3)
    [again] = make_batches(1, 2)
    assert_same_state(again, second)
    _, plain = recipe(model, pictures, tmp_path).build()
    assert not any(name.startswith(PRIOR) for name in next(plain(0, 1)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"token": "xyz"}, "'a sks seven' does not hold the token 'xyz'"),
        ({"token": "sk"}, "'a sks seven' does not hold the token 'sk'"),
        ({"token": "seven", **PRIOR_OPTIONS}, "class_prompt 'a seven' holds the token 'seven'"),
        ({"token": " "}, "token must not be empty"),
        ({"instance_prompt": ""}, "instance_prompt must not be empty"),
        ({"class_prompt": ""}, "class_prompt must not be empty"),
        ({"class_data": Path("x")}, "class_data needs a --class-prompt"),
        ({"num_class_images": 7}, "num_class_images needs a --class-prompt"),
        ({"prior_weight": 0.5}, "prior_weight needs a --class-prompt"),
        ({**PRIOR_OPTIONS, "prior_weight": -1.0}, "prior_weight must be at least 0, not -1.0"),
        ({**PRIOR_OPTIONS, "num_class_images": -1}, "num_class_images must be at least 0"),
        ({**PRIOR_OPTIONS, "class_batch_size": 0}, "class_batch_size must be at least 1"),
        ({**PRIOR_OPTIONS, "buckets": True}, "buckets: the thing's and the class's pictures"),
    ],
)
def test_what_is_refused_at_once(tmp_path, changes, told):
    assert told in refused(recipe, "digits", "data", tmp_path, **changes)


def test_defaults_are_those_of_teaching(tmp_path):
    asked = Recipe(instance_data="data", instance_prompt="a sks", workdir=tmp_path)
    assert (asked.batch_size, asked.warmup_steps, asked.decay) == (4, 0, "constant")
    assert (asked.resolution, asked.ema_decay, asked.lora_rank) == (0, 0.0, 0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({**PRIOR_OPTIONS, "num_class_images": 0}, "holds no picture of the class, and none is"),
        ({"model": None}, "give the model that is to be taught with --model"),
        ({"instance_data": "/nowhere"}, "/nowhere does not exist"),
        ({"lora_rank": -1}, "lora_rank must be at least 1, not -1"),
        ({"lora_rank": 2, "lora_targets": ("conv",)}, "'conv' fits no linear layer"),
    ],
)
def test_what_is_refused_before_training(model, pictures, tmp_path, changes, told):
    asked = dataclasses.replace(recipe(model, pictures, tmp_path / "run"), **changes)
    assert told in refused(run, asked)
    assert not (tmp_path / "run" / "config.json").exists()
