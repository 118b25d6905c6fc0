"""`python -m pallas_kernels`."""

from pallas_kernels.cli import app

if __name__ == "__main__":
    app()
