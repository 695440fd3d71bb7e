"""What a program calls besides arithmetic, and what it may."""

import re

from jax import export

from jaxsd.errors import JaxsdError

# What a program may call besides arithmetic: kernels of XLA and Pallas that compute on a device.
# Above all no `..._callback`: that is an address in memory, which is jumped to.
KERNELS = (
    *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement"),
    *("cu_threefry2x32_ffi", "__gpu$xla.gpu.triton", "tpu_custom_call"),
    *("__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax"),
)


def custom_calls(exported: export.Exported) -> set[str]:
    """Their names, "" for one that cannot be read; JaxsdError for a program that may hide some."""
    data = exported.mlir_module_serialized
    # In bytecode names stand as they are, and text, which could hide them, is not taken.
    if not data.startswith(b"ML\xefR"):
        raise JaxsdError("it is not in bytecode")
    if b"custom_call" not in data:
        return set()
    # What is not written as XLA's printer writes it counts as "", which is none of ours.
    return set(re.findall(r"custom_call(?: @\"?([^\"(\s]+))?", exported.mlir_module()))
