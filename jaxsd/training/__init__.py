"""The training loop: one for every objective.

A step is a pure function of (state, aux, batch, seed): its key is fold_in(key(seed), step), its
batch is batch number `step` of the data. Nothing else is random, so a training that was killed and
started again ends with the same bits as one that was left alone.
"""

from jaxsd.training.evaluators import Evaluator
from jaxsd.training.loop import train
from jaxsd.training.names import split_params
from jaxsd.training.optimizers import learning_rate_schedule, make_optimizer
from jaxsd.training.options import REPORTING, Options
from jaxsd.training.step import (
    Aux,
    TrainState,
    compiler_options,
    init_state,
    make_step,
    state_bytes,
    state_of,
)
from jaxsd.training.workdir import check_workdir

__all__ = [
    "REPORTING",
    "Aux",
    "Evaluator",
    "Options",
    "TrainState",
    "check_workdir",
    "compiler_options",
    "init_state",
    "learning_rate_schedule",
    "make_optimizer",
    "make_step",
    "split_params",
    "state_bytes",
    "state_of",
    "train",
]
