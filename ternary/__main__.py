"""`python -m ternary`."""

from ternary.cli import app

if __name__ == "__main__":
    app()
