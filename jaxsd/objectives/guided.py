"""Distillation of guidance (Meng et al. 2023, 2210.03142, section 3.1): two passes become one.

The student sees what its teacher sees, at the same time, and says what the teacher says with
guidance. It may say it in another form: of a teacher that predicts eps, which progressive
distillation cannot use, a student is made that predicts v.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxsd.diffusion import jumps
from jaxsd.diffusion.schedule import x0_and_eps
from jaxsd.nn import Params
from jaxsd.objectives import Batch, Now
from jaxsd.objectives.denoising import by_quarter
from jaxsd.objectives.distillation import Student, ask, ask_teacher


@dataclasses.dataclass
class Guided(Student):
    """Batches are those of `base`."""

    def loss(self, params: Params, aux, batch: Batch, now: Now):
        """The student in one pass against its guided teacher in two (2210.03142, section 3.1)."""
        key_example, key_t, key_eps, key_scale = jax.random.split(now.key, 4)
        example = self.example(params, aux, batch, key_example)
        x0 = example.x0
        t = self.schedule.random_times(key_t, len(x0), self.schedule.continuous)
        here = jumps.Level(t, *self.schedule.alpha_sigma(t))
        z = jumps.noised(x0, jax.random.normal(key_eps, x0.shape, jnp.float32), here)
        scale = self.scales(key_scale, len(x0))
        taught = ask_teacher(self.teacher, aux["teacher"], z, t, example, scale, self.dtype)
        kind = self.teacher.schedule.prediction_type
        target = jax.lax.stop_gradient(x0_and_eps(kind, taught, z, *here.each()))
        said = ask(self.net, params, z, t, example.cond, scale, self.dtype)
        error = self.error(said, *target, here)
        return error.mean(), by_quarter(error, t / self.schedule.num_train_timesteps)
