"""DreamBooth (Ruiz et al. 2022, 2208.12242): a few pictures of one thing, called by a rare word.

So that the thing's class does not become the thing, the model is held to pictures of the class that
it drew itself before the training: prior preservation, equation 2.
"""

import dataclasses

import jax.numpy as jnp

from jaxsd.nn import Params
from jaxsd.objectives import Batch, Now
from jaxsd.objectives.text_to_image import TextToImage

PRIOR = "prior."  # before the names of a batch's arrays: they are of the class's pictures


@dataclasses.dataclass
class DreamBooth(TextToImage):
    """A batch holds what one of `TextToImage` does, of the thing.

    With prior preservation it holds as many rows of the class, of the same shapes, behind "prior.".
    The loss is the mean over the thing's rows and `prior_weight` times that over the class's.
    """

    prior_weight: float = 1.0

    def loss(self, params: Params, aux, batch: Batch, now: Now):
        """The instance's loss plus `prior_weight` times the class's (2208.12242)."""
        prior = {n.removeprefix(PRIOR): v for n, v in batch.items() if n.startswith(PRIOR)}
        if not prior:
            return super().loss(params, aux, batch, now)
        # Row by row in turn, so that a device which holds both goes on with them: one pass for all
        both = {n: jnp.stack([batch[n], v], 1).reshape(-1, *v.shape[1:]) for n, v in prior.items()}
        errors, logged = self.errors(params, aux, both, now)
        own, kept = errors.reshape(-1, 2).mean(0)
        loss = own + self.prior_weight * kept
        return loss, {**logged, "loss_instance": own, "loss_prior": kept}
