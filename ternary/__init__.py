"""Ternary weights: quantiser, layers, formats, checkpoints, `python -m ternary`."""
