"""The adversarial term of a distillation's last stages (Lin et al. 2024, 2402.13929, section 3.3).

The square error makes of a student that cannot follow its teacher to the last detail one that
draws the mean of what might be. A discriminator that sees where a path began, z, and where it is
said to lead, z'', learns to tell the teacher's end from the student's; the student learns to be
taken for its teacher. It looks through the teacher's own UNet down to the middle, which stays.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxsd.diffusion.denoise import Conditioning
from jaxsd.diffusion.jumps import Level
from jaxsd.models.discriminator import FeatureDiscriminator
from jaxsd.nn import Net, Params
from jaxsd.objectives.distillation import Teacher, with_scale

PREFIX = "discriminator."  # of its parameters' names, among those that are trained


@dataclasses.dataclass
class Critic:
    """weight: how much it counts that the student is taken for its teacher, beside the error."""

    teacher: Teacher
    weight: float
    dtype: str = "float32"

    def __post_init__(self):
        self.net = Net(FeatureDiscriminator(self.teacher.net.config.block_out_channels[-1]))

    def init(self, key: jax.Array) -> Params:
        return {PREFIX + name: value for name, value in self.net.init(key).items()}

    def loss(
        self,
        params: Params,
        backbone: Params,
        path: tuple[jax.Array, Level, Level],
        ends: tuple[jax.Array, jax.Array],
        told: Conditioning,
        scale: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What student and discriminator each want, as one scalar, and what is logged of it.

        path: z [b, h, w, c], its level, and that of its end. ends: z'' of the teacher and of the
        student. The student minimises softplus(-D) of its own end, the discriminator softplus(-D)
        of the teacher's plus softplus(D) of the student's (Goodfellow et al. 2014, non-saturating).
        Each sees the other as a constant, so that the gradient of the sum is that of each loss by
        its own parameters. backbone: the teacher's parameters.
        """
        z, start, end = path
        own = {name: params[PREFIX + name] for name in self.net.shapes}
        unet = self.teacher.net
        told = with_scale(unet, told, scale)

        def seen(z: jax.Array, level: Level) -> jax.Array:
            return unet(backbone, z.astype(self.dtype), level.t, method="features", **told)

        origin, real, made = seen(z, start), seen(ends[0], end), seen(ends[1], end)

        def judged(own: Params, features: jax.Array) -> jax.Array:
            return self.net(own, origin, features).astype(jnp.float32)

        fooled = jax.nn.softplus(-judged(jax.lax.stop_gradient(own), made)).mean()
        on_real, on_made = judged(own, real), judged(own, jax.lax.stop_gradient(made))
        told_apart = jax.nn.softplus(-on_real).mean() + jax.nn.softplus(on_made).mean()
        metrics: dict[str, Any] = {
            "adversarial": fooled,
            "discriminator": told_apart,
            "logits_real": on_real.mean(),
            "logits_fake": on_made.mean(),
        }
        return self.weight * fooled + told_apart, metrics
