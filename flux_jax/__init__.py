"""FLUX.1 in flax.nnx."""
