"""Caches of latents: what is in them, made in one go or in several, and read in any order."""

import dataclasses
import json
import shutil

import albums
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from fsspec.registry import _registry as registry
from test_buckets import Bucket, bucket  # noqa: F401

from jaxsd import data, weights
from jaxsd.cli.recipes.encode import Encode
from jaxsd.cli.recipes.text_to_image import TextToImage
from jaxsd.components import Component
from jaxsd.data import files, latents, records
from jaxsd.data.latents import open_latents
from jaxsd.encoding import Group, Storage, encode, groups_of
from jaxsd.errors import JaxsdError
from jaxsd.hub import PRETRAINED
from jaxsd.towers import Towers

STORAGE = Storage("float32", shard_size=4, batch_size=4)
WIDE, SQUARE = (8, 16), (8, 8)
BAD = 3  # of the square ones: cannot be read


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return tiny.towers(tiny.tokenizer(tmp_path_factory.mktemp("tokenizer")))


def picture(size, i):
    rng = np.random.default_rng((*size, i))
    image = rng.uniform(-1, 1, (*size, 3)).astype(np.float32)
    return {"image": image, "caption": tiny.CAPTIONS[i % 3]}


def load_square(i):
    if i == BAD:
        raise JaxsdError(f"{i}.png cannot be decoded")
    return picture(SQUARE, i)


GROUPS = [
    Group(WIDE, 5, lambda i: picture(WIDE, i)),
    Group(SQUARE, 6, load_square),
]


@pytest.fixture(scope="module")
def cache(towers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    encode(towers, GROUPS, folder, STORAGE, {"data": "noise"})
    return folder


def moments_of(towers, image):
    mean, logvar = towers.moments(towers.params["vae"], jnp.asarray(image[None]))
    return np.asarray(mean[0]), np.asarray(logvar[0])


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cache_holds_the_moments_of_every_picture_and_each_caption_once(cache, towers):
    manifest = weights.read_json(cache / latents.MANIFEST)
    assert manifest["finished"] and manifest["pictures"] == 10
    assert manifest["buckets"] == [
        {"latents": [4, 4, 4], "pictures": [8, 8], "shards": [3, 2]},
        {"latents": [4, 8, 4], "pictures": [8, 16], "shards": [4, 1]},
    ]
    assert manifest["skipped"] == ["3.png cannot be decoded"]
    assert manifest["captions"] == [4]  # three, and the empty one
    assert manifest["text"] == {"encoder_hidden_states": [16, 8]}
    assert manifest["scaling_factor"] == towers.scaling_factor
    assert {k: manifest["made_of"][k] for k in ("vae", "text")} == towers.fingerprints()

    opened = open_latents(cache, seed=0, batch_size=2)
    kept = [(SQUARE, i) for i in range(6) if i != BAD] + [(WIDE, i) for i in range(5)]
    assert opened.captions[0]["caption"] == ""
    told = towers.states(towers.params, jnp.asarray(towers.tokenize(tiny.CAPTIONS[:3])))[
        "encoder_hidden_states"
    ]
    for number, (size, i) in enumerate(kept):
        group, row = (0, number) if number < 5 else (1, number - 5)
        record = opened.pictures[group][row]
        mean, logvar = moments_of(towers, picture(size, i)["image"])
        np.testing.assert_allclose(record["mean"], mean, atol=1e-5)
        np.testing.assert_allclose(record["logvar"], logvar, atol=1e-5)
        assert opened.caption(number) == tiny.CAPTIONS[i % 3]
        states = opened.captions[int(opened.caption_of[number])]["encoder_hidden_states"]
        np.testing.assert_allclose(states, told[i % 3], atol=1e-5)


def test_one_that_is_cut_off_goes_on_where_it_was(cache, towers, tmp_path):
    def interrupted(i):
        if i == 4:
            raise KeyboardInterrupt
        return load_square(i)

    folder = tmp_path / "cache"
    groups = [GROUPS[0], dataclasses.replace(GROUPS[1], load=interrupted)]
    with pytest.raises(KeyboardInterrupt):
        encode(towers, groups, folder, STORAGE, {"data": "noise"})
    there = {path.name for path in folder.iterdir()}
    assert there == {"cache.json", "4x4-00000.array_record", "4x4-00000.json"}
    with pytest.raises(JaxsdError, match="not finished"):
        open_latents(folder, 0, 2)

    def once(i):
        assert i >= 4, "the first shard was there already"
        return load_square(i)

    (folder / ".4x4-00001.array_record.0.tmp").write_bytes(b"of a process that was killed")
    groups = [GROUPS[0], dataclasses.replace(GROUPS[1], load=once)]
    encode(towers, groups, folder, STORAGE, {"data": "noise"})
    assert files_of(folder) == files_of(cache)

    def never(i):
        raise AssertionError("all of it was there")

    again = [dataclasses.replace(group, load=never) for group in groups]
    encode(towers, again, folder, STORAGE, {"data": "noise"})
    assert files_of(folder) == files_of(cache)


def test_a_folder_that_holds_something_else_is_refused(cache, towers):
    with pytest.raises(JaxsdError, match="data 'noise', now 'music'"):
        encode(towers, GROUPS, cache, STORAGE, {"data": "music"})
    with pytest.raises(JaxsdError, match="dtype 'float32', now 'float16'"):
        encode(towers, GROUPS, cache, dataclasses.replace(STORAGE, dtype="float16"))
    own = towers.fingerprints()
    other = changed(towers, "text_encoder", "text_model.final_layer_norm.bias")
    with pytest.raises(JaxsdError, match=f"text '{own['text']}', now"):
        encode(other, GROUPS, cache, STORAGE, {"data": "noise"})


def changed(towers, component, name):
    part = towers.components[component]
    params = part.params | {name: part.params[name] + 1}
    parts = towers.components | {component: Component(part.net, params)}
    return Towers(parts, towers.tokenizers)


def test_only_what_makes_latents_and_embeddings_counts_in_a_fingerprint(towers):
    own = towers.fingerprints()
    assert changed(towers, "vae", "decoder.conv_in.bias").fingerprints() == own
    encoder = changed(towers, "vae", "encoder.conv_in.bias").fingerprints()
    assert encoder["vae"] != own["vae"] and encoder["text"] == own["text"]


def test_a_training_refuses_latents_of_other_networks(cache, towers, tmp_path):
    recipe = TextToImage(workdir=tmp_path, data=str(cache), batch_size=2)
    prompts, _ = recipe._latents(towers)
    assert prompts[:3] == [tiny.CAPTIONS[0], tiny.CAPTIONS[1], tiny.CAPTIONS[2]]
    other = changed(towers, "vae", "encoder.conv_in.bias")
    wanted = [towers.fingerprints()["vae"], other.fingerprints()["vae"]]
    with pytest.raises(JaxsdError, match=f"vae {wanted[0]}, the model's is {wanted[1]}"):
        recipe._latents(other)


def test_batches_have_one_shape_and_an_epoch_every_picture_once(cache):
    opened = open_latents(cache, seed=1, batch_size=2)
    made = list(data.batches(opened, 2, 0, 10))
    assert {batch["mean"].shape for batch in made} == {(2, 4, 4, 4), (2, 4, 8, 4)}
    seen = [mean.tobytes() for batch in made for mean in batch["mean"]]
    assert {seen.count(mean) for mean in seen} == {2}  # ten pictures, twenty rows
    # A batch is the same wherever the training starts, and each process reads its rows
    for batch, same in zip(made[7:], data.batches(opened, 2, 7, 10), strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], same[name])
    parts = [list(data.batches(opened, 2, 0, 3, shard=(i, 2))) for i in range(2)]
    for batch, *rows in zip(made, *parts, strict=False):
        np.testing.assert_array_equal(np.concatenate([r["mean"] for r in rows]), batch["mean"])


