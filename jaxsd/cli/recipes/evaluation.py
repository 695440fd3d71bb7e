"""Options of in-loop evaluation, and the evaluators that they stand for.

Mixed into a recipe, whose `evaluators(objective)` is then one line.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd.cli.recipes.common import remembering
from jaxsd.cli.recipes.pictures import PictureData
from jaxsd.errors import JaxsdError

Tokenize = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutOptions:
    """What is measured on the way is measured of averaged parameters, on pictures held out."""

    data: str
    workdir: Path
    eval_every: int = 0
    """Updates between evaluations on held-out pictures, and one at the end; 0 for none."""
    eval_data: str | None = None
    """Held-out pictures, in place of those that --data keeps from training: a folder of test
    pictures, or of several splits; where --data are latents, also the pictures that they were made
    of (with the same --holdout)."""
    eval_count: int = 450
    """Held-out pictures that are used, the first of the split: of the digits all scans."""
    eval_batch_size: int = 16
    """Pictures at a time."""

    def held_out(self, tokenize: Tokenize | None = None) -> Any:
        """The first held-out pictures, squares cut from the middle and not mirrored."""
        from jaxsd import data
        from jaxsd.data.latents import MANIFEST, is_cache
        from jaxsd.evaluation import held_out
        from jaxsd.weights.files import as_path, read_json

        for name, least in (("eval_count", 2), ("eval_batch_size", 1)):
            if getattr(self, name) < least:
                raise JaxsdError(f"{name} must be at least {least}, not {getattr(self, name)}")
        size, name = self.eval_batch_size, self.eval_data or self.data
        if name in data.SOURCES:
            elements = data.elements(name, "test", 0)
        elif not isinstance(self, PictureData):
            raise JaxsdError(f"unknown data {name!r}; there are {', '.join(data.SOURCES)}")
        elif is_cache(name):
            raise JaxsdError(
                f"{name} are latents, of which none are held out: name with --eval-data the "
                "pictures that they were made of, with the same --holdout, or others"
            )
        else:
            trained, holdout, resolution = self.data, self.holdout, self.resolution
            if is_cache(self.data):
                made_of = read_json(as_path(self.data) / MANIFEST)["made_of"]
                trained, holdout = made_of["data"], made_of.get("holdout", 0.0)
                resolution = made_of.get("resolution", resolution)
            same = _place(name) == _place(trained)
            if same and holdout != self.holdout:
                raise JaxsdError(
                    f"the latents in {self.data} were made with --holdout {holdout:g}: give the "
                    f"same, not {self.holdout:g}"
                )
            # Squares alone: of a plan of several shapes some pictures would come twice
            own: Any = dataclasses.replace(
                self, data=name, crop="center", flip=False, buckets=False, resolution=resolution
            )
            split = "test" if same or self.holdout else "given"
            elements = own.open_data(0, size, self.workdir / "held_out", split)
        return held_out.of_elements(elements, self.eval_count, size, tokenize)

    def evaluator(self, name: str, measure: Any) -> Any:
        from jaxsd.training import Evaluator

        return Evaluator(name, self.eval_every, measure)

    def evaluates(self) -> bool:
        if self.eval_every < 0:
            raise JaxsdError(f"eval_every must be at least 0, not {self.eval_every}")
        return self.eval_every > 0


def _place(data: str) -> str:
    """The same text for every spelling of a folder."""
    return data.rstrip("/") if "://" in data else os.path.realpath(data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPEvaluation(HeldOutOptions):
    """Of a CLIP model: "retrieval"."""

    def clip_evaluators(self, objective: Any) -> list[Any]:
        if not self.evaluates():
            return []
        from jaxsd.evaluation import in_loop

        def towers(params: Any, ids: Any, pictures: Any) -> Any:
            return objective.net(params, ids, objective.statistics(pictures))

        length = objective.text.max_position_embeddings
        tokenize = remembering(lambda captions: objective.tokenizer(captions, length))
        return [self.evaluator("retrieval", in_loop.retrieval(towers, self.held_out(tokenize)))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions(HeldOutOptions):
    """For distances between sets of pictures."""

    inception: Path | None = None
    """Weights for FID and KID: pytorch-fid's pt_inception-2015-12-05-6726825d.pth."""

    def features(self) -> Any:
        from jaxsd.evaluation import features

        return None if self.inception is None else features.inception(self.inception)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEEvaluation(FeatureOptions):
    """Of an autoencoder: "reconstruction"."""

    def vae_evaluators(self, objective: Any) -> list[Any]:
        if not self.evaluates():
            return []
        from jaxsd.evaluation import in_loop

        measure = in_loop.reconstruction(objective.net, self.held_out(), self.features())
        return [self.evaluator("reconstruction", measure)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingEvaluation(FeatureOptions):
    """Of an objective with `loss_by_bucket` and `pipeline`: "eval", and "drawn" of its pictures."""

    eval_samples: int = 0
    """Pictures to draw in each evaluation, asked for by held-out captions: their grid, their
    distances from the held-out pictures (FID and KID with --inception, else for digits those of
    the digit judge's features) and their CLIP score. 0 for none: drawing takes by far the
    longest."""
    eval_steps: int = 30
    """Sampling steps of these, with DDIM."""
    eval_guidance_scale: float = 3.0
    """Guidance scale of these; 1 for none."""
    eval_statistics: Path | None = None
    """A file (.npz) of the held-out pictures' features: read if it is there (pytorch-fid's will
    do), else written."""
    clip_score: Path | None = None
    """A CLIPModel's folder, with its tokenizer and preprocessor_config.json."""

    def denoising_evaluators(self, objective: Any, tokenize: Tokenize | None = None) -> list[Any]:
        """tokenize: as for `data.batches`."""
        if not self.evaluates():
            return []
        from jaxsd.evaluation import in_loop

        held_out = self.held_out(tokenize)
        loss = in_loop.denoising_loss(objective.loss_by_bucket, objective.aux, held_out)
        found = [self.evaluator("eval", loss)]
        if self.eval_samples:
            found.append(self.evaluator("drawn", self.drawn(objective, held_out, self.eval_steps)))
        return found

    def drawn(self, objective: Any, held_out: Any, steps: int, sampler: str = "ddim") -> Any:
        """The measure of drawn pictures. All files are opened now: one may be missing."""
        from jaxsd import data
        from jaxsd.evaluation import clip_score, features, in_loop, samples
        from jaxsd.evaluation.drawing import Sampling

        for name, least in (("eval_samples", 2), ("eval_steps", 1)):
            if getattr(self, name) < least:
                raise JaxsdError(f"{name} must be at least {least}, not {getattr(self, name)}")
        known = self.features()
        if known is None and (self.eval_data or self.data) in data.SOURCES:
            known = features.digit_judge()
        if known is None and self.eval_statistics is not None:
            raise JaxsdError("eval_statistics are of Inception's features: give --inception, too")
        clip = None if self.clip_score is None else clip_score.load_judge(self.clip_score)

        def measures() -> samples.Measures:
            if known is None:
                return samples.Measures(clip=clip)
            real = samples.reference(
                held_out.pictures, known, self.eval_statistics, (held_out.count,)
            )
            return samples.Measures(known, real, clip)

        how = Sampling(
            count=self.eval_samples,
            steps=steps,
            sampler=sampler,
            guidance_scale=self.eval_guidance_scale,
            sampling_seeds=(0,),
            batch_size=self.eval_batch_size,
        )
        return in_loop.drawn(objective.pipeline, held_out, how, measures)
