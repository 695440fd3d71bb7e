"""CLIP's byte-pair tokenizer: prompts to ids, and a small one trained on a corpus of captions."""

import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd.errors import JaxsdError

START, END = "<|startoftext|>", "<|endoftext|>"


class PromptTruncated(UserWarning):
    """A prompt had more tokens than the text tower reads; the message quotes what was cut."""


class Tokenizer:
    """The tokenizer of a `tokenizer/` folder (vocab.json and merges.txt, or tokenizer.json)."""

    def __init__(self, folder: str | Path):
        # Imported here: transformers takes a second, and pixel models need no tokenizer.
        from transformers import CLIPTokenizer

        self.folder = Path(folder)
        names = {path.name for path in self.folder.glob("*")}
        if not ({"vocab.json", "merges.txt"} <= names or "tokenizer.json" in names):
            raise JaxsdError(f"{self.folder}: needs vocab.json and merges.txt, or tokenizer.json")
        try:
            # Any, because the class takes its methods from whichever backend is installed
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(
                str(self.folder), local_files_only=True
            )
        except Exception as error:  # the libraries raise whatever their parsers raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise JaxsdError(f"{self.folder}: not a CLIP tokenizer ({first})") from None

    def __len__(self) -> int:
        return len(self._tokenizer)

    @property
    def eos_token_id(self) -> int:
        return int(self._tokenizer.eos_token_id)

    def __call__(self, prompts: Sequence[str], length: int = 77) -> np.ndarray:
        """Ids, int32 [n, length]: start, tokens, end, then padding.

        A longer prompt is cut to `length` with a `PromptTruncated` warning.
        """
        rows = []
        for prompt in prompts:
            ids = self._tokenizer(prompt, verbose=False)["input_ids"]
            if len(ids) > length:
                cut = self._tokenizer.decode(ids[length - 1 : -1])
                warnings.warn(
                    f"the prompt has {len(ids)} tokens, of which the model reads {length}; "
                    f"this was cut: {cut!r}",
                    PromptTruncated,
                    stacklevel=2,
                )
                ids = [*ids[: length - 1], self._tokenizer.eos_token_id]
            rows.append(ids + [self._tokenizer.pad_token_id] * (length - len(ids)))
        return np.asarray(rows, np.int32).reshape(len(rows), length)

    def tokens(self, prompt: str) -> list[str]:
        """The pieces that a prompt is split into, start and end included."""
        return self._tokenizer.convert_ids_to_tokens(self._tokenizer(prompt)["input_ids"])

    def save(self, folder: str | Path) -> None:
        """Copies the tokenizer's files into `folder`."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


def train_tokenizer(corpus: Iterable[str], folder: str | Path, vocab_size: int) -> Tokenizer:
    """Learns byte-pair merges from a corpus and writes `folder` with CLIP's files.

    The vocabulary is laid out as OpenAI's: 256 bytes, 256 bytes that end a word, the merges in
    the order learnt, the start and the end token. At most `vocab_size` ids; fewer when every word
    of the corpus has become one token.
    """
    counts = Counter(
        word for line in corpus for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", line.lower())
    )
    alphabet = _byte_characters()
    vocab = [*alphabet, *(c + "</w>" for c in alphabet)]
    merges = _learn_merges(counts, vocab_size - len(vocab) - 2)
    vocab += ["".join(pair) for pair in merges] + [START, END]

    folder = Path(folder)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    files = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise JaxsdError(f"cannot write {folder}: {error.strerror or error}") from None
    return Tokenizer(folder)


def _byte_characters() -> list[str]:
    """A printable character for each of the 256 bytes, in GPT-2's and CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def _learn_merges(counts: Counter[str], most: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016): the commonest pair becomes one symbol, again."""
    words = {w: [*w[:-1], w[-1] + "</w>"] for w in counts}
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in zip(symbols, symbols[1:], strict=False):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties by name: deterministic
        merges.append(best)
        for word, symbols in words.items():
            merged, i = [], 0
            while i < len(symbols):
                if tuple(symbols[i : i + 2]) == best:
                    merged.append("".join(best))
                    i += 2
                else:
                    merged.append(symbols[i])
                    i += 1
            words[word] = merged
    return merges
