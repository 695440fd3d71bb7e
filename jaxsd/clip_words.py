"""CLIP's byte-pair vocabulary, read from the files of a `tokenizer/` folder as transformers does.

By the `tokenizers` library alone: transformers itself takes as long to import as all the rest of
the way to a picture.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

SUFFIX = "</w>"  # of what ends a word
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
START, END = "<|startoftext|>", "<|endoftext|>"
# In the order in which those that the vocabulary lacks get their ids
SPECIAL = {"bos": START, "eos": END, "unk": END, "sep": None, "pad": END}
SPECIAL |= {"cls": None, "mask": None}


def read(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The folder's tokenizer, and its special tokens by name: bos, eos, unk, pad, ...

    Raises whatever the files' parsers raise.
    """
    config, whole = _json(folder / "tokenizer_config.json"), _json(folder / "tokenizer.json")
    added = {int(i): _token(token) for i, token in config.get("added_tokens_decoder", {}).items()}
    if "added_tokens_decoder" not in config:
        said = _json(folder / "special_tokens_map.json")
        config |= {name: _token(value, True) for name, value in said.items()}
        named = {str(_token(config.get(f"{name}_token"))) for name in SPECIAL}
        for content, i in _json(folder / "added_tokens.json").items():
            is_special = content in named
            added[i] = AddedToken(content, normalized=not is_special, special=is_special)
        for values in whole.get("added_tokens", []):
            added[values["id"]] = _token(values)
    special: dict[str, str] = {}
    tokens = [added[i] for i in sorted(added)]
    # A name and an object for one content are two: the later one says how it is looked for
    seen = {(kind, token.content) for token in tokens for kind in (AddedToken, str)}
    for name, usual in SPECIAL.items():
        token = _token(config.get(f"{name}_token")) or usual
        if token is not None:
            special[name] = str(getattr(token, "content", token))
            if (type(token), special[name]) not in seen:
                seen.add((type(token), special[name]))
                tokens.append(_special(token))
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    tokens += map(_special, more.values() if isinstance(more, dict) else more)
    words = Tokenizer(_pieces(folder, whole, special["unk"]))
    words.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    words.decoder = decoders.ByteLevel()
    words.add_tokens(tokens)
    return words, special


def write_added(words: Tokenizer, special: Mapping[str, str], folder: Path) -> None:
    """Names all added tokens in the tokenizer_config.json of the folder that `words` came from."""
    added = words.get_added_tokens_decoder()
    told = {str(i): token.__getstate__() for i, token in sorted(added.items())}
    config = _json(folder / "tokenizer_config.json")
    config |= {f"{name}_token": content for name, content in special.items()}
    config["added_tokens_decoder"] = told
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def decode(words: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, special tokens included."""
    return words.decode(ids, skip_special_tokens=False).replace(SUFFIX, " ").strip()


def _pieces(folder: Path, whole: Mapping[str, Any], unknown: str) -> BPE:
    how = {"end_of_word_suffix": SUFFIX, "unk_token": unknown}
    if not whole:
        return BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), **how)
    model = whole["model"]
    merges: Any = [(*(m.split(" ") if isinstance(m, str) else m),) for m in model["merges"]]
    return BPE(vocab=model["vocab"], merges=merges, **how)


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _special(token: Any) -> AddedToken:
    token = AddedToken(token, special=True) if isinstance(token, str) else _token(token)
    token.special = True
    return token


def _token(value: Any, special: bool = False) -> Any:
    """A token that files describe as an object; others as they are."""
    if not isinstance(value, dict):
        return value
    values: Any = {name: v for name, v in value.items() if name not in ("__type", "id")}
    return AddedToken(**values | ({"special": True} if special else {}))
