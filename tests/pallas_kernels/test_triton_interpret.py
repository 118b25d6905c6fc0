"""The arithmetic of the Triton kernels, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install 'flux-jax[triton]'")
pytest.importorskip("torch", reason="the interpreter reads arrays of PyTorch")


@pytest.mark.slow
def test_every_form_is_as_exact_as_the_roundings():
    done = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.triton_interpret"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("ok: ") > 40
