"""Progressive distillation (Salimans & Ho 2022, 2202.00512): one step where the teacher takes two.

A stage makes of a teacher that samples in 2 N steps a student that samples in N; the next stage
takes that for its teacher. With guidance scales it is stage two of guided distillation (Meng et al.
2023, 2210.03142).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.diffusion import jumps
from jaxsd.nn import Params
from jaxsd.objectives import Batch, Now
from jaxsd.objectives.denoising import by_quarter
from jaxsd.objectives.distillation import Student, ask, ask_teacher

RUNGS = 257  # of 128 student steps; longer ladders have programs of their own


@dataclasses.dataclass
class Progressive(Student):
    """Batches are those of `base`.

    encoder: the steps lead the other way, from pictures to noise (2210.03142, section 3.3): the
    student of the reversed DDIM.
    """

    encoder: bool = False

    def __post_init__(self):
        super().__post_init__()
        rungs = jumps.ladder(self.schedule, 2 * self.steps)
        rungs = jumps.reverse(rungs) if self.encoder else rungs
        # As arguments, and of one length: then all stages are one compiled program
        more = max(RUNGS - len(rungs.t), 0)
        padded = jax.tree.map(lambda values: np.pad(values, (0, more), "edge"), rungs)
        self.aux |= {"rungs": padded, "steps": np.int32(self.steps)}

    def loss(self, params: Params, aux, batch: Batch, now: Now):
        key_example, key_rung, key_eps, key_scale = jax.random.split(now.key, 4)
        example = self.example(params, aux, batch, key_example)
        x0 = example.x0
        step = jax.random.randint(key_rung, x0.shape[:1], 0, aux["steps"])
        start, middle, end = (aux["rungs"].at(2 * step + i) for i in range(3))
        eps = jax.random.normal(key_eps, x0.shape, jnp.float32)
        scale = self.scales(key_scale, len(x0))
        z = jumps.noised(x0, eps, start)
        if not self.encoder:  # sampling begins with noise alone, where schedules may leave a trace
            z = jnp.where((step == 0)[:, None, None, None], eps, z)

        kind, there = self.teacher.schedule.prediction_type, z
        for here, goal in ((start, middle), (middle, end)):
            said = ask_teacher(
                self.teacher, aux["teacher"], there, here.t, example, scale, self.dtype
            )
            there = jumps.jump(kind, said, there, here, goal)
        target = jax.lax.stop_gradient(jumps.explains(z, there, start, end))

        said = ask(self.net, params, z, start.t, example.cond, scale, self.dtype)
        error = self.error(said, *target, start)
        share = (step.astype(jnp.float32) + 0.5) / aux["steps"].astype(jnp.float32)
        return error.mean(), by_quarter(error, share if self.encoder else 1 - share)
