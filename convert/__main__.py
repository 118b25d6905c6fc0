"""`python -m convert`."""

from convert.cli import app

if __name__ == "__main__":
    app()
