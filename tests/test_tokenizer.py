"""The tokenizer that is trained here is, to transformers, a CLIP tokenizer like any other."""

import json
import shutil
import warnings

import numpy as np
import pytest

from jaxsd.clip_words import END, START
from jaxsd.errors import JaxsdError
from jaxsd.tokenizer import PromptTruncated, Tokenizer, train_tokenizer

CORPUS = ["a red seven on a white background", "a blue three", "a green three, tilted", "seven 7s"]
PROMPTS = [
    "",
    "a red seven",
    "A Red  SEVEN\non white!",
    "three,three;seven-seven",
    "unseenwords zyx 4711",
    "naïve café – 七 🎨🎨",
    "don't we'll it's",
    "<|startoftext|> a <|endoftext|>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    train_tokenizer(CORPUS, folder, 560)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder))


def object_of(content: str, **others) -> dict:
    """A token as transformers has written it into configs over the years."""
    token = {"content": content, "lstrip": False, "normalized": True, "rstrip": False}
    return token | {"single_word": False} | others


NAMED = {"bos_token": object_of(START), "eos_token": object_of(END), "unk_token": object_of(END)}
TYPED = {name: token | {"__type": "AddedToken"} for name, token in NAMED.items()}
DECODER = {
    "0": object_of("!", normalized=False, special=True),
    "600": object_of("<cat>", normalized=False, special=False),
}
# Files that take the place of those that are written here; None for one that is not there.
LAYOUTS = {
    "as written here": {},
    "no configs": {"tokenizer_config.json": None, "special_tokens_map.json": None},
    "objects": {"tokenizer_config.json": TYPED, "special_tokens_map.json": NAMED},
    "padded by !": {
        "tokenizer_config.json": TYPED | {"pad_token": "!"},
        "special_tokens_map.json": NAMED | {"pad_token": "!"},
    },
    "a padding of its own": {
        "tokenizer_config.json": {"pad_token": "<pad>"},
        "special_tokens_map.json": None,
    },
    "added tokens": {"added_tokens.json": {"<cat>": 560, "<Dog>": 561}},
    "added tokens in the config": {
        "tokenizer_config.json": {"added_tokens_decoder": DECODER, "pad_token": "!"}
    },
    "more special tokens": {"tokenizer_config.json": {"additional_special_tokens": ["<cat>"]}},
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "tokenizer.json"])
@pytest.mark.parametrize(
    "prompt", [*PROMPTS, "hello! a <cat>, a<Cat>b, a <dog>", "ﬁ İ ß <|ENDOFTEXT|>"]
)
def test_folders_of_every_layout_are_read_as_transformers_reads_them(
    layout, prompt, folder, tmp_path
):
    from transformers import CLIPTokenizer

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name, values in LAYOUTS.get(layout, {}).items():
        if values is None:
            (copy / name).unlink()
        else:
            (copy / name).write_text(json.dumps(values), encoding="utf-8")
    if layout == "tokenizer.json":
        whole = CLIPTokenizer.from_pretrained(str(folder))
        whole.add_tokens(["<cat>"])
        copy = tmp_path / "whole"
        whole.save_pretrained(copy)
        assert not (copy / "vocab.json").exists()
    ours, theirs = Tokenizer(copy), CLIPTokenizer.from_pretrained(str(copy))
    assert len(ours) == len(theirs) and ours.eos_token_id == theirs.eos_token_id
    expected = theirs(prompt, padding="max_length", max_length=77)["input_ids"]
    assert ours([prompt])[0].tolist() == expected
    assert ours.tokens(prompt) == theirs.convert_ids_to_tokens(theirs(prompt)["input_ids"])


def test_new_words_are_saved_for_transformers_too(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    known = tokenizer.with_tokens(["<cat>", "<Dog>"])
    known.save(tmp_path / "copy")
    prompt = "a <cat> and a <dog>"
    again, theirs = (
        Tokenizer(tmp_path / "copy"),
        CLIPTokenizer.from_pretrained(str(tmp_path / "copy")),
    )
    assert len(again) == len(theirs) == len(tokenizer) + 2
    assert again.ids(prompt) == known.ids(prompt) == theirs(prompt)["input_ids"][1:-1]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("length", [77, 6])
@pytest.mark.filterwarnings("ignore::jaxsd.tokenizer.PromptTruncated")
def test_ids_as_transformers_pads_and_cuts_them(tokenizer, theirs, prompt, length):
    expected = theirs(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
    ids = tokenizer([prompt], length)
    assert ids.dtype == np.int32 and ids.shape == (1, length)
    assert ids[0].tolist() == expected


def test_the_vocabulary_is_laid_out_as_openais(tokenizer, folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokens = sorted(vocab, key=vocab.get)
    assert [vocab[token] for token in tokens] == list(range(len(tokens)))
    assert len(tokens) == len(tokenizer) <= 560
    assert tokens[:2] == ["!", '"'] and tokens[256:258] == ["!</w>", '"</w>']
    assert all(token.endswith("</w>") for token in tokens[256:512])
    assert tokens[-2:] == [START, END] and tokenizer.eos_token_id == len(tokens) - 1
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert ["".join(merge.split()) for merge in merges] == tokens[512:-2]


def test_words_of_the_corpus_become_one_token(tokenizer):
    pieces = tokenizer.tokens("a red seven")
    assert pieces == [START, "a</w>", "red</w>", "seven</w>", END]


def test_a_full_vocabulary_stops_early(tmp_path):
    """Every word is one token long before 10000 are learnt."""
    tokenizer = train_tokenizer(["red red", "blue"], tmp_path, 10_000)
    assert len(tokenizer) == 512 + 2 + 3 + 2
    assert len(train_tokenizer(CORPUS, tmp_path, 520)) == 520


def test_training_is_deterministic(folder, tmp_path):
    train_tokenizer(iter(CORPUS), tmp_path / "again", 560)
    train_tokenizer(CORPUS[::-1], tmp_path / "turned", 560)  # nor does the order count
    files = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in folder.iterdir()} == files
    for name in files:
        for other in ("again", "turned"):
            assert (tmp_path / other / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("prompt", ["zyx", "日本", "🎨", "é"])
def test_unseen_words_fall_back_to_their_bytes(tokenizer, prompt):
    pieces = tokenizer.tokens(prompt)[1:-1]
    assert END not in pieces  # which is also CLIP's token for the unknown
    assert len(pieces) == len(prompt.encode())


def test_what_was_cut_is_quoted(tokenizer):
    with pytest.warns(PromptTruncated, match="has 7 tokens, of which the model reads 5") as caught:
        ids = tokenizer(["a red seven on white"], 5)
    (warning,) = caught
    assert "'on white'" in str(warning.message)
    whole = tokenizer(["a red seven"], 5)
    np.testing.assert_array_equal(ids, whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["a red seven on white"], 7)  # just fits


def test_no_prompts(tokenizer):
    assert tokenizer([], 77).shape == (0, 77)


def test_saving_copies_the_files(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy")
    again = Tokenizer(tmp_path / "copy")
    np.testing.assert_array_equal(again(PROMPTS), tokenizer(PROMPTS))


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_folder_that_is_not_a_tokenizer(tokenizer, tmp_path, file):
    tokenizer.save(tmp_path)
    (tmp_path / file).write_text("{ broken")
    if file == "vocab.json":
        with pytest.raises(JaxsdError, match="not a CLIP tokenizer"):
            Tokenizer(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(JaxsdError, match="needs vocab.json and merges.txt"):
        Tokenizer(tmp_path)
