"""How much each noise level counts in a loss on denoising."""

import jax
import jax.numpy as jnp

from jaxsd.diffusion.schedule import BOTH, MIN_ALPHA

WEIGHTINGS = ("none", "min-snr", "snr+1", "truncated-snr")


def loss_weight(
    weighting: str, prediction_type: str, alpha: jax.Array, sigma: jax.Array, gamma: float = 5.0
) -> jax.Array:
    """What the square error of a prediction is multiplied by, of the shape of `alpha`.

    A weighting is one of the error in x, whatever the network predicts: "min-snr" is
    min(SNR, gamma) (Hang et al. 2023, 2303.09556), "snr+1" and "truncated-snr", max(SNR, 1), are
    those of Salimans & Ho 2022, section 4. The errors in eps and v are SNR and SNR + 1 times that
    in x, so min-snr becomes min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v.
    "both" counts as v. "none" is 1 for the prediction as it is. An SNR beyond exp(-20) or exp(20)
    counts as that.
    """
    if weighting == "none":
        return jnp.ones_like(alpha)
    # SNR = signal / noise, and signal + noise = 1: both sides of the fraction times the noise
    signal, noise = (jnp.maximum(jnp.square(a), MIN_ALPHA**2) for a in (alpha, sigma))
    weights = {
        "min-snr": jnp.minimum(signal, gamma * noise),
        "snr+1": jnp.ones_like(alpha),
        "truncated-snr": jnp.maximum(signal, noise),
    }
    one = jnp.ones_like(alpha)
    errors = {"epsilon": signal, "sample": noise, "v_prediction": one, BOTH: one}
    return weights[weighting] / errors[prediction_type]
