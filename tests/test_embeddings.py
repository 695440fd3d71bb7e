"""Textual inversion: files read and written, words taught to a tokenizer, and what is refused."""

import numpy as np
import pytest
import tiny
from lora_examples import write
from refusals import refused

from jaxsd.errors import JaxsdError
from jaxsd.inspection import inspect
from jaxsd.models import CLIPTextModel
from jaxsd.nn import Net
from jaxsd.tokenizer import Tokenizer
from jaxsd.weights import embedding_names, embeddings
from jaxsd.weights.embeddings import Embedding
from jaxsd.weights.headers import read_entries

TABLE = "text_model.embeddings.token_embedding.weight"
TOWER = Net(CLIPTextModel(tiny.TEXT))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    return tiny.tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def params(words):
    """A tower with more rows than the tokenizer has tokens."""
    assert len(words) < tiny.TEXT.vocab_size
    return tiny.parameters(TOWER)


def vectors(*shape) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def cat(count=2, **others) -> Embedding:
    return Embedding("<cat>", {"text_encoder": vectors(count, 8)} | others)


# --- Files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "form, made, name",
    [
        ("diffusers", cat(), "learned_embeds.safetensors"),
        ("a1111", cat(), "<cat>.safetensors"),
        ("sdxl", cat(text_encoder_2=vectors(3, 16)), "<cat>.safetensors"),
    ],
)
def test_round_trip(tmp_path, form, made, name, dtype):
    file = embeddings.save(made, tmp_path, form, dtype)
    assert file == tmp_path / name
    again = embeddings.read(tmp_path if form == "diffusers" else file)
    assert again.token == "<cat>" and again.vectors.keys() == made.vectors.keys()
    for component, value in made.vectors.items():
        np.testing.assert_array_equal(
            again.vectors[component], value.astype(again.vectors[component].dtype)
        )
    assert embeddings.read(file, token="dog").token == "dog"


def test_where_the_token_comes_from(tmp_path):
    one = {"sks": vectors(8)}  # one vector, flat
    assert embeddings.read(write(tmp_path / "a.safetensors", one)).token == "sks"
    assert embeddings.read(tmp_path / "a.safetensors").vectors["text_encoder"].shape == (1, 8)
    for key in ("emb_params", "*", "clip_l", "clip_g"):
        file = write(tmp_path / "my word.safetensors", {key: vectors(2, 8)})
        assert embeddings.read(file).token == "my word"
    two = {"text_encoders_0": vectors(2, 8), "text_encoders_1": vectors(2, 16)}
    found = embeddings.read(write(tmp_path / "b.safetensors", two)).vectors
    assert [found[name].shape for name in ("text_encoder", "text_encoder_2")] == [(2, 8), (2, 16)]


def test_description(tmp_path):
    def told(tensors):
        return embedding_names.describe(read_entries(write(tmp_path / "a.safetensors", tensors)))

    assert told({"<cat>": vectors(1024)}) == (
        "textual inversion, token <cat>, 1 vector, Stable Diffusion 2.x"
    )
    assert told({"clip_l": vectors(4, 768), "clip_g": vectors(4, 1280)}) == (
        "textual inversion, named as the file, 4 vectors, Stable Diffusion XL"
    )
    assert told({"conv.weight": vectors(8, 8, 3, 3)}) is None
    assert told({"a": vectors(2, 768), "b": vectors(2, 768)}) is None
    assert told({}) is None
    write(tmp_path / "a.safetensors", {"<cat>": vectors(768)})
    assert inspect(tmp_path / "a.safetensors").kind.startswith("textual inversion, token <cat>")


# --- Models ----------------------------------------------------------------------------------


def test_the_rows_follow_the_tokens(words, params):
    made = cat(3)
    known, changed = embeddings.add(made, words, params)
    assert len(known) == len(words) + 3 == len(changed[TABLE])
    np.testing.assert_array_equal(changed[TABLE][: len(words)], params[TABLE][: len(words)])
    ids = known.ids("a <cat>")
    np.testing.assert_array_equal(changed[TABLE][np.asarray(ids[1:])], made.vectors["text_encoder"])
    assert ids[0] == words.ids("a")[0]
    assert {name for name in params if changed[name] is not params[name]} == {TABLE}


