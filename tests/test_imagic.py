"""Imagic: both stages, the edit they leave, and what lies between a picture and a prompt."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from refusals import refused
from toy import assert_same_state

import jaxsd
from jaxsd.cli import sample as sample_cli
from jaxsd.cli.recipes.imagic import Imagic
from jaxsd.cli.train import run as run_recipe
from jaxsd.components import Component, make_net
from jaxsd.editing import imagic
from jaxsd.editing.editor import Editor
from jaxsd.objectives import Objective
from jaxsd.objectives.imagic import Embedding, Tuning, new_edit
from jaxsd.pipeline import Pipeline
from jaxsd.training import Options
from jaxsd.weights import edits, lora_files

PROMPT, OTHER = "a red seven", "a blue three"
KEY = jax.random.key(3)
QUICK = {"steps": 2, "guidance_scale": 2.0}  # of sampling
SHORT = {
    "embedding_steps": 3,
    "steps": 3,
    "batch_size": 8,
    "embedding_learning_rate": 1e-2,
    "learning_rate": 1e-3,
    "measure_every": 2,
    "save_every": 1,
    "log_every": 1,
    "strip_seeds": 1,
    "etas": (0.0, 1.0),
    "sampling_steps": 2,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def saved(words, folder, **options):
    made = tiny.text_to_image(words, **options)
    made.export(tiny.parameters(made.net), folder)
    return folder


@pytest.fixture(scope="module")
def base(words, tmp_path_factory):
    """The folder of a model that predicts v."""
    return saved(words, tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "seven.png"
    array = np.kron(np.random.default_rng(0).integers(0, 255, (2, 2, 3)), np.ones((8, 8, 1)))
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def recipe(base, picture, workdir, **options) -> Imagic:
    known = {"model": str(base), "image": picture, "prompt": PROMPT, "workdir": workdir}
    return Imagic(**SHORT | known | options)


def hashes(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(base, picture, tmp_path_factory):
    """A workdir after both stages, the UNet tuned."""
    workdir, before = tmp_path_factory.mktemp("whole"), hashes(base)
    run_recipe(recipe(base, picture, workdir))
    assert hashes(base) == before
    return workdir


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def shape(file):
    with Image.open(file) as opened:
        return np.asarray(opened).shape


# --- The stages ------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_stages_leave_an_edit_curves_and_pictures(whole):
    first, last = edits.read(whole / "embedding" / "model"), edits.read(whole / "model")
    assert first.prompt == last.prompt == PROMPT and last.base is None and first.base is not None
    for name, array in last.optimised.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, first.optimised[name])
        np.testing.assert_array_equal(last.target[name], first.target[name])
        assert 1e-3 < np.abs(array - last.target[name]).max() < 0.1  # three updates of 1e-2
    for folder in (whole / "embedding", whole):
        assert [s for s, r in rows(folder).items() if "reconstruction/loss" in r] == [2, 3]
        assert shape(folder / "samples" / "preview_0000003.png") == (8, 4 * 8 + 3, 3)
        assert "ended after step 3" in (folder / "report.html").read_text()
    assert '<a href="embedding/report.html">' in (whole / "report.html").read_text()
    assert shape(whole / "strip.png") == (8, 3 * 8 + 2, 3)
    tuned, plain = (jaxsd.load(f) for f in (whole / "model", first.base["model"]))
    for name in ("vae", "text_encoder"):
        assert_same_state(tuned.params[name], plain.params[name])
    pairs = [(tuned.params["unet"][n], p) for n, p in plain.params["unet"].items()]
    assert 0 < max(float(jnp.abs(a - b).max()) for a, b in pairs) < 0.01


@pytest.mark.slow
def test_a_killed_one_goes_on_to_the_same_bits(whole, base, picture, tmp_path):
    """In the second stage, after its first checkpoint; the first one is left as it is."""
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for gone in ("model", "checkpoints/2", "checkpoints/3"):
        shutil.rmtree(cut / gone)
    run_recipe(recipe(base, picture, cut))
    got, want = (hashes(folder / "model") for folder in (cut, whole))
    assert [p.relative_to(cut) for p in got] == [p.relative_to(whole) for p in want]
    assert [*got.values()] == [*want.values()]
    losses = [{step: row["loss"] for step, row in rows(w).items()} for w in (cut, whole)]
    assert losses[0] == losses[1]


def test_each_stage_has_its_own_options(base, picture, tmp_path):
    options = {"embedding_target": 0.5, "target": 1e-5, "lora_rank": 2, "freeze": ("*.bias",)}
    first, second = recipe(base, picture, tmp_path, **options).stages()
    assert (first.learning_rate, second.learning_rate) == (1e-2, 1e-3)
    assert (first.stop_when, second.stop_when) == (
        "reconstruction/loss<0.5",
        "reconstruction/loss<1e-05",
    )
    assert (first.freeze, second.freeze) == ((), ("*.bias",))  # names of the UNet
    assert (first.lora_rank, second.lora_rank) == (0, 2)
    rates = [recipe(base, picture, tmp_path, learning_rate=0.0, lora_rank=r) for r in (0, 2)]
    assert [each.learning_rate for each in rates] == [5e-7, 1e-4]


def test_no_stage_knows_dropout(plain):
    pipe, edit = plain
    config = dataclasses.replace(pipe.unet.config, dropout=0.3)
    leaky = Component(make_net(config), pipe.params["unet"])
    parts = pipe.components | {"unet": leaky} | pipe.tokenizers
    stage = Tuning(Pipeline(schedule=pipe.schedule, **parts), edit)
    assert isinstance(stage, Objective) and stage.net.config.dropout == 0
    assert stage.pipeline(stage.init(KEY)).unet.config.dropout == 0.3  # as the folder will say


@pytest.mark.slow
def test_many_pictures_with_the_same_programs(plain, picture):
    pipe, _ = plain
    before = dict(pipe.params["unet"])
    known = {"learning_rate": 3e-3, "warmup_steps": 0, "decay": "constant", "ema_decay": 0.0}
    options = Options(3, batch_size=8, **known)
    editor = Editor(pipe, options, options, rank=2)
    (first, errors), (other, _), (again, same) = (
        editor(picture, prompt) for prompt in (PROMPT, OTHER, PROMPT)
    )
    assert errors == same and errors.before > errors.embedding > errors.tuning
    np.testing.assert_array_equal(
        *(e.edit.optimised["encoder_hidden_states"] for e in (first, again))
    )
    assert all(pipe.params["unet"][n] is p for n, p in before.items())
    drawn = [imagic.sample(e, 1.0, 4, **QUICK) for e in (first, again, other)]  # each its own
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert [training._step._cache_size() for training in editor._trainings[8, 8]] == [1, 1]


# --- The edit --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(base):
    """A model, and an edit of it whose embedding is far from its prompt's."""
    pipe = jaxsd.load(base)
    edit = new_edit(pipe, PROMPT, (8, 8))
    moved = {name: array + np.float32(0.5) for name, array in edit.target.items()}
    return pipe, dataclasses.replace(edit, optimised=moved)


