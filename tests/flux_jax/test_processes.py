"""How a process of a job ends, by what went wrong in it."""

from __future__ import annotations

import sys

import pytest

from tests.jobs import start

SCRIPT = """
import logging, sys
from jax.errors import JaxRuntimeError
from flux_jax.processes import joined_processes
if sys.argv[1]:
    logging.getLogger("flux_jax").setLevel(logging.DEBUG)
with joined_processes():
    raise eval(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("error", "code", "message", "brief"),
    [
        (ValueError("Connection of layer 3"), 1, "error: process 0 of 1: Connection of", False),
        ("UNAVAILABLE: gone", 3, "error: process 0 of 1 ended in the middle of its work", True),
        (
            "RESOURCE_EXHAUSTED: 9 GB",
            1,
            "error: the device's memory is full: RESOURCE_EXHAUSTED: 9 GB",
            True,
        ),
    ],
    ids=["bug", "another lost", "memory full"],
)
def test_a_failure_is_told_for_what_it_is(error, code, message, brief):
    """A traceback where the fault is ours; else one line, and the traceback for --verbose."""
    raised = f"JaxRuntimeError({error!r})" if isinstance(error, str) else repr(error)
    for verbose in ("", "-v"):
        (job,) = start([sys.executable, "-c", SCRIPT, verbose, raised], count=1, devices=1)
        said = job.communicate(timeout=240)[1]
        assert job.returncode == code, said
        assert said.strip().splitlines()[-1].startswith(message), said
        assert ("Traceback" not in said) == (brief and not verbose), said