def test_a_word_of_several_tokens(words):
    known = words.with_tokens(["<cat>", "<cat>_1"])
    first, second = len(words), len(words) + 1
    assert known.ids("<cat> <cat>") == [first, second] * 2
    assert known.ids("<cat>_1") == [second]
    assert known.tokens("<cat>")[1:-1] == ["<cat>", "<cat>_1"]
    ids, weighted = known.weighted(["a (<cat>:1.5)"], 8)
    assert ids[0, 0, 2:4].tolist() == [first, second]
    assert weighted[0, 0].tolist() == [1, 1, 1.5, 1.5, 1, 1, 1, 1]
    assert words.ids("<cat>") != [first]  # which stays as it was
    both = known.with_tokens(["<dog>"])
    assert both.ids("<dog> <cat>") == [len(words) + 2, first, second]


def test_a_word_is_taught_once(words, params):
    known = words.with_tokens(["<cat>"])
    assert "'<cat>' is a token already" in refused(known.with_tokens, ["<cat>"])
    assert "'red</w>' is a token already" in refused(words.with_tokens, ["red</w>"])
    several = words.with_tokens(["<cat>", "<cat>_1"])
    assert "token already" in refused(embeddings.add, cat(3), several, params)
    odd = words.with_tokens(["<cat>_1"])
    assert "'<cat>_1' is a token already" in refused(odd.with_tokens, ["<cat>"])


# --- Refused ---------------------------------------------------------------------------------


def test_vectors_of_another_family(words, params):
    made = Embedding("<cat>", {"text_encoder": vectors(1, 768)})
    message = refused(embeddings.add, made, words, params)
    assert (
        "has 768 channels (Stable Diffusion 1.x" in message
        and "this text tower 8 channels" in message
    )
    assert "no vectors for text_encoder_2" in refused(
        embeddings.add, cat(), words, params, "text_encoder_2"
    )
    small = params | {TABLE: params[TABLE][:9]}
    assert "do not belong together" in refused(embeddings.add, cat(), words, small)


@pytest.mark.parametrize(
    "tensors, told",
    [
        ({}, "is not a textual-inversion embedding"),
        ({"a": vectors(8), "b": vectors(8)}, "it holds a, b"),
        ({"clip_l": vectors(8), "text_encoders_0": vectors(8)}, "is not a textual-inversion"),
        ({"a": np.zeros((), "f4")}, "is F32 [], not vectors"),
        ({"a": np.zeros((0, 8), "f4")}, "is F32 [0, 8], not vectors"),
        ({"a": np.zeros((2, 2, 2), "f4")}, "not vectors"),
        ({"a": np.zeros((2, 8), "i8")}, "is I64"),
        ({" ": vectors(8)}, "give a token that is not empty"),
    ],
)
def test_what_is_no_embedding(tmp_path, tensors, told):
    assert told in refused(embeddings.read, write(tmp_path / "a.safetensors", tensors))


def test_forms_that_do_not_suit(tmp_path):
    both = cat(text_encoder_2=vectors(2, 16))
    for form, made in (("diffusers", both), ("a1111", both), ("sdxl", cat())):
        assert f"has no form {form!r}" in refused(embeddings.save, made, tmp_path, form)
    assert "there are diffusers, a1111 and sdxl" in refused(embeddings.save, cat(), tmp_path, "pt")
    elsewhere = tmp_path / "dog.safetensors"
    assert "'<cat>.safetensors'" in refused(embeddings.save, cat(), elsewhere, "a1111")
    slash = Embedding("a/b", cat().vectors)
    assert "file's name is the token" in refused(embeddings.save, slash, tmp_path, "a1111")
    assert "holds neither learned_embeds" in refused(embeddings.read, tmp_path)
    assert not list(tmp_path.iterdir())


def test_fuzz(tmp_path):
    """500 damaged files: read as vectors, or refused in one line."""
    rng, read = np.random.default_rng(0), 0
    both = cat(text_encoder_2=vectors(3, 16))
    wholes = [
        embeddings.save(cat(), tmp_path / "a").read_bytes(),
        embeddings.save(both, tmp_path / "b", "sdxl").read_bytes(),
    ]
    file = tmp_path / "c.safetensors"
    for i in range(500):
        data = wholes[i % 2]
        header = 8 + int.from_bytes(data[:8], "little")
        if i % 5 == 0:
            file.write_bytes(data[: rng.integers(0, len(data))])
        else:
            at = rng.integers(0, header)
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :])
        try:
            found = embeddings.read(file)
        except JaxsdError as error:
            assert "\n" not in str(error)
            continue
        read += 1
        assert found.token and all(v.ndim == 2 and v.size for v in found.vectors.values())
    assert 0 < read < 100  # the token's letters alone were damaged, or a name that means nothing
