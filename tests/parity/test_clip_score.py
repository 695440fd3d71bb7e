"""Cosines of pictures and captions against transformers' CLIPModel and its image processor."""

import json

import numpy as np
import pytest
import tiny_torch
import torch
import transformers
from torch_reference import randomise, relative_error
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from jaxsd.errors import JaxsdError
from jaxsd.evaluation import clip_score
from jaxsd.evaluation.clip_score import load_judge, read_preprocessing

TOLERANCE = 1e-5
CAPTIONS = ["a red seven on white", "blue", "a green nine, tilted"]
rng = np.random.default_rng(0)
PICTURES = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((50, 71), (40, 40), (300, 33))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the Hub's: a model, its tokenizer, and how it takes pictures."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_torch.tokenizer(folder)
    tower = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        projection_dim=6,
        text_config=tower
        | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
    )
    model = randomise(transformers.CLIPModel(config), scale=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size=32)
    processor.save_pretrained(folder)
    return folder


def test_cosines(folder, report):
    model = transformers.CLIPModel.from_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    texts = tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt")
    seen = processor(PICTURES, return_tensors="np", input_data_format="channels_last")
    with torch.no_grad():
        out = model(pixel_values=torch.as_tensor(seen["pixel_values"]), **texts)
    expected = (out.text_embeds * out.image_embeds).sum(1)
    cosines = load_judge(folder).cosines(PICTURES, CAPTIONS)
    report(relative_error(cosines, expected), TOLERANCE)
    score = 100 * expected.clamp(min=0).mean().item()
    assert clip_score.clip_score(cosines) == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"size": {"shortest_edge": 40}, "crop_size": 30}])
@pytest.mark.parametrize("picture", PICTURES, ids=["wide", "square", "tall"])
def test_pictures_are_made_ready(tmp_path, options, picture):
    processor = CLIPImageProcessorPil(**options)
    processor.save_pretrained(tmp_path)
    ours = read_preprocessing(tmp_path)(picture)
    theirs = processor(picture, return_tensors="np", input_data_format="channels_last")
    expected = np.moveaxis(np.asarray(theirs["pixel_values"][0]), 0, -1)
    assert relative_error(ours, expected) <= 1e-6


def test_the_file_of_a_whole_processor_is_read(tmp_path):
    inner = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=16).to_dict()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    found = read_preprocessing(tmp_path)
    assert (found.size, found.crop) == (20, 16)


def test_grey_pictures_are_taken_as_grey(folder):
    judge = load_judge(folder)
    grey = PICTURES[0][:, :, :1]
    # Each alone: on some processors the place in a batch changes the last bits
    same = [judge.image_features([picture]) for picture in (grey, np.repeat(grey, 3, axis=2))]
    np.testing.assert_array_equal(*same)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resample": 2}, "resample=2"),
        ({"do_center_crop": False}, "do_center_crop=False"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"size": {"height": 3, "width": 4}}, "shortest edge"),
        ({"crop_size": 512}, "shortest edge"),
        ({"image_mean": [0, "x", 1]}, "image_mean"),
        ({"image_std": [1, 0, 1]}, "zero"),
        ({"image_std": None}, "image_std"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, changes, message):
    values = CLIPImageProcessorPil().to_dict() | changes
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(JaxsdError, match=message):
        read_preprocessing(tmp_path)


def test_a_folder_must_say_how_pictures_are_taken(tmp_path):
    with pytest.raises(JaxsdError, match="no preprocessor_config.json"):
        read_preprocessing(tmp_path)


def test_pictures_and_captions_must_pair(folder):
    with pytest.raises(JaxsdError, match="3 pictures, but 2 captions"):
        load_judge(folder).cosines(PICTURES, CAPTIONS[:2])
