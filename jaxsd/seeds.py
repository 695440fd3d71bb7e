"""Which seeds there are: those that fit the 32 bits of a key of jax.random."""

SEEDS = 2**32  # from 0 to one less
