"""How to train: the options that every recipe has, and what each may be."""

import dataclasses
import typing
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from jaxsd.errors import JaxsdError
from jaxsd.seeds import SEEDS


def one_of(*choices: str) -> PrimitiveConstructorSpec[str]:
    """Annotates a `str` field that takes these values alone: `--help` lists them.

    `check_choices` holds Python callers to them too, which a Literal would leave to type checkers.
    """
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value in choices,
        str_from_instance=lambda value: [value],
        choices=choices,
    )


def check_choices(options: Any) -> None:
    """JaxsdError if a field of this dataclass that is annotated by `one_of` has another value."""
    for name, hint in typing.get_type_hints(type(options), include_extras=True).items():
        for note in getattr(hint, "__metadata__", ()):
            if not isinstance(note, PrimitiveConstructorSpec) or note.choices is None:
                continue
            if (value := getattr(options, name)) not in note.choices:
                *others, last = note.choices
                raise JaxsdError(f"{name} is {', '.join(others)} or {last}, not {value!r}")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the loop. The recipes of `train.py` are dataclasses that inherit from this one.

    Names of parameters are chosen by patterns as in a shell, where `*` stands for anything, dots
    too: "down_blocks.*", "*.attn2.*", "*.bias".
    """

    steps: int
    """Updates altogether: the length of the whole training, of which decay is a function."""
    batch_size: int = 128
    """Examples in an update, on all devices together."""
    accumulate: int = 1
    """Parts of a batch that go through the network one after the other, to save memory."""
    optimizer: Annotated[str, one_of("adamw", "adafactor", "lion", "muon")] = "adamw"
    """Memory besides the parameters: two copies for adamw, one for lion and (but for vectors) muon,
    next to nothing for adafactor. lion wants a learning rate 3 to 10 times lower than adamw's."""
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    """Updates during which the learning rate rises from 0."""
    decay: Annotated[str, one_of("cosine", "linear", "constant")] = "cosine"
    """How the learning rate falls after that."""
    final_learning_rate: float = 0.0
    """What it falls to, at the last update."""
    rate_factors: tuple[str, ...] = ()
    """Learning rates of their own: PATTERN=FACTOR times the common one, for parameters whose name
    fits the pattern. The last that fits counts."""
    beta1: float = 0.9
    """Memory of the gradient's average (adamw, lion, and adamw for muon's vectors)."""
    beta2: float = 0.99
    """Memory of the squared gradient's average; in lion, of the momentum."""
    epsilon: float = 1e-8
    """Added to the root of the squared gradient's average (adamw)."""
    momentum: float = 0.95
    """Memory of muon's momentum, for matrices and kernels."""
    weight_decay: float = 0.0
    """Share of a parameter that an update takes away, times the learning rate."""
    decayed: tuple[str, ...] = ()
    """Patterns of the parameters that decay; by default matrices and kernels."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this; 0 for never."""
    train: tuple[str, ...] = ()
    """Patterns of the only parameters to train; by default all."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters to leave as they are."""
    ema_decay: float = 0.999
    """Of the averaged parameters, which are what is exported."""
    ema_power: float = 0.0
    """How the average lengthens: after n updates its decay is at most (1 + n) / (10 + n) or, with a
    power p above 0, 1 - (1 + n)^-p. 2/3 suits a million updates, 3/4 fewer."""
    dtype: Annotated[str, one_of("float32", "bfloat16")] = "float32"
    """In which networks compute. Parameters, averages and moments stay float32; with bfloat16 the
    gradients of matrices come in it, and are summed over parts of a batch as float32."""
    remat: Annotated[str, one_of("none", "selective", "full")] = "none"
    """What is computed twice to save memory: of each block cheap parts alone, or everything."""
    fsdp: int = 1
    """Devices that share one copy of parameters, averages and moments, each holding its piece; it
    must divide their number. More of them need less memory each, and send more to each other."""
    tensor: int = 1
    """Devices that share the work on each row of a batch as well, in attention and feed-forward
    layers."""
    shard: tuple[str, ...] = ()
    """How to split arrays of some parameters: PATTERN=AXES, where PATTERN is a regular expression
    and AXES are fsdp, tensor or - for each axis of the array (a lone - keeps it whole)."""
    seed: int = 0
    save_every: int = 500
    """Updates between checkpoints."""
    log_every: int = 50
    sample_every: int = 1000
    """Updates between sample grids."""
    keep: int = 2
    """The newest checkpoints to keep."""
    keep_best: str | None = None
    """A metric of an evaluation, such as eval/loss: the checkpoint with its lowest value stays."""
    keep_highest: bool = False
    """The highest value of `keep_best` is the best one, as of a CLIP score."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides stay too."""
    stop_when: str | None = None
    """METRIC<VALUE or METRIC>VALUE of an evaluation, such as "eval/loss<0.02": where it comes to
    this, training ends as after its last update."""
    max_skipped: int = 10
    """After so many updates in a row whose loss or gradient was not finite, training stops."""
    report: bool = True
    """Make report.html in the workdir on the way: curves, pictures, evaluations, options."""
    wandb_project: str | None = None
    """Log to Weights & Biases too (pip install jaxsd[wandb])."""
    profile_steps: int = 0
    """Updates to trace into workdir/profile, for TensorBoard's profile plugin or Perfetto."""
    profile_start: int = 10
    """The trace begins so many updates after the start of this run; the first one is compiled."""

    def __post_init__(self):
        check_choices(self)
        counts = ("steps", "batch_size", "accumulate", "fsdp", "tensor", "max_skipped")
        intervals = (
            "save_every",
            "log_every",
            "sample_every",
            "keep",
            "keep_every",
            "profile_start",
        )
        for name in counts + intervals:
            if (value := getattr(self, name)) is not None and value < 1:
                raise JaxsdError(f"{name} must be at least 1, not {value}")
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise JaxsdError(f"{name} must be above 0, not {getattr(self, name)}")
        at_least_zero = ("warmup_steps", "final_learning_rate", "weight_decay", "max_grad_norm")
        for name in (*at_least_zero, "ema_power", "profile_steps"):
            if not getattr(self, name) >= 0:
                raise JaxsdError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("beta1", "beta2", "momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise JaxsdError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if not 0 <= self.seed < SEEDS:
            raise JaxsdError(f"seed must be from 0 to {SEEDS - 1}, not {self.seed}")
        if self.batch_size % self.accumulate:
            raise JaxsdError(
                f"accumulate must divide batch_size {self.batch_size}, not {self.accumulate}"
            )


# Options that decide where things are, what is told and what is kept on the way, not what comes
# out: free on resuming.
REPORTING = {
    *("fsdp", "tensor", "shard"),
    *("save_every", "log_every", "sample_every"),
    *("keep", "keep_best", "keep_highest", "keep_every", "max_skipped", "num_workers"),
    *("report", "wandb_project", "profile_steps", "profile_start"),
    # of the recipes (cli/recipes/evaluation.py)
    *("eval_every", "eval_data", "eval_count", "eval_samples", "eval_steps", "eval_guidance_scale"),
    *("eval_batch_size", "eval_statistics", "inception", "clip_score"),
    # and of those that teach (cli/recipes/teaching.py)
    *("preview_prompts", "class_batch_size"),
}
