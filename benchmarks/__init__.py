"""Measured comparisons. Run from the root: `python -m benchmarks.transformer_step`."""
