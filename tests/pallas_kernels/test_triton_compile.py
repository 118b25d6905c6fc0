"""The Triton kernel, compiled ahead of time for cards that are not here."""

import pytest

from pallas_kernels.tiles import Problem, triton_rule
from tests.pallas_kernels.triton_compile import SHARED_BYTES, compile_for

pytest.importorskip("triton", reason="needs Triton: pip install 'flux-jax[triton]'")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("m", [1, 64, 4608])
@pytest.mark.parametrize("capability", [80, 86, 89])
def test_nothing_is_spilled_and_shared_memory_suffices(capability, m, bits, grouped, capsys):
    tile = triton_rule(Problem(m, 3072, 3072, bits, grouped))
    took = compile_for(capability, tile, activation_bits=bits, grouped=grouped)
    with capsys.disabled():
        print(f"\nsm_{capability} M={m} A{bits}{' grouped' * grouped}: {took}")
    assert took.stack == 0
    assert took.shared <= SHARED_BYTES[capability]
