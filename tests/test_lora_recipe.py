"""`train.py lora`: factors under the names that were asked for, and what is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
from refusals import refused
from safetensors.numpy import load_file

import jaxsd
from jaxsd.cli.recipes.lora import LoRA
from jaxsd.cli.train import main
from jaxsd.objectives.low_rank import LowRank
from jaxsd.objectives.text_to_image import TextToImage
from jaxsd.weights import lora_files


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(words, tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny", words)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return tiny.save_pictures(tmp_path_factory.mktemp("pictures"))


def recipe(model, pictures, workdir, **options) -> LoRA:
    return LoRA(model=str(model), data=str(pictures), workdir=workdir, **options)


def test_the_command_leaves_kohyas_names(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(TextToImage, "preview", lambda self, params: None)
    words = ("--model", model, "--data", pictures, "--workdir", tmp_path, "--steps", 2)
    words += ("--batch-size", 8, "--lora-rank", 2, "--lora-alpha", 3, "--learning-rate", 0.01)
    words += ("--lora-targets", "attention", "text-encoders", "--lora-format", "kohya")
    main(["lora", *map(str, words)])
    folder = tmp_path / "model"
    held = load_file(folder / lora_files.DIFFUSERS_FILE)
    assert {name.split("_")[1] for name in held} == {"unet", "te"}
    assert {name.rpartition(".")[2] for name in held} == {"weight", "alpha"}
    assert {float(value) for name, value in held.items() if name.endswith(".alpha")} == {3.0}
    base, merged = jaxsd.load(model), jaxsd.load(folder)
    plain = base("a red seven", 0, steps=2)[0]
    base.add_lora(folder)
    added, whole = (np.asarray(p("a red seven", 0, steps=2)[0], int) for p in (base, merged))
    assert np.abs(added - whole).max() <= 1 and np.abs(added - np.asarray(plain, int)).max() > 1


def test_what_is_trained(model, pictures, tmp_path):
    def built(**options) -> LowRank:
        return recipe(model, pictures, tmp_path, **options).build()[0]

    plain = built()
    assert plain.rank == plain.alpha == 8 and plain.form == "peft"
    assert all(".attn" in name for name in plain.changed)
    both = built(train_text_encoder=True)
    assert {n for n in both.changed if not n.startswith("text_encoder.")} == {*plain.changed}
    assert len(both.changed) > len(plain.changed)
    same = built(lora_targets=("attention", "text-encoders"))
    assert same.changed == both.changed
    part = built(train_text_encoder=True, lora_targets=("text_encoder.*.fc1.weight",))
    assert [name.rpartition(".mlp.")[2] for name in part.changed] == ["fc1.weight"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1, not 0: `text-to-image` trains"),
        ({"model": None}, "give the model that the factors are for with --model"),
        ({"lora_alpha": 0.0}, "lora_alpha must be above 0, not 0.0"),
        ({"lora_targets": ("conv",)}, "'conv' fits no linear layer"),
        ({"lora_targets": ()}, "name at least one of attention"),
    ],
)
def test_what_is_refused(model, pictures, tmp_path, changes, told):
    assert told in refused(dataclasses.replace(recipe(model, pictures, tmp_path), **changes).build)


def test_a_form_that_has_no_names_for_a_part(model, pictures, tmp_path):
    made, _ = recipe(model, pictures, tmp_path).build()
    told = refused(dataclasses.replace, made, form="kohya", component="vae")
    assert "kohya has no names for vae: save it as peft" in told
    assert "lora_format is peft or kohya, not 'ckpt'" in refused(
        recipe, model, pictures, tmp_path, lora_format="ckpt"
    )