def test_eta_goes_from_the_picture_to_the_prompt(plain):
    pipe, edit = plain
    edited = imagic.Edited(pipe, edit)
    drawn = imagic.sample(edited, [0.0, 1.0, 0.5], [4, 4, 4], **QUICK)
    whole = pipe.sample(PROMPT, [4, 4, 4], **QUICK)
    np.testing.assert_array_equal(drawn[1], whole[1])  # untuned, that is ordinary sampling
    told = {name: jnp.asarray(array) for name, array in edit.optimised.items()}
    np.testing.assert_array_equal(drawn[0], pipe.sample("", [4, 4, 4], cond=told, **QUICK)[0])
    assert len({np.asarray(each).tobytes() for each in drawn}) == 3
    name, other = "encoder_hidden_states", pipe.encode([OTHER])
    mixed = edited.told([OTHER, PROMPT], [1.0, -0.5])[name]
    np.testing.assert_array_equal(mixed[0], other[name][0])
    beyond = 1.5 * edit.optimised[name] - 0.5 * edit.target[name]
    np.testing.assert_allclose(mixed[1], beyond[0], rtol=1e-5, atol=1e-6)


def test_stable_diffusion_xl(words, tmp_path):
    pipe = jaxsd.load(saved(words, tmp_path / "xl", xl=True))
    edit = new_edit(pipe, PROMPT, (8, 8))
    assert {n: a.shape for n, a in edit.target.items()} == {
        "encoder_hidden_states": (1, 16, 24),
        "text_embeds": (1, 6),
    }
    edits.save(dataclasses.replace(edit, base={"model": str(tmp_path / "xl")}), tmp_path / "edit")
    edited = imagic.load_edit(tmp_path / "edit")
    drawn = imagic.sample(edited, 1.0, 4, **QUICK)
    np.testing.assert_array_equal(drawn, pipe.sample(PROMPT, 4, **QUICK))
    assert Embedding(pipe, edit).init(KEY).keys() == edit.target.keys()


@pytest.mark.slow
def test_an_edit_of_factors_is_small_and_draws_the_same(base, picture, whole, tmp_path):
    stage = recipe(base, picture, whole, lora_rank=2).stages()[1]
    objective, _ = stage.build()
    rng = np.random.default_rng(1)
    params = {
        n: jnp.asarray(rng.normal(0, 0.5, v.shape), "float32")
        for n, v in objective.init(KEY).items()
    }
    objective.export(params, tmp_path / "model")
    held = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert held == [edits.FILE, edits.ARRAYS, lora_files.DIFFUSERS_FILE]
    edited = imagic.load_edit(tmp_path)
    tuned = dataclasses.replace(edited, pipe=objective.pipeline(params))
    got, want, plain = (
        e.pipe.decode_array(imagic.sample(e, 0.0, 1, **QUICK)).astype(int)
        for e in (edited, tuned, dataclasses.replace(edited, pipe=jaxsd.load(base)))
    )
    assert np.abs(got - want).max() <= 1 < np.abs(got - plain).max()


