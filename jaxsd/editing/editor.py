"""Imagic for many pictures: both stages in memory, one picture after another, compiled once.

editor = Editor(pipe, embedding=Options(...), tuning=Options(...))      # `jaxsd.training.Options`
edited, errors = editor("seven.png", "a blue seven")
images = edited.pipe.decode(imagic.sample(edited, eta=0.7, seeds=[0, 1]))
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsd import training
from jaxsd.editing.imagic import Edited, latents_of, prepare
from jaxsd.nn import Params
from jaxsd.objectives.imagic import (
    Embedding,
    Tuning,
    new_edit,
    on_host,
    reconstruction_error,
    with_unet,
)
from jaxsd.objectives.low_rank import LowRank
from jaxsd.pictures import Picture
from jaxsd.pipeline import Pipeline
from jaxsd.training.step import Aux, initial_params
from jaxsd.weights.edits import Edit


class Errors(NamedTuple):
    """The reconstruction error (`objectives.imagic.reconstruction_error`) after each stage."""

    before: float
    embedding: float
    tuning: float


class Editor:
    """Runs both stages for one picture after another, in memory, with the same programs.

    embedding, tuning: options of the two trainings, whose seeds are those of every picture. rank:
    of low-rank factors (LoRA) to tune in place of the UNet; 0 for the whole.

    `pipe` stays as it is. Each edit holds a UNet of its own, whole even where factors were tuned.
    """

    def __init__(
        self,
        pipe: Pipeline,
        embedding: training.Options,
        tuning: training.Options,
        *,
        rank: int = 0,
        alpha: float | None = None,
        targets: Sequence[str] = ("attention",),
        clip_skip: int = 0,
    ):
        self.pipe, self._options, self._clip_skip = pipe, (embedding, tuning), clip_skip
        self._factors = (rank, float(alpha or rank), targets) if rank else None
        self._trainings: dict[tuple[int, int], tuple[_Training, _Training]] = {}

    def __call__(self, picture: Picture, prompt: str) -> tuple[Edited, Errors]:
        """The edit of a picture, and how near the model came to it.

        Pictures are brought to `prepare`'s size; another one compiles anew.
        """
        shown = prepare(self.pipe, picture)
        edit = new_edit(self.pipe, prompt, (shown.shape[0], shown.shape[1]), self._clip_skip)
        if edit.size not in self._trainings:
            self._trainings[edit.size] = self._compile(edit)
        first, second = self._trainings[edit.size]
        latents = latents_of(self.pipe, shown)
        aux, start = first.objective.aux, {n: jnp.asarray(a) for n, a in edit.target.items()}
        found = first(start, aux, latents)
        before, middle = (first.error(told, aux, latents) for told in (start, found))
        aux = _with_told(second.objective.aux, found)
        tuned = second(second.start(), aux, latents)
        after = second.error(tuned, aux, latents)
        unet = second.objective.whole(tuned) if self._factors else tuned
        edit = dataclasses.replace(edit, optimised=on_host(found))
        return Edited(with_unet(self.pipe, unet), edit), Errors(before, middle, after)

    def _compile(self, edit: Edit) -> "tuple[_Training, _Training]":
        tuning: Any = Tuning(self.pipe, edit, dtype=self._options[1].dtype)
        if self._factors:
            base, dtype = tuning.init(jax.random.key(0)), tuning.dtype
            tuning = LowRank(tuning, base, *self._factors, dtype=dtype)
        embedding = Embedding(self.pipe, edit, dtype=self._options[0].dtype)
        return _Training(embedding, self._options[0]), _Training(tuning, self._options[1])


def _with_told(aux: Any, told: Params) -> Any:
    """What the second stage reads, or what trains factors for it, with another embedding."""
    if "inner" in aux:
        return {**aux, "inner": _with_told(aux["inner"], told)}
    return {**aux, "told": told}


class _Training:
    """The loop of `jaxsd.training` without a workdir: for what takes seconds."""

    def __init__(self, objective: Any, options: training.Options):
        self.objective, self._options = objective, options
        optimizer = training.make_optimizer(options)
        self._begin = jax.jit(functools.partial(training.state_of, optimizer=optimizer))
        step = training.make_step(objective, optimizer, options)
        told = training.compiler_options(options, jax.default_backend())
        self._step = jax.jit(step, donate_argnums=0, compiler_options=told)
        self._error = jax.jit(functools.partial(reconstruction_error, objective))

    def start(self) -> Params:
        trained, frozen = initial_params(self.objective, self._options)
        return {**frozen, **trained}

    def __call__(self, params: Params, aux: Any, latents: jax.Array) -> Params:
        trained, frozen = training.split_params(params, self._options)
        state, everything = self._begin(trained), Aux(aux, frozen)
        rows = (self._options.batch_size, *latents.shape[1:])
        batch = {"latents": jnp.broadcast_to(latents, rows)}
        for _ in range(self._options.steps):
            state, _ = self._step(state, everything, batch)
        return everything.whole(state.ema)

    def error(self, params: Params, aux: Any, latents: jax.Array) -> float:
        return float(self._error(params, aux, latents)["loss"])
