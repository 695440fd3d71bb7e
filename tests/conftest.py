"""Strictness that tests pay and users do not.

Types and array shapes in annotations are checked at run time, dtypes and ranks are promoted
explicitly or not at all, and the machine pretends to have four CPU devices. Warnings are errors,
with the exceptions in pyproject.toml.
"""

import os

# Before jax is imported: it reads these once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Stays installed: every module of the package is checked, whichever test imports it first.
install_import_hook("jaxsd", "beartype.beartype")
