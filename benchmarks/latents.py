"""Trainings on cached latents at full size, without the files: what a step of them costs.

The losses are those of `train.py` on cached latents (text-to-image: but for dropping captions); VAE
and text towers, which such a training does not run, are left out.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import training
from jaxsd.components import Component
from jaxsd.diffusion.jumps import student_schedule
from jaxsd.diffusion.schedule import Schedule
from jaxsd.families import Family
from jaxsd.models import UNet, UNetConfig
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch, Now, Objective
from jaxsd.objectives.consistency import Consistency
from jaxsd.objectives.denoising import Denoising, Example, denoising_loss
from jaxsd.objectives.distillation import SCALE_CHANNELS, Teacher
from jaxsd.objectives.guided import Guided
from jaxsd.objectives.progressive import Progressive
from jaxsd.pipeline import Pipeline
from jaxsd.training.step import Aux, initial_params

TOKENS = 77
SCALES = (1.0, 9.0)  # of guidance, which students are told
Recipe = Literal["text-to-image", "progressive", "guided", "consistency"]


@dataclasses.dataclass
class Latents:
    """Batches as of `shapes`: the moments of latents, and what the text towers would say.

    unet: of the network that is trained, where it has more weights than the family's.
    """

    family: Family
    dtype: str = "float32"
    unet: UNetConfig | None = None
    schedule: Schedule | None = None
    preview_prompts: Sequence[str] = ("",)

    def __post_init__(self):
        assert isinstance(self.family.unet, UNetConfig) and self.family.vae is not None
        self.net = Net(UNet(self.unet or self.family.unet))
        self.schedule = self.schedule or self.family.schedule
        told = self.shapes(1, self.family.vae.downscale).items()
        empty = {n: np.zeros(s.shape, np.float32) for n, s in told if n in _SAID}
        self.aux: Any = {"empty": empty}

    def shapes(self, rows: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a batch of pictures with `side` pixels: float16, as the files have them."""
        unet, vae = self.family.unet, self.family.vae
        assert isinstance(unet, UNetConfig) and vae is not None
        latents = (rows, side // vae.downscale, side // vae.downscale, unet.in_channels)
        told = {"encoder_hidden_states": (rows, TOKENS, unet.cross_attention_dim)}
        if unet.addition_embed_type == "text_time":
            told |= {"text_embeds": (rows, 1280), "time_ids": (rows, 6)}
        shapes = {"mean": latents, "logvar": latents, **told}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float16) for name, shape in shapes.items()}

    def batch(self, rows: int, side: int) -> dict[str, np.ndarray]:
        """Made up: as random as latents and text states are, of moments that are nearly sure."""
        rng = np.random.default_rng(0)
        shapes = self.shapes(rows, side)
        batch = {n: rng.standard_normal(s.shape).astype(s.dtype) for n, s in shapes.items()}
        return batch | {"logvar": np.full_like(batch["logvar"], -10)}

    def init(self, key: jax.Array) -> Params:
        """The family's, whatever the key: a student begins as its teacher."""
        return fresh(Net(UNet(self.family.unet)))

    def example(self, params: Params, aux: Any, batch: Batch, key: jax.Array) -> Example:
        cond = {name: value.astype(jnp.float32) for name, value in batch.items()}
        mean, logvar = cond.pop("mean"), cond.pop("logvar")
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        empty = {n: jnp.broadcast_to(value, cond[n].shape) for n, value in aux["empty"].items()}
        return Example(self.family.vae.scaling_factor * latents, cond, cond | empty)

    def loss(self, params: Params, aux: Any, batch: Batch, now: Now):
        key_latent, key = jax.random.split(now.key)
        example = self.example(params, aux, batch, key_latent)
        options = Denoising(dtype=self.dtype)
        return denoising_loss(
            self.net, params, self.schedule, example.x0, example.cond, key, options
        )

    def pipeline(self, params: Params) -> Pipeline:
        """Of latents alone."""
        return Pipeline(Component(self.net, params), self.schedule)

    def preview(self, params: Params) -> None:
        return None

    def export(self, params: Params, folder: Any) -> None:
        self.pipeline(params).save(folder)


_SAID = ("encoder_hidden_states", "text_embeds")  # by the text towers


def objective(recipe: Recipe, family: Family, dtype: str, real: bool = False) -> Objective:
    """What a recipe minimises on latents: text-to-image, or one of distillation.

    The student is told the guidance scale, and so is the teacher of progressive, which `guided`
    would have made; the others are the family's UNet, with guidance two passes. Teachers compute in
    `dtype` and are kept in it: as shapes alone, unless they are to be `real`.
    """
    if recipe == "text-to-image":
        return Latents(family, dtype)
    unet: Any = dataclasses.replace(
        family.unet, time_cond_proj_dim=SCALE_CHANNELS, guidance_range=SCALES
    )
    if recipe == "progressive":
        schedule = dataclasses.replace(family.schedule, prediction_type="v_prediction")
        family = dataclasses.replace(family, unet=unet, schedule=schedule)
    net = Net(UNet(family.unet))
    draw = functools.partial(_drawn, net, dtype)
    teacher = Teacher(net, jax.jit(draw)() if real else jax.eval_shape(draw), family.schedule)
    if recipe == "consistency":
        schedule = student_schedule(family.schedule, class_name="LCMScheduler")
    else:
        schedule = student_schedule(family.schedule, "v_prediction")
    base = Latents(family, dtype, unet, schedule)
    kind = {"progressive": Progressive, "guided": Guided, "consistency": Consistency}[recipe]
    return kind(base, teacher, 4, SCALES, dtype=dtype)


def fresh(net: Net) -> Params:
    """Random weights, also of the last layer: where that is zero, no other has a gradient."""
    key = jax.random.key(0)
    params = net.init(key)
    last = params["conv_out.weight"]
    width = last[0].size ** -0.5
    return params | {"conv_out.weight": width * jax.random.normal(key, last.shape)}


def _drawn(net: Net, dtype: str) -> Params:
    """The same, matrices and kernels in the dtype that is computed in."""
    params = fresh(net)
    return {name: p.astype(dtype) if p.ndim > 1 else p for name, p in params.items()}


def held(
    objective: Objective, optimizer: Any, options: training.Options
) -> tuple[training.TrainState, Aux]:
    """What `training.init_state` gives, as shapes, of an objective that may be of shapes itself."""
    trained, frozen = jax.eval_shape(lambda: initial_params(objective, options))
    state = jax.eval_shape(functools.partial(training.state_of, optimizer=optimizer), trained)
    return state, Aux(objective.aux, frozen)
