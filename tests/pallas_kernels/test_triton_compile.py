"""The Triton kernels, compiled ahead of time for cards that are not here."""

import re

import pytest

from pallas_kernels.tiles import Problem, triton_rule
from tests.pallas_kernels.triton_compile import SHARED_BYTES, compile_for, compile_heads

pytest.importorskip("triton", reason="needs Triton: pip install 'flux-jax[triton]'")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("m", [1, 16, 64, 4608])
@pytest.mark.parametrize("capability", [80, 86, 89, pytest.param(90, marks=pytest.mark.long)])
def test_nothing_is_spilled_and_shared_memory_suffices(
    capability, m, bits, grouped, record_property
):
    problem = Problem(m=m, n=3072, k=3072, activation_bits=bits, grouped=grouped)
    took = compile_for(capability, triton_rule(problem), problem)
    kind = f"A{bits}{' grouped' * grouped}"
    record_property(
        "measured",
        f"Triton sm_{capability}, {kind:11}, {m:4} tokens: {took.registers:3} registers, "
        f"{took.stack} bytes of stack, {took.shared:6} bytes of shared memory",
    )
    assert took.stack == 0
    assert took.shared <= SHARED_BYTES[capability]


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("m", [1, 64, 4608])
@pytest.mark.parametrize("capability", [80, 89, pytest.param(90, marks=pytest.mark.long)])
def test_a_low_rank_branch_finds_room(capability, m, bits, rank):
    problem = Problem(m=m, n=3072, k=3072, activation_bits=bits)
    took = compile_for(capability, triton_rule(problem), problem, rank=rank)
    assert took.stack == 0
    assert took.shared <= SHARED_BYTES[capability]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("m", [1, 4608])
def test_operands_are_copied_in_wide_pieces_while_others_are_multiplied(m, bits):
    """No weight or activation passes through a load that the multiplication waits for."""
    problem = Problem(m=m, n=3072, k=3072, activation_bits=bits)
    ptx = compile_for(80, triton_rule(problem), problem).ptx
    assert "cp.async.cg.shared.global" in ptx
    assert set(re.findall(r"cp\.async\.\w+\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)) == {
        "0x10"
    }
    # Byte loads are what an unknown alignment leads to.
    assert not re.findall(r"ld\.global\S*\.[bsu]8\b", ptx)


@pytest.mark.parametrize("m", [1, 300])
def test_integers_that_are_one_are_constants(m):
    problem = Problem(m=m, n=3072, k=256, activation_bits=8)
    assert compile_for(80, triton_rule(problem), problem, gates=m).stack == 0


@pytest.mark.parametrize("bits", [8, 16])
def test_hopper_multiplies_with_its_own_instructions(bits):
    problem = Problem(m=4608, n=3072, k=3072, activation_bits=bits)
    assert "wgmma.mma_async" in compile_for(90, triton_rule(problem), problem).ptx


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("lengths", [(4608,), (512, 4096)])
@pytest.mark.parametrize("groups", [None, 2, 4])
def test_heads_are_read_and_written_in_wide_pieces(capability, lengths, groups, record_property):
    took = compile_heads(capability, lengths, heads=24, width=128, groups=groups)
    record_property(
        "measured",
        f"Triton sm_{capability}, heads of {len(lengths)} sequences in {groups or 'no'} groups: "
        f"{took.registers} registers, "
        f"{took.stack} bytes of stack, {took.shared} bytes of shared memory",
    )
    assert took.stack == 0
    assert took.shared <= SHARED_BYTES[capability]
    # Of a thread, 16 bytes of each of q, k and v; the rest are scales, cosines and sines.
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", took.ptx)) >= 3
    assert len(re.findall(r"st\.global\S*\.v4\.b32", took.ptx)) == 3
    assert not re.findall(r"ld\.global\S*\.[bsu](8|16)\b", took.ptx)


def test_triton_is_given_bare_functions():
    """Not the checks of shapes that a test run puts around them, which it could not compile."""
    from pallas_kernels import triton_heads_kernel, triton_kernels

    for module, function in (
        (triton_kernels, triton_kernels.multiply_many),
        (triton_kernels, triton_kernels.multiply_few),
        (triton_heads_kernel, triton_heads_kernel.normalize_and_rotate),
        (triton_heads_kernel, triton_heads_kernel.normalize_and_rotate_grouped),
    ):
        assert not hasattr(function.fn, "__wrapped__")
        assert function.fn.__globals__ is vars(module)
