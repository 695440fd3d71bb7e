"""Textual inversion against diffusers: the same ids and the same text embeddings."""

import copy

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch_reference import randomise, relative_error

from jaxsd.errors import JaxsdError
from jaxsd.models import CLIPTextConfig, CLIPTextModel
from jaxsd.nn import Net
from jaxsd.tokenizer import Tokenizer, train_tokenizer
from jaxsd.weights import embeddings
from jaxsd.weights.embeddings import Embedding

TOLERANCE = 1e-5
PROMPTS = ["a red <cat>", "<cat> and <cat>, red", "a red seven", "a <cat>", "hot<cat>dog", ""]
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "projection_dim": 8,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(["a red seven", "a blue three"], tmp_path_factory.mktemp("words"), 560)


@pytest.fixture(scope="module")
def theirs(words) -> diffusers.StableDiffusionPipeline:
    torch.set_num_threads(1)
    size = len(words)
    config = transformers.CLIPTextConfig(
        vocab_size=size + 3,  # more rows than tokens
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        **TEXT,
    )
    tokenizer = transformers.CLIPTokenizer.from_pretrained(words.folder)
    tokenizer.model_max_length = 24
    return diffusers.StableDiffusionPipeline(
        text_encoder=randomise(transformers.CLIPTextModel(config), scale=0.5),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        requires_safety_checker=False,
        **dict.fromkeys(("vae", "unet", "safety_checker", "feature_extractor")),
    )


def our_params(pipe):
    return {
        name if name.startswith("text_model.") else f"text_model.{name}": jnp.array(value.numpy())
        for name, value in pipe.text_encoder.state_dict().items()
    }


def vectors(count: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(count))


encode = jax.jit(Net(CLIPTextModel(CLIPTextConfig(**TEXT))).__call__)


def assert_same(pipe, words, params):
    """ids and text embeddings of ours are those of diffusers' pipeline."""
    converted = pipe.maybe_convert_prompt(PROMPTS, pipe.tokenizer)
    ids = pipe.tokenizer(converted, padding="max_length", max_length=24).input_ids
    ours = words(PROMPTS, 24)
    np.testing.assert_array_equal(ours, ids)
    with torch.no_grad():
        expected = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    error = relative_error(encode(params, ours), expected)
    print("relative error", error)
    assert error <= TOLERANCE


def a1111(value: torch.Tensor) -> dict:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.nn.Parameter(value)},
        "name": "<cat>",
        "step": 1000,
        "sd_checkpoint": None,
        "sd_checkpoint_name": "model",
    }


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", ["safetensors", "bin", "flat", "a1111"])
def test_the_same_text_embeddings(theirs, words, tmp_path, form, count):
    pipe, value = copy.deepcopy(theirs), vectors(count)
    if form == "a1111":
        file = tmp_path / "other-name.pt"
        torch.save(a1111(value), file)
    elif form == "safetensors":
        file = tmp_path / "learned_embeds.safetensors"
        safetensors.torch.save_file({"<cat>": value}, file)
    else:
        file = tmp_path / "learned_embeds.bin"
        torch.save({"<cat>": value[0] if form == "flat" else value}, file)
    pipe.load_textual_inversion(str(tmp_path), weight_name=file.name)
    read = embeddings.read(file)
    assert read.token == "<cat>"
    assert_same(pipe, *embeddings.add(read, words, our_params(theirs)))


@pytest.mark.parametrize("form", ["diffusers", "a1111"])
def test_what_we_write(theirs, words, tmp_path, form):
    pipe = copy.deepcopy(theirs)
    made = Embedding("<cat>", {"text_encoder": vectors(2).numpy()})
    file = embeddings.save(made, tmp_path, form)
    token = {} if form == "diffusers" else {"token": "<cat>"}
    pipe.load_textual_inversion(str(tmp_path), weight_name=file.name, **token)
    again = embeddings.read(file)
    assert again.token == "<cat>"
    assert_same(pipe, *embeddings.add(again, words, our_params(theirs)))


def test_both_towers_of_xl(theirs, words, tmp_path):
    """diffusers takes each tower's tensor by hand."""
    values = {"clip_l": vectors(2), "clip_g": vectors(3)}
    safetensors.torch.save_file(values, tmp_path / "<cat>.safetensors")
    read = embeddings.read(tmp_path / "<cat>.safetensors")
    for component, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        pipe = copy.deepcopy(theirs)
        pipe.load_textual_inversion(values[key], token="<cat>")
        assert_same(pipe, *embeddings.add(read, words, our_params(theirs), component))


def test_two_words(theirs, words, tmp_path):
    pipe, params, known = copy.deepcopy(theirs), our_params(theirs), words
    for token, count in (("<cat>", 2), ("Seven", 3)):  # the tokenizer makes all letters small
        safetensors.torch.save_file(
            {token: vectors(count)}, tmp_path / "learned_embeds.safetensors"
        )
        pipe.load_textual_inversion(str(tmp_path))
        known, params = embeddings.add(embeddings.read(tmp_path), known, params)
    assert_same(pipe, known, params)


def test_a_saved_tokenizer_opens_there(words, tmp_path):
    known = words.with_tokens(["<cat>", "<cat>_1"])
    known.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    expanded = "a <cat> <cat>_1, red"  # by diffusers, before its tokenizer is called
    assert theirs(expanded).input_ids[1:-1] == known.ids("a <cat>, red")
    again = Tokenizer(tmp_path)
    assert len(again) == len(known) == len(words) + 2
    for prompt in PROMPTS:
        assert again.ids(prompt) == known.ids(prompt)


def test_pickles_of_other_things_are_refused_by_name(tmp_path):
    """The first textual-inversion program kept a torch module, which only torch can build."""
    module = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors(2))})
    torch.save({"string_to_token": {"*": 265}, "string_to_param": module}, tmp_path / "old.pt")
    with pytest.raises(JaxsdError, match="ParameterDict, which is no tensor: refused"):
        embeddings.read(tmp_path / "old.pt")


def test_damaged_pickles(tmp_path):
    """300 of A1111's files with a bit turned or the end cut off."""
    torch.save(a1111(vectors(2)), tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    rng, file, read = np.random.default_rng(0), tmp_path / "a.pt", 0
    for i in range(300):
        at = rng.integers(0, len(data))
        turned = data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :]
        file.write_bytes(data[:at] if i % 5 == 0 else turned)
        try:
            found = embeddings.read(file)
        except JaxsdError as error:
            assert "\n" not in str(error)
            continue
        read += 1
        assert found.token and all(v.ndim == 2 and v.size for v in found.vectors.values())
    assert 0 < read < 300
