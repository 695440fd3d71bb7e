"""Forms for NVIDIA GPUs: attention by cuDNN, which never writes the scores to memory."""

import jax
import jax.numpy as jnp


def flash(shape: tuple[int, ...], keys: int, dtype: jnp.dtype) -> bool:
    """Whether cuDNN's fused attention takes this shape, on this GPU, and is worth a call.

    It computes half precision, with heads of up to 128 channels (256 from Hopper on), in eights.
    """
    device = jax.devices()[0]
    if "NVIDIA" not in device.device_kind or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    capability = float(device.compute_capability)
    most = 256 if capability >= 9 else 128
    channels = shape[-1]
    return capability >= 8 and channels <= most and channels % 8 == 0 and shape[1] * keys >= 1 << 14
