"""The commands of `python -m ternary`, one a file, and what several of them share."""