def test_half_precision_is_near_and_what_it_cannot_hold_is_refused(cache, towers, tmp_path):
    values = np.array([1.0, 7e4], np.float32)
    with pytest.raises(JaxsdError, match="latents reach 7e.04, too large for float16: choose"):
        latents.narrow(values, "float16", "latents")
    assert latents.narrow(values, "float32", "latents").tolist() == [1.0, 7e4]
    with pytest.raises(JaxsdError, match="embeddings are not finite"):
        latents.narrow(np.array([np.nan], np.float32), "float32", "embeddings")

    encode(towers, GROUPS, tmp_path, dataclasses.replace(STORAGE, dtype="float16"))
    half, full = (open_latents(folder, 0, 2)[0] for folder in (tmp_path, cache))
    for name in full:
        assert half[name].dtype == np.float16
        np.testing.assert_allclose(half[name], full[name], rtol=2**-10, atol=1e-6)


def test_xl_is_told_sizes_and_both_orientations_are_kept_with_theirs(tmp_path):
    towers = tiny.xl_towers(tiny.tokenizer(tmp_path / "tokenizer"))
    albums.write_jsonl(tmp_path / "album", albums.album(8))
    options = data.PictureOptions(
        data=str(tmp_path / "album"), resolution=16, min_size=1, workdir=None
    )
    pictures = data.open_pictures(options, 0, 4)
    storage = Storage("float32", flip=True, shard_size=8, batch_size=8)
    encode(towers, groups_of(pictures), tmp_path / "cache", storage)
    opened = open_latents(tmp_path / "cache", seed=0, batch_size=8)
    turns = {}
    for example in (opened[i] for i in range(64)):
        assert example["text_embeds"].shape == (6,)
        size = tuple(example["original_size"])
        turns.setdefault(size, {})[example["mean"].tobytes()] = example
    assert {*turns} == {*albums.SIZES}
    for number, (height, width) in enumerate(albums.SIZES):
        plain, mirrored = (opened.pictures[0][2 * number + i] for i in range(2))
        assert {*turns[height, width]} == {plain["mean"].tobytes(), mirrored["mean"].tobytes()}
        image = pictures_of(pictures, number)
        for record, shown in ((plain, image), (mirrored, image[:, ::-1])):
            np.testing.assert_allclose(record["mean"], moments_of(towers, shown)[0], atol=1e-4)
        scaled = max(16, round(16 / min(height, width) * width))
        left, other = plain["sizes"][3], mirrored["sizes"][3]
        assert left == (scaled - 16) // 2 and left + other == scaled - 16
        assert plain["sizes"][[0, 1, 4, 5]].tolist() == [height, width, 16, 16]


