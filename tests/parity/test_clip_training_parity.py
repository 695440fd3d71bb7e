"""Fine-tuning CLIP: transformers' checkpoints in, its loss, and what it opens again."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from torch_reference import randomise, relative_error

from jaxsd.cli.recipes.clip import CLIP
from jaxsd.errors import JaxsdError
from jaxsd.objectives import Now

SIZE = 12
CAPTIONS = [*tiny.CAPTIONS, "white", "red", "seven on blue", "green"]
TOWER = {k: v for k, v in tiny.TOWER.items() if k != "projection_dim"} | {"projection_dim": 6}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as CLIPModel and CLIPProcessor leave it, with OpenAI's statistics of pixels."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.tokenizer(folder)
    words = transformers.CLIPTokenizer.from_pretrained(str(folder))
    end = words.eos_token_id
    text = {"vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": end} | TOWER
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config={"image_size": SIZE, "patch_size": 4} | TOWER,
        projection_dim=6,
    )
    torch.manual_seed(0)
    randomise(transformers.CLIPModel(config), 1, 0.2).save_pretrained(folder)
    side = {"height": SIZE, "width": SIZE}
    transformers.CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=side, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures with captions beside them; all captions differ."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def tuned(checkpoint, pictures, tmp_path_factory):
    """The objective of a fine-tuning, a batch for it, and its parameters."""
    recipe = CLIP(
        workdir=tmp_path_factory.mktemp("run"),
        initial=checkpoint,
        data=str(pictures),
        batch_size=len(CAPTIONS),
    )
    objective, make_batches = recipe.build()
    [batch] = make_batches(0, 1)
    return objective, batch, objective.init(jax.random.key(0))


def in_torch(folder, pictures, batch):
    """transformers' features and loss of the pictures' files, in the order of the batch."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    words = transformers.CLIPTokenizer.from_pretrained(folder)
    told = words(CAPTIONS, padding="max_length", max_length=16, return_tensors="np")["input_ids"]
    order = [int(np.flatnonzero((told == ids).all(1))[0]) for ids in batch["input_ids"]]
    images = [Image.open(pictures / f"{i}.png") for i in order]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        ids = torch.from_numpy(np.array(batch["input_ids"])).long()
        return model(ids, pixels, return_loss=True)


def ours(objective, params, batch):
    net, unit = objective.net, lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    image = objective.statistics(jnp.asarray(batch["image"]))
    loss = objective.loss(params, (), jax.tree.map(jnp.asarray, batch), Now(jax.random.key(0)))[0]
    text = net(params, jnp.asarray(batch["input_ids"]), method="text_features")
    return unit(text), unit(net(params, image, method="image_features")), loss


def test_features_and_loss_are_transformers(tuned, checkpoint, pictures, report):
    objective, batch, params = tuned
    theirs = in_torch(checkpoint, pictures, batch)
    text, image, loss = jax.jit(lambda p: ours(objective, p, batch))(params)
    report(relative_error(text, theirs.text_embeds))
    report(relative_error(image, theirs.image_embeds))
    report(relative_error(loss, theirs.loss))


def test_what_is_exported_opens_and_sees_pictures_as_before(tuned, checkpoint, pictures, tmp_path):
    objective, batch, params = tuned
    objective.export(params, tmp_path)
    before, after = (in_torch(f, pictures, batch) for f in (checkpoint, tmp_path / "clip"))
    torch.testing.assert_close(after.image_embeds, before.image_embeds, rtol=0, atol=0)
    torch.testing.assert_close(after.text_embeds, before.text_embeds, rtol=0, atol=0)
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "clip")
    assert processor(text=CAPTIONS[:1])["input_ids"][0][0] == processor.tokenizer.bos_token_id
    assert not (tmp_path / "tokenizer" / "model.safetensors").exists()


def test_a_training_from_noise_makes_its_tokenizer_of_the_captions(pictures, tmp_path):
    recipe = CLIP(workdir=tmp_path, data=str(pictures), batch_size=8, min_size=SIZE)
    objective, make_batches = recipe.build()
    [batch] = make_batches(0, 1)
    assert batch["image"].shape == (8, 32, 32, 3)
    assert objective.tokenizer.tokens("white")[1:-1] == ["white</w>"]
    assert len(objective.tokenizer.tokens("purple")) > 4  # of which no caption spoke
    assert recipe.build()[0].text == objective.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolution": 16}, "12x12 pixels alone"),
        ({"buckets": True}, "12x12 pixels alone"),
        ({"tokenizer": Path("elsewhere")}, "leave --tokenizer out"),
        ({"initial": None, "family": "digits-ddpm"}, "no pair of CLIP towers"),
        ({"initial": None, "tokenizer": Path("elsewhere")}, "elsewhere holds no vocabulary"),
    ],
)
def test_what_the_recipe_refuses(options, said, checkpoint, pictures, tmp_path):
    options = {"initial": checkpoint, "data": str(pictures), "batch_size": 8} | options
    with pytest.raises(JaxsdError, match=said):
        CLIP(workdir=tmp_path, min_size=SIZE, **options).build()


def test_a_checkpoint_must_say_how_it_sees_pictures(checkpoint, pictures, tmp_path):
    folder = tmp_path / "mute"
    shutil.copytree(checkpoint, folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(JaxsdError, match="preprocessor_config.json"):
        CLIP(workdir=tmp_path, initial=folder, data=str(pictures), batch_size=8).build()


def test_pictures_without_captions_are_refused(pictures, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(pictures, bare, ignore=shutil.ignore_patterns("*.txt"))
    with pytest.raises(JaxsdError, match="no captions"):
        CLIP(workdir=tmp_path, data=str(bare), batch_size=8, min_size=SIZE).build()
