"""LoRAs merged for good, and found again in the difference between two models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from lora_examples import NETS, PLACES, Q, example, factors
from refusals import refused

from jaxsd import conversion
from jaxsd.cli import convert as convert_command
from jaxsd.components import load_parts
from jaxsd.errors import JaxsdError
from jaxsd.weights import lora, lora_files
from jaxsd.weights.lora_extract import extract

BASE = {name: tiny.parameters(net, seed) for seed, (name, net) in enumerate(NETS.items())}


def product(layer) -> np.ndarray:
    up, down = (np.asarray(x, np.float64) for x in (layer.up, layer.down))
    return layer.alpha / layer.rank * (up @ down.reshape(layer.rank, -1))


def added(made: lora.LoRA) -> dict[str, dict[str, jax.Array]]:
    """BASE and the LoRA's products, by NumPy."""
    changed = {name: dict(params) for name, params in BASE.items()}
    for component, layers in made.layers.items():
        for name, layer in layers.items():
            old = np.asarray(BASE[component][name], np.float64)
            new = old + product(layer).reshape(old.shape)
            changed[component][name] = jnp.asarray(new.astype(np.float32))
    return changed


def test_what_was_added_is_found_again():
    """Linear layers, 3x3 and 1x1 kernels, a text tower; rank for rank to 1e-5 of its size."""
    made = example(rank=2)
    found = extract(added(made), BASE, rank=2)
    places = {(c, name) for c, layers in found.lora.layers.items() for name in layers}
    assert places == set(PLACES)
    for component, name in PLACES:
        layer, want = found.lora.layers[component][name], product(made.layers[component][name])
        assert layer.rank == layer.alpha == 2
        assert np.abs(product(layer) - want).max() <= 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(  # balanced
            np.linalg.norm(layer.up), np.linalg.norm(layer.down), rtol=1e-5
        )
    assert found.kept == pytest.approx(1, abs=1e-6) and found.possible == 1


def test_a_lower_rank_keeps_the_largest_part():
    rng = np.random.default_rng(0)
    change = rng.normal(size=(8, 8))
    name = ("unet", Q)
    tuned = {"unet": BASE["unet"] | {Q: BASE["unet"][Q] + jnp.asarray(change, jnp.float32)}}
    base = {"unet": BASE["unet"]}
    values = np.linalg.svd(change, compute_uv=False)
    for rank in (1, 3, 8, 99):
        found = extract(tuned, base, rank)
        layer = found.lora.layers[name[0]][name[1]]
        assert layer.rank == min(rank, 8)
        share = np.sqrt((values[:rank] ** 2).sum() / (values**2).sum())
        assert found.kept == pytest.approx(share, rel=1e-5)
        left = np.linalg.norm(change - product(layer))
        assert left == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), rel=1e-4, abs=1e-5)


def test_what_no_lora_changes_is_counted():
    bias = next(name for name in BASE["unet"] if name.endswith("conv_in.bias"))
    tuned = added(example())
    tuned["unet"][bias] = tuned["unet"][bias] + 100
    table = "text_model.embeddings.token_embedding.weight"
    tuned["text_encoder"][table] = tuned["text_encoder"][table] + 1
    found = extract(tuned, BASE, 2)
    assert table not in found.lora.layers["text_encoder"] and 0 < found.possible < 0.5
    assert found.kept == pytest.approx(found.possible, rel=1e-6)


def test_models_that_do_not_go_together():
    tuned = added(example())
    for rank in (0, -3):
        assert f"must be at least 1, not {rank}" in refused(extract, tuned, BASE, rank)
    assert "the same in all that a LoRA" in refused(extract, BASE, BASE, 2)
    broken = tuned | {"unet": tuned["unet"] | {Q: tuned["unet"][Q] * jnp.nan}}
    assert "not finite" in refused(extract, broken, BASE, 2)
    k = Q.replace("to_q", "to_k")
    wide, wider = (
        {"unet": {k: jnp.zeros((8, width))}, "text_encoder": {}} for width in (768, 2048)
    )
    message = refused(extract, wider, wide, 2)
    assert "Stable Diffusion XL" in message and "Stable Diffusion 1.x" in message
    other = {"unet": wide["unet"] | {"conv_in.weight": jnp.zeros((8, 9, 3, 3))}, "text_encoder": {}}
    message = refused(extract, other, wide, 2)
    assert "both models are Stable Diffusion 1.x" in message and "unet.conv_in.weight" in message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tiny.pipeline(tiny.tokenizer(place / "words")).save(place / "base")
    return place / "base"


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_the_commands(folder, tmp_path, form, capsys):
    """Merged from two files with scales, extracted from what came out, and merged once more."""
    nets = {name: part.net for name, part in load_parts(folder).components.items()}
    first, second = example(1, 0), example(1, 7)
    files = [
        lora_files.save(one, tmp_path / f"{i}.safetensors", form)
        for i, one in enumerate((first, second))
    ]
    how = ["--lora", f"{files[0]}:0.5", "--lora", str(files[1])]
    convert_command.main([str(folder), str(tmp_path / "tuned"), *how])
    tuned, base = load_parts(tmp_path / "tuned"), load_parts(folder)
    for component, name in PLACES:
        change = 0.5 * product(first.layers[component][name])
        change += product(second.layers[component][name])
        got = tuned.components[component].params[name] - base.components[component].params[name]
        np.testing.assert_allclose(
            np.asarray(got).reshape(change.shape), change, atol=1e-5 * np.abs(change).max()
        )
    target = tmp_path / "again.safetensors"
    how = ["--extract-lora-from", str(folder), "--lora-rank", "2", "--lora-form", form]
    capsys.readouterr()
    convert_command.main([str(tmp_path / "tuned"), str(target), *how])
    assert "6 layers of rank 2 hold 100.0% of the change" in capsys.readouterr().out
    assert lora_files.read(target, {n: nets[n] for n in NETS}).layers.keys() == {*NETS}
    conversion.convert(folder, tmp_path / "twice", loras=[(target, 1.0)])
    for name, part in load_parts(tmp_path / "twice").components.items():
        for key, value in part.params.items():
            np.testing.assert_allclose(value, tuned.components[name].params[key], atol=3e-5)
    assert "there already" in refused(conversion.extract_lora, tmp_path / "tuned", target, folder)
    with pytest.raises(JaxsdError, match="takes no --orbax"):
        convert_command.main([str(folder), str(tmp_path / "x"), *how, "--orbax"])
    assert not (tmp_path / "x").exists()


def test_a_lora_of_another_family_is_merged_into_none(folder, tmp_path):
    k = Q.replace("to_q", "to_k")
    made = lora.LoRA({"unet": {k: factors((320, 768))}})
    file = lora_files.save(made, tmp_path / "a.safetensors")
    message = refused(conversion.convert, folder, tmp_path / "b", loras=[(file, 1.0)])
    assert "a LoRA for Stable Diffusion 1.x" in message and "text states of 8 channels" in message
    assert not (tmp_path / "b").exists()