def pictures_of(pictures, number):
    found = groups_of(pictures)[0].load(number)["image"]
    return found.astype(np.float32) / np.float32(127.5) - 1


def test_the_commands_that_make_and_read_a_cache(tmp_path, capsys):
    digits = PRETRAINED / "digits"
    options = {"vae": digits, "text_encoder": digits, "batch_size": 8, "shard_size": 8}
    with pytest.raises(JaxsdError, match="digits have no end: say with --count"):
        Encode(workdir=str(tmp_path / "none"), **options).run()
    with pytest.raises(JaxsdError, match="digit-scans have no captions"):
        Encode(workdir=str(tmp_path / "none"), data="digit-scans", count=1, **options).run()
    Encode(workdir=str(tmp_path / "latents"), count=16, **options).run()
    assert "16 pictures" in capsys.readouterr().out

    recipe = TextToImage(
        model="digits",
        data=str(tmp_path / "latents"),
        workdir=tmp_path / "run",
        batch_size=8,  # which all devices share
        zero_terminal_snr=True,
    )
    objective, make_batches = recipe.build()
    assert objective.cached and objective.schedule.rescale_betas_zero_snr
    shipped = weights.load(digits / "unet", objective.net)
    np.testing.assert_array_equal(objective.initial["conv_in.weight"], shipped["conv_in.weight"])
    (batch,) = make_batches(0, 1)
    elements = data.elements("digits", "train", 0)
    pictures = [elements[i] for i in range(16)]
    assert objective.preview_prompts == [picture["caption"] for picture in pictures[:8]]
    own = [moments_of(objective.towers, picture["image"])[0] for picture in pictures]
    for mean in batch["mean"]:
        assert min(np.abs(mean - one).max() for one in own) < 0.01  # in half precision
    epsilon = dataclasses.replace(recipe, prediction_type="epsilon")
    with pytest.raises(JaxsdError, match="zero_terminal_snr needs"):
        epsilon.build()
    pndm = dataclasses.replace(objective.schedule, class_name="PNDMScheduler")
    assert recipe.scheduled(pndm).class_name == "DDIMScheduler"  # PNDM knows no such option


def test_pictures_that_the_vae_cannot_halve_are_refused(towers, tmp_path):
    with pytest.raises(JaxsdError, match="7x8 have no latents: sides must be multiples of 2"):
        encode(towers, [Group((7, 8), 1, load_square)], tmp_path, STORAGE)


def test_shards_in_a_bucket_are_copied_once(cache, tmp_path, bucket, monkeypatch):  # noqa: F811
    monkeypatch.setitem(registry, "gs", Bucket)
    monkeypatch.setenv("JAXSD_CACHE", str(tmp_path))
    for name, raw in files_of(cache).items():
        epath.Path(f"gs://bucket/cache/{name}").write_bytes(raw)
    want, got = (open_latents(place, 0, 2) for place in (cache, "gs://bucket/cache"))
    np.testing.assert_array_equal(got[0]["mean"], want[0]["mean"])
    records._reader.cache_clear()  # as in another process
    monkeypatch.setattr(files, "open_file", None)
    np.testing.assert_array_equal(got[0]["mean"], want[0]["mean"])


def test_damage_is_told_in_one_line(cache, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    shard = folder / "4x4-00000.array_record"
    raw = bytearray(shard.read_bytes())
    raw[100:400] = bytes(300)
    shard.write_bytes(raw)
    with pytest.raises(JaxsdError, match="4x4-00000.array_record"):
        [open_latents(folder, 0, 2)[i] for i in range(10)]
    manifest = weights.read_json(folder / latents.MANIFEST)
    for broken, message in (
        ({"format": 99}, "not of latents that this version reads"),
        ({"buckets": [{}]}, "is damaged"),
        ({"buckets": manifest["buckets"][:1]}, "is of other pictures"),
    ):
        (folder / latents.MANIFEST).write_text(json.dumps(manifest | broken))
        with pytest.raises(JaxsdError, match=message):
            open_latents(folder, 0, 2)
