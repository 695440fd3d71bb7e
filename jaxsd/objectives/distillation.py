"""What all students share: a teacher, what is drawn of a batch, and how a model is made of them.

A student is an ordinary network that denoises, told what its teacher is told. It may be told the
guidance scale as well (a UNet with `time_cond_proj_dim`); then it says in one pass what a teacher
with guidance says in two.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.diffusion.denoise import Conditioning, guided
from jaxsd.diffusion.jumps import Level
from jaxsd.diffusion.schedule import Schedule, as_one, prediction_target
from jaxsd.diffusion.weighting import loss_weight
from jaxsd.errors import JaxsdError
from jaxsd.models import guidance_scale_embedding
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch
from jaxsd.objectives.denoising import Denoiser, Example, preview, with_dropout
from jaxsd.pipeline import Pipeline

SCALE_CHANNELS = 256  # of the embedded guidance scale, as in LCM (Luo et al. 2023)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network that denoises: with guidance, unless it is told the scale."""

    net: Net
    params: Params
    schedule: Schedule


def takes_scale(net: Net) -> bool:
    """Whether a network is told the guidance scale."""
    return getattr(net.config, "time_cond_proj_dim", None) is not None


def with_scale(net: Net, told: Conditioning, scale: jax.Array | None) -> Conditioning:
    """What a network is told, the guidance scale [b] among it if it hears of that."""
    if not takes_scale(net):
        return told
    assert scale is not None
    w = guidance_scale_embedding(scale - 1, net.config.time_cond_proj_dim)
    return told | {"timestep_cond": w}


def ask(
    net: Net,
    params: Params,
    z: jax.Array,
    t: jax.Array,
    told: Conditioning,
    scale: jax.Array | None,
    dtype: str = "float32",
) -> jax.Array:
    """A network's prediction, float32 [b, h, w, c], without dropout. scale: [b], of guidance."""
    told = with_scale(net, told, scale)
    return net(params, z.astype(dtype), t, **told).astype(jnp.float32)


def ask_teacher(
    teacher: Teacher,
    params: Params,
    z: jax.Array,
    t: jax.Array,
    example: Example,
    scale: jax.Array | None,
    dtype: str = "float32",
) -> jax.Array:
    """What the teacher says when it is sampled at these guidance scales [b]; None for none."""
    if scale is None or takes_scale(teacher.net):
        return ask(teacher.net, params, z, t, example.cond, scale, dtype)

    def network(z: jax.Array, t: jax.Array, **told: Any) -> jax.Array:
        return ask(teacher.net, params, z, t, told, None, dtype)

    conditions = [example.uncond, example.cond]
    return guided(network, conditions, scale[None], jnp.float32(0))(z, t)


@dataclasses.dataclass
class Student:
    """Base of the objectives that distil.

    base: gives the student's network, its schedule, the rest of the model, and the parameters to
    start from: the teacher's. steps: in which it is to be sampled. guidance: the range from which a
    guidance scale is drawn for each example, None to follow the teacher without guidance; then a
    share `dropout` of what it is told is left out, so that it may be guided like the teacher.
    dtype: in which both networks compute; the loss is float32.
    """

    base: Denoiser
    teacher: Teacher
    steps: int
    guidance: tuple[float, float] | None = None
    dropout: float = 0.0
    weighting: str = "truncated-snr"  # of `diffusion.weighting`
    dtype: str = "float32"

    sampler: ClassVar[str] = "ddim"  # with which it is to be sampled

    def __post_init__(self):
        self.net: Net = self.base.net
        self.schedule: Schedule = self.base.schedule
        self.aux: Any = {"base": self.base.aux, "teacher": self.teacher.params}
        if self.guidance is None and (takes_scale(self.net) or takes_scale(self.teacher.net)):
            raise JaxsdError("this network is told the guidance scale: give the range of scales")
        if takes_scale(self.teacher.net) and not takes_scale(self.net):
            raise JaxsdError("a student whose teacher is told the guidance scale is told it, too")
        if self.guidance is not None and not 1 <= self.guidance[0] <= self.guidance[1]:
            low, high = self.guidance
            raise JaxsdError(f"guidance scales are from 1 on and rising, not {low:g} to {high:g}")

    def init(self, key: jax.Array) -> Params:
        """The teacher. How the guidance scale enters begins at zero: it says nothing yet.

        Where the student's last layer says more pictures, all begin as the teacher's one.
        """
        given = self.base.init(key)
        shapes = self.net.shapes
        params = {**given, **{n: jnp.zeros(shapes[n]) for n in shapes if n not in given}}
        for name in ("conv_out.weight", "conv_out.bias"):
            if name in shapes and len(params[name]) < shapes[name][0]:
                params[name] = jnp.concatenate([params[name]] * 2)
        return params

    def example(self, params: Params, aux: Any, batch: Batch, key: jax.Array) -> Example:
        """Of a batch, what both networks are shown, float32, and told."""
        key, key_told = jax.random.split(key)
        example = self.base.example(params, aux["base"], batch, key)
        if self.guidance is None:
            example = example._replace(cond=with_dropout(example, self.dropout, key_told))
        return example._replace(x0=example.x0.astype(jnp.float32))

    @property
    def guidance_within(self) -> bool:
        """Whether guidance is in the weights, at one scale: it is not to be added in sampling."""
        return self.guidance is not None and not takes_scale(self.net)

    def scales(self, key: jax.Array, count: int) -> jax.Array | None:
        """Guidance scales [count], uniform in the range."""
        if self.guidance is None:
            return None
        low, high = self.guidance
        return jax.random.uniform(key, (count,), minval=low, maxval=high)

    def error(
        self, prediction: jax.Array, x0: jax.Array, eps: jax.Array, level: Level
    ) -> jax.Array:
        """The weighted mean square error [b] of what the student says, against (x0, eps)."""
        kind = self.schedule.prediction_type
        kind, prediction = as_one(kind, prediction, *level.each())
        target = prediction_target(kind, x0, eps, *level.each())
        weight = loss_weight(self.weighting, kind, level.alpha, level.sigma)
        return weight * jnp.square(prediction - target).mean((1, 2, 3))

    def pipeline(self, params: Params) -> Pipeline:
        return self.base.pipeline(params)

    def preview(self, params: Params) -> np.ndarray:
        """Four pictures of each prompt, in the middle of the scales that it is told."""
        told = self.guidance if takes_scale(self.net) else None
        scale = 1.0 if told is None else sum(told) / 2
        pipe = self.pipeline(params)
        prompts = self.base.preview_prompts
        return preview(pipe, prompts, steps=self.steps, guidance_scale=scale, sampler=self.sampler)

    def export(self, params: Params, folder: str | Path) -> None:
        self.pipeline(params).save(folder)
