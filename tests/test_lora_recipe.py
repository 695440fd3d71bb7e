"""`train.py lora`: factors under the names that were asked for, and what is refused."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused
from safetensors.numpy import load_file

import jaxsd
from jaxsd.cli.recipes.lora import LoRA
from jaxsd.cli.train import main
from jaxsd.objectives.low_rank import LowRank
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


def test_the_command(model, pictures, tmp_path, capsys):
    words = ("--model", model, "--data", pictures, "--workdir", tmp_path, "--batch-size", 8)
    words += ("--lora-targets", "*.attn2.to_q.weight", "--lora-rank", 2, "--dry-run")
    main(["lora", *map(str, words)])
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    shapes = jaxsd.load(model).unet.shapes
    sizes = [sum(shape) for name, shape in shapes.items() if name.endswith("attn2.to_q.weight")]
    assert sizes and rows["trained"] == f"{2 * sum(sizes):,}"


def test_it_leaves_kohyas_names(model, pictures, tmp_path):
    made, _ = recipe(
        model,
        pictures,
        tmp_path,
        lora_rank=2,
        lora_alpha=3.0,
        lora_targets=("attention", "text-encoders"),
        lora_format="kohya",
    ).build()
    rng = np.random.default_rng(0)
    start = made.init(jax.random.key(0))
    params = {n: jnp.asarray(v + rng.normal(size=v.shape), "float32") for n, v in start.items()}
    made.export(params, tmp_path / "model")
    held = load_file(tmp_path / "model" / lora_files.DIFFUSERS_FILE)
    assert {name.split("_")[1] for name in held} == {"unet", "te"}
    assert {name.rpartition(".")[2] for name in held} == {"weight", "alpha"}
    base = jaxsd.load(model)
    nets = {name: component.net for name, component in base.components.items()}
    read, want = lora_files.read(tmp_path / "model", nets).layers, made.lora(params).layers
    assert {c: layers.keys() for c, layers in read.items()} == {
        c: layers.keys() for c, layers in want.items()
    }
    for component, layers in want.items():
        for name, layer in layers.items():
            got = read[component][name]
            assert got.alpha == 3.0
            np.testing.assert_array_equal(got.down, layer.down)
            np.testing.assert_array_equal(got.up, layer.up)


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
