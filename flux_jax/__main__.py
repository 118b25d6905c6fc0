"""`python -m flux_jax`: draw, evaluate, compare, look into checkpoints."""

from __future__ import annotations

from flux_jax.cli import main

if __name__ == "__main__":
    main()
