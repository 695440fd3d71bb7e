"""Progressive distillation (Salimans & Ho 2022, 2202.00512): one step where the teacher takes two.

A stage makes of a teacher that samples in 2 N steps a student that samples in N; the next stage
takes that for its teacher. Another factor than 2 may stand in its place. With guidance scales it is
stage two of guided distillation (Meng et al. 2023, 2210.03142).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.diffusion import jumps
from jaxsd.errors import JaxsdError
from jaxsd.nn import Params
from jaxsd.objectives import Batch, Now
from jaxsd.objectives.adversarial import Critic
from jaxsd.objectives.denoising import by_quarter
from jaxsd.objectives.distillation import Student, ask, ask_teacher
from jaxsd.pipeline import Pipeline

RUNGS = 257  # of 128 student steps; longer ladders have programs of their own


@dataclasses.dataclass
class Progressive(Student):
    """Batches are those of `base`.

    factor: how many of the teacher's steps one of the student's is worth; the paper's is 2.
    encoder: the steps lead the other way, from pictures to noise (2210.03142, section 3.3): the
    student of the reversed DDIM. adversarial_weight: of the term in `adversarial`; 0 for none.
    """

    factor: int = 2
    encoder: bool = False
    adversarial_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        kinds = {self.schedule.prediction_type, self.teacher.schedule.prediction_type}
        if self.encoder and "sample" in kinds:
            raise JaxsdError("an encoder begins at the picture itself, where one that predicts it "
                             "says nothing of the noise: it must predict v")  # fmt: skip
        rungs = jumps.ladder(self.schedule, self.factor * self.steps)
        rungs = jumps.reverse(rungs) if self.encoder else rungs
        weight = self.adversarial_weight
        self._critic = Critic(self.teacher, weight, self.dtype) if weight else None
        # As arguments, and of one length: then all stages are one compiled program
        more = max(RUNGS - len(rungs.t), 0)
        padded = jax.tree.map(lambda values: np.pad(values, (0, more), "edge"), rungs)
        self.aux |= {"rungs": padded, "steps": np.int32(self.steps)}

    def init(self, key: jax.Array) -> Params:
        params = super().init(key)
        return params | self._critic.init(jax.random.fold_in(key, 1)) if self._critic else params

    def loss(self, params: Params, aux, batch: Batch, now: Now):
        """One step of the student against the teacher's `factor` (2202.00512, algorithm 2)."""
        key_example, key_rung, key_eps, key_scale = jax.random.split(now.key, 4)
        example = self.example(params, aux, batch, key_example)
        x0 = example.x0
        step = jax.random.randint(key_rung, x0.shape[:1], 0, aux["steps"])
        rungs, first = aux["rungs"], self.factor * step
        start, end = rungs.at(first), rungs.at(first + self.factor)
        eps = jax.random.normal(key_eps, x0.shape, jnp.float32)
        scale = self.scales(key_scale, len(x0))
        z = jumps.noised(x0, eps, start)
        if not self.encoder:  # sampling begins with noise alone, where schedules may leave a trace
            z = jnp.where((step == 0)[:, None, None, None], eps, z)

        def teach(i: jax.Array, there: jax.Array) -> jax.Array:
            here, goal = rungs.at(first + i), rungs.at(first + i + 1)
            said = ask_teacher(
                self.teacher, aux["teacher"], there, here.t, example, scale, self.dtype
            )
            return jumps.jump(self.teacher.schedule.prediction_type, said, there, here, goal)

        landed = jax.lax.fori_loop(0, self.factor, teach, z)  # one teacher in the program, not two
        target = jax.lax.stop_gradient(jumps.explains(z, landed, start, end))

        said = ask(self.net, params, z, start.t, example.cond, scale, self.dtype)
        error = self.error(said, *target, start)
        share = (step.astype(jnp.float32) + 0.5) / aux["steps"].astype(jnp.float32)
        loss, metrics = error.mean(), by_quarter(error, share if self.encoder else 1 - share)
        if self._critic is not None:
            own = jumps.jump(self.schedule.prediction_type, said, z, start, end)
            landed = jax.lax.stop_gradient(landed)
            path, ends = (z, start, end), (landed, own)
            more, told = self._critic.loss(params, aux["teacher"], path, ends, example.cond, scale)
            loss, metrics = loss + more, metrics | told | {"error": loss}
        return loss, metrics

    def pipeline(self, params: Params) -> Pipeline:
        return super().pipeline({name: params[name] for name in self.net.shapes})

    def preview(self, params: Params) -> np.ndarray | None:
        """As of every student; an encoder draws no pictures."""
        return None if self.encoder else super().preview(params)
