"""Commands of `python -m ternary` that have a file of their own."""
