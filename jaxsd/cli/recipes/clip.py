"""`train.py clip`."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd.cli.recipes.common import Common, MakeBatches, remembering
from jaxsd.cli.recipes.evaluation import CLIPEvaluation
from jaxsd.cli.recipes.pictures import PictureData
from jaxsd.errors import JaxsdError

VOCABULARY = (  # the last is also what `train_tokenizer` writes last
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
CORPUS = 20_000  # captions that a tokenizer is made of, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIP(PictureData, CLIPEvaluation, Common):
    """The text tower, with a tokenizer of its own, against a picture tower."""

    data: str = "digits-in-groups"
    """Digits made by code (digits, digits-in-groups or digits-same-colours: how hard it is to tell
    captions apart), or captioned pictures: a folder, tar shards, Parquet, Arrow or ArrayRecord."""
    resolution: int = 0
    """Side of the square that pictures are scaled and cropped to: the picture tower's own, 0."""
    family: str = "digits"
    """Whose towers' shapes, if training starts from noise."""
    initial: Path | None = None
    """Start from another CLIP, with its tokenizer and its way of looking at pictures: a folder that
    transformers' CLIPModel opens, or the `model` of another CLIP training."""
    tokenizer: Path | None = None
    """A folder with a vocabulary, for a training from noise; by default one is made of the data's
    captions."""

    def build(self) -> tuple[object, MakeBatches]:
        from jaxsd import components, data, families
        from jaxsd.objectives.clip import CLIP as Objective

        if self.accumulate > 1:
            raise JaxsdError(
                "accumulate: the loss compares all pictures of a batch with all captions, not part "
                "by part; to save memory take --remat full"
            )
        if self.initial is None:
            family = families.get_family(self.family)
            text, vision = family.text_encoder, family.image_encoder
            if text is None or vision is None:
                raise JaxsdError(f"family {self.family!r} has no pair of CLIP towers")
            start: dict[str, Any] = {}
        else:
            if self.tokenizer is not None:
                raise JaxsdError("initial has a tokenizer: leave --tokenizer out")
            folder = _clip_folder(self.initial)
            clip = components.load_clip(folder)
            text, vision = clip.net.config
            start = {"initial": clip.params, "statistics": _statistics(folder)}
        dataset = self._open(vision.image_size)
        words, length = self._words(dataset, text)
        objective = Objective(text, vision, words, dtype=self.dtype, **start)
        tokenize = remembering(lambda captions: words(captions, length))
        return objective, lambda start, stop: data.batches(
            dataset, self.batch_size, start, stop, tokenize, self.rows(), self.num_workers
        )

    def evaluators(self, objective: Any) -> list[Any]:
        own = dataclasses.replace(self, resolution=objective.vision.image_size)
        return own.clip_evaluators(objective)

    def _open(self, size: int) -> Any:
        if self.buckets or self.resolution not in (0, size):
            raise JaxsdError(
                f"this picture tower reads {size}x{size} pixels alone: leave out --resolution and "
                "--buckets"
            )
        own = dataclasses.replace(self, resolution=size)
        return own.open_data(self.seed, self.batch_size, self.workdir)

    def _words(self, dataset: Any, text: Any) -> tuple[Any, int]:
        """The tokenizer, which is kept in the workdir, and how many tokens of captions are read."""
        from jaxsd import data, processes
        from jaxsd.data.digits import all_captions
        from jaxsd.tokenizer import Tokenizer

        place = self.workdir / "tokenizer"

        def write() -> None:
            self._write_vocabulary(place, dataset, text.vocab_size)

        # A dry run has a folder of its own in each process, which no other machine may see
        write() if self.dry_run else processes.first(write)
        tokenizer = Tokenizer(place)
        if self.data not in data.SOURCES:
            return tokenizer, text.max_position_embeddings
        # The text tower is causal and read at the end token, so padding beyond the longest caption
        # would cost four fifths of its time and change no gradient.
        used = (tokenizer(all_captions()) != tokenizer.eos_token_id).sum(1).max() + 1
        return tokenizer, int(used)

    def _write_vocabulary(self, place: Path, dataset: Any, size: int) -> None:
        """The one of the CLIP to start from, the one that was named, or one made of captions."""
        from jaxsd import data
        from jaxsd.data.digits import all_captions
        from jaxsd.tokenizer import train_tokenizer

        source = self.tokenizer
        if self.initial is not None:
            folder = _clip_folder(self.initial)
            beside = folder.parent / "tokenizer"
            source = beside if beside.is_dir() else folder
        if source is not None:
            _copy_vocabulary(source, place)
        elif self.data in data.SOURCES:
            train_tokenizer(all_captions(), place, size)
        elif not (place / VOCABULARY[-1]).is_file():  # else of the training that is resumed
            chosen = np.unique(np.linspace(0, len(dataset.source) - 1, CORPUS).astype(int))
            corpus = [dataset.source[int(i)]["caption"] for i in chosen]
            if not any(corpus):
                raise JaxsdError(f"the pictures of {self.data} have no captions to learn from")
            train_tokenizer(corpus, place, size)


def _clip_folder(initial: Path) -> Path:
    """The folder with both towers: `clip/` of a training's model, or the folder itself."""
    inner = initial / "clip"
    return inner if (inner / "config.json").is_file() else initial


def _copy_vocabulary(source: Path, place: Path) -> None:
    """Copies a vocabulary alone, whatever else lies beside it at the source."""
    found = [source / name for name in VOCABULARY if (source / name).is_file()]
    if not found:
        raise JaxsdError(f"{source} holds no vocabulary: vocab.json and merges.txt")
    try:
        place.mkdir(parents=True, exist_ok=True)
        for file in found:
            shutil.copyfile(file, place / file.name)
    except OSError as error:
        raise JaxsdError(f"cannot copy {source} to {place}: {error.strerror or error}") from None


def _statistics(folder: Path) -> Any:
    """What the checkpoint's image processor makes of pixels."""
    from jaxsd.components import image_processor
    from jaxsd.objectives.clip import PixelStatistics

    values, file = image_processor(folder)
    return PixelStatistics.from_json(values, str(file))
