"""Latent consistency distillation (Luo et al. 2023, 2310.04378; Song et al. 2023, 2303.01469).

A consistency function says from any point of a path to the picture what lies at its end. The
student's is c_skip z + c_out x, with x of its prediction; that of a point must equal that of where
the teacher's next jump leads.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.diffusion import jumps
from jaxsd.diffusion.grids import Ask, consistency_times
from jaxsd.diffusion.onestep import boundary
from jaxsd.diffusion.schedule import x0_and_eps
from jaxsd.errors import JaxsdError
from jaxsd.nn import Net, Params
from jaxsd.objectives import Batch, Now
from jaxsd.objectives.denoising import Example, by_quarter
from jaxsd.objectives.distillation import Student, ask, ask_teacher

LOSSES = ("huber", "l2")


@dataclasses.dataclass
class Consistency(Student):
    """Batches are those of `base`, whose schedule's class is LCMScheduler.

    The teacher jumps between `original_inference_steps` times of the schedule, which leaves out
    k - 1 timesteps of every k (skipping-step, section 4.3). What the next point says is asked of
    the averaged parameters (`Options.ema_decay`). huber: sqrt(d^2 + c^2) - c, element by element,
    with c = `huber_c`; l2: d^2.
    """

    sampler = "lcm"

    loss_type: str = "huber"
    huber_c: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if self.loss_type not in LOSSES:
            raise JaxsdError(f"loss_type is one of {', '.join(LOSSES)}, not {self.loss_type!r}")
        if not self.huber_c > 0:
            raise JaxsdError(f"huber_c must be above 0, not {self.huber_c}")
        schedule = self.schedule
        kinds = {schedule.prediction_type, self.teacher.schedule.prediction_type}
        if "epsilon" in kinds and (schedule.continuous or schedule.alphas_cumprod[-1] == 0):
            raise JaxsdError("this schedule ends in noise alone, of which a network that predicts "
                             "eps says nothing: turn it into one that predicts v")  # fmt: skip
        count = schedule.original_inference_steps
        times = consistency_times(schedule, Ask(count))
        # The last jump ends at the first timestep, in which the boundary condition holds
        self._times = np.append(times, 0.0).astype(np.float32)

    def loss(self, params: Params, aux, batch: Batch, now: Now):
        """How far apart the ends are that the student sees from two neighbouring times."""
        key_example, key_time, key_eps, key_scale = jax.random.split(now.key, 4)
        example = self.example(params, aux, batch, key_example)
        x0 = example.x0
        i = jax.random.randint(key_time, x0.shape[:1], 0, len(self._times) - 1)
        here, there = (self._level(jnp.asarray(self._times)[j]) for j in (i, i + 1))
        eps = jax.random.normal(key_eps, x0.shape, jnp.float32)
        scale = self.scales(key_scale, len(x0))
        # Sampling begins with noise alone, where schedules may leave a trace of the picture
        z = jnp.where((i == 0)[:, None, None, None], eps, jumps.noised(x0, eps, here))

        taught = ask_teacher(self.teacher, aux["teacher"], z, here.t, example, scale, self.dtype)
        nearer = jumps.jump(self.teacher.schedule.prediction_type, taught, z, here, there)
        average = params if now.ema is None else now.ema
        goal = jax.lax.stop_gradient(self._end(self.net, average, nearer, there, example, scale))
        said = self._end(self.net, params, z, here, example, scale)
        error = jnp.square(said - goal)
        if self.loss_type == "huber":
            error = jnp.sqrt(error + self.huber_c**2) - self.huber_c
        error = error.mean((1, 2, 3))
        return error.mean(), by_quarter(error, here.t / self.schedule.num_train_timesteps)

    def _level(self, t: jax.Array) -> jumps.Level:
        return jumps.Level(t, *self.schedule.alpha_sigma(t))

    def _end(
        self,
        net: Net,
        params: Params,
        z: jax.Array,
        level: jumps.Level,
        example: Example,
        scale: jax.Array | None,
    ) -> jax.Array:
        """The consistency function, as the sampler "lcm" has it: z itself at t = 0."""
        said = ask(net, params, z, level.t, example.cond, scale, self.dtype)
        x0, _ = x0_and_eps(self.schedule.prediction_type, said, z, *level.each())
        skip, out = boundary(self.schedule, level.t)
        return skip[:, None, None, None] * z + out[:, None, None, None] * x0
