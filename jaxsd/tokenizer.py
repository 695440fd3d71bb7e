"""CLIP's byte-pair tokenizer: prompts to ids, and a small one trained on a corpus of captions."""

import copy
import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxsd import clip_words
from jaxsd.clip_words import END, START, SUFFIX
from jaxsd.errors import JaxsdError
from jaxsd.prompts import parse_weights


class PromptTruncated(UserWarning):
    """A prompt had more tokens than the text tower reads; the message quotes what was cut."""


class Tokenizer:
    """The tokenizer of a `tokenizer/` folder (vocab.json and merges.txt, or tokenizer.json)."""

    def __init__(self, folder: str | Path):
        self.folder, self._origin = Path(folder), None
        names = {path.name for path in self.folder.glob("*")}
        if not ({"vocab.json", "merges.txt"} <= names or "tokenizer.json" in names):
            raise JaxsdError(f"{self.folder}: needs vocab.json and merges.txt, or tokenizer.json")
        try:
            self._words, self._special = clip_words.read(self.folder)
        except Exception as error:  # the libraries raise whatever their parsers raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise JaxsdError(f"{self.folder}: not a CLIP tokenizer ({first})") from None
        self._start, self._end, self._pad = (
            self._words.get_vocab()[self._special[name]] for name in ("bos", "eos", "pad")
        )

    def __len__(self) -> int:
        return self._words.get_vocab_size()

    @property
    def eos_token_id(self) -> int:
        """The id of the token that ends a text."""
        return self._end

    def __call__(self, prompts: Sequence[str], length: int = 77) -> np.ndarray:
        """Ids, int32 [n, length]: start, tokens, end, then padding.

        A longer prompt is cut to `length` with a `PromptTruncated` warning.
        """
        rows = [self._rows(self.ids(prompt), length, 1)[0] for prompt in prompts]
        return np.asarray(rows, np.int32).reshape(len(rows), length)

    def weighted(
        self, prompts: Sequence[str], length: int = 77, chunks: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids, int32, and their weights, float32, [n, chunks, length] both.

        Weights are read from the prompts (`jaxsd.prompts`). A prompt goes on from one chunk into
        the next; one that is too long for all of them is cut with a `PromptTruncated` warning.
        """
        ids = np.empty((len(prompts), chunks, length), np.int32)
        weights = np.ones((len(prompts), chunks, length), np.float32)
        room = length - 2  # beside start and end
        for row, weight_row, prompt in zip(ids, weights, prompts, strict=True):
            pieces = [(self.ids(text), weight) for text, weight in parse_weights(prompt)]
            row[:] = self._rows([i for piece, _ in pieces for i in piece], length, chunks)
            weighted = [w for piece, w in pieces for _ in piece][: chunks * room]
            inner = np.ones(chunks * room, np.float32)
            inner[: len(weighted)] = weighted
            weight_row[:, 1:-1] = inner.reshape(chunks, room)
        return ids, weights

    def chunks(self, prompts: Sequence[str], length: int = 77) -> int:
        """How many chunks of `length` the longest of the prompts takes."""
        counts = [
            sum(len(self.ids(text)) for text, _ in parse_weights(prompt)) for prompt in prompts
        ]
        return max(1, *(-(-count // (length - 2)) for count in counts)) if counts else 1

    def ids(self, text: str) -> list[int]:
        """The ids of a text's tokens, without start and end."""
        return self._ids(self._expanded(text))

    def _ids(self, text: str) -> list[int]:
        return self._words.encode(text, add_special_tokens=False).ids

    def with_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """A tokenizer that also knows these words, whose ids follow those of all others.

        Of <cat>, <cat>_1, <cat>_2, ... the first alone in a prompt stands for all of them, as in
        diffusers. JaxsdError if one of the words is a token already.
        """
        vocabulary = self._words.get_vocab()
        if known := [token for token in (*tokens, f"{tokens[0]}_1") if token in vocabulary]:
            raise JaxsdError(f"{known[0]!r} is a token already: choose another")
        other = copy.copy(self)
        other._origin = self  # whose folder may be a temporary one
        other._words = copy.deepcopy(self._words)
        other._words.add_tokens(list(tokens))
        return other

    def _expanded(self, text: str) -> str:
        """The text with all the tokens of each word that has several."""
        added = {token.content for token in self._words.get_added_tokens_decoder().values()}
        if not any(f"{token}_1" in added for token in added):
            return text
        for token in dict.fromkeys(map(self._words.id_to_token, self._ids(text))):
            if token in added and f"{token}_1" in added:
                count = next(i for i in range(1, len(added) + 1) if f"{token}_{i}" not in added)
                several = (token, *(f"{token}_{i}" for i in range(1, count)))
                text = text.replace(token, " ".join(several))
        return text

    def _rows(self, ids: list[int], length: int, chunks: int) -> list[list[int]]:
        """Start, tokens, end, padding: of as many chunks as asked for."""
        room = length - 2
        if len(ids) > chunks * room:
            cut = clip_words.decode(self._words, ids[chunks * room :])
            warnings.warn(
                f"the prompt has {len(ids) + 2} tokens, of which the model reads "
                f"{chunks * length} (all with --long-prompts, or chunks=None); "
                f"this was cut: {cut!r}",
                PromptTruncated,
                stacklevel=3,
            )
        rows = []
        for chunk in range(chunks):
            row = [self._start, *ids[chunk * room : (chunk + 1) * room], self._end]
            rows.append(row + [self._pad] * (length - len(row)))
        return rows

    def tokens(self, prompt: str) -> list[str]:
        """The pieces that a prompt is split into, start and end included."""
        ids = [self._start, *self.ids(prompt), self._end]
        return [str(self._words.id_to_token(i)) for i in ids]

    def save(self, folder: str | Path) -> None:
        """Copies the tokenizer's files into `folder`, with what `with_tokens` added."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        if self._origin is not None:
            clip_words.write_added(self._words, self._special, Path(folder))


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
    vocab = [*alphabet, *(c + SUFFIX for c in alphabet)]
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
    words = {w: [*w[:-1], w[-1] + SUFFIX] for w in counts}
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
