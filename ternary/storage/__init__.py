"""Ternary tensors on disk: packing at 1.6 bits, checkpoints, latent weights."""