# --- The command -----------------------------------------------------------------------------


def command(*words):
    return sample_cli.run(sample_cli.tyro.cli(sample_cli.Options, args=[*map(str, words)]))


@pytest.mark.slow
def test_the_command_draws_an_edit(whole, tmp_path):
    quick = ("--steps", 2, "--seed", 4, "--guidance-scale", 2, "--out", tmp_path)
    [first] = command("--model", whole, *quick)
    [second] = command(PROMPT, "--model", whole / "model", "--imagic-eta", 0.7, *quick)
    [third] = command(OTHER, "--model", whole, "--imagic-eta", 1.2, *quick)
    with Image.open(first) as a, Image.open(second) as b, Image.open(third) as c:
        assert np.array_equal(a, b) and a.text == b.text | {"model": str(whole)}
        assert (a.text["prompt"], a.text["imagic_eta"], c.text["imagic_eta"]) == (
            PROMPT,
            "0.7",
            "1.2",
        )
        [want] = imagic.load_edit(whole).pipe.decode_array(
            imagic.sample(imagic.load_edit(whole), 1.2, 4, OTHER, **QUICK)
        )
        assert np.array_equal(c, want) and a.size == c.size == (8, 8)


@pytest.fixture(scope="module")
def kept(base, plain, tmp_path_factory):
    """A workdir with the edit alone, as the first stage leaves it."""
    workdir = tmp_path_factory.mktemp("kept")
    edits.save(dataclasses.replace(plain[1], base={"model": str(base)}), workdir / "model")
    return workdir


def test_what_the_commands_refuse(base, picture, kept, tmp_path):
    def asked(**options):
        return refused(run_recipe, recipe(base, picture, tmp_path / "w", **options))

    assert "reads no text" in asked(model="digits-ddpm")
    assert "distilled with its guidance" in asked(model="digits-lcm")
    assert "give the model to edit" in asked(model=None)
    assert "cannot read the picture" in asked(image=base)
    assert "clip_skip must be" in asked(clip_skip=9)
    assert "measure_every must be at least 1" in asked(measure_every=0)
    assert "etas are numbers" in refused(recipe, base, picture, tmp_path, etas=(float("nan"),))
    assert "at least 1" in refused(recipe, base, picture, tmp_path, strip_seeds=0)
    assert "multiples of 2" in asked(height=7, width=8)
    assert not (tmp_path / "w").exists()
    base_of = ("--out", tmp_path, "--model")
    assert "is no edit" in refused(command, PROMPT, *base_of, "digits", "--imagic-eta", 0.5)
    assert "leave out clip_skip" in refused(command, *base_of, kept, "--clip-skip", 1)
    assert "holds no edit" in refused(imagic.load_edit, base)
    assert "eta is a number" in refused(imagic.mix, edits.read(kept / "model"), float("nan"))


def damaged(folder, **changes):
    """An edit's JSON with other values; None takes one out."""
    values = json.loads((folder / edits.FILE).read_text()) | changes
    (folder / edits.FILE).write_text(json.dumps({n: v for n, v in values.items() if v != "gone"}))


def test_untrusted_edits_are_refused(kept, tmp_path):
    good = edits.read(kept / "model")

    def broken(change=None, **json_changes):
        shutil.rmtree(tmp_path / "edit", ignore_errors=True)
        edits.save(good, tmp_path / "edit")
        damaged(tmp_path / "edit", **json_changes)
        if change is not None:
            arrays = {f"{part}.encoder_hidden_states": value for part, value in change.items()}
            jaxsd.weights.save(arrays, tmp_path / "edit" / edits.ARRAYS)
        return refused(imagic.load_edit, tmp_path / "edit")

    assert "prompt is not text" in broken(prompt=3)
    assert "size is not" in broken(size=[8, -8])
    assert "size is not" in broken(size=[8, 1 << 40])
    assert "clip_skip is not" in broken(clip_skip=True)
    assert "base is neither" in broken(base={"model": "digits", "controlnets": "x"})
    assert "base is neither" in broken(base="digits")
    assert "not base, clip_skip, prompt, size" in broken(prompt="gone")
    assert "base model that" in broken(base={"model": "no such model"})
    assert "edit of another model" in broken(base={"model": "digits"})
    target = jnp.asarray(good.target["encoder_hidden_states"])
    fine = {"target": target, "optimised": target}
    assert "an edit is float32" in broken(fine | {"target": target.astype(jnp.bfloat16)})
    assert "NaN or infinity" in broken(fine | {"optimised": target.at[0, 0, 0].set(jnp.nan)})
    assert "differ in shape" in broken(fine | {"target": target[:, :3]})
    assert "not one row" in broken(fine | {"target": target[0]})
    assert "is of , not of" in broken({"target": target})
    assert "is of no edit" in broken({"other": target})
    (tmp_path / "edit" / edits.ARRAYS).write_bytes(b"nothing")
    assert "not a safetensors file" in refused(imagic.load_edit, tmp_path / "edit")
