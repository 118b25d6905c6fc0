"""GPU tests are collected when they are asked for: `pytest -m gpu`."""

import os

# Set by the conftest.py above, from the command line.
_ON_GPU = os.environ.get("FLUX_JAX_TEST_PLATFORM") == "gpu"
collect_ignore = [] if _ON_GPU else ["test_gpu.py"]
