"""The proof itself: it passes what is right, and catches what is wrong."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import checking
from pallas_kernels.checking import Case

A8 = Case(m=9, n=24, k=300, gelu=True, extras=True)
EVERY = [
    Case(m=m, n=24, k=300, activation_bits=bits, granularity=granularity, out_dtype=out)
    for m in (1, 9)
    for bits in (8, 16)
    for granularity in ("tensor", "channel", "group")
    for out in ("bfloat16", "float32")
]


def right(case, **arrays):
    return checking.public_op("jax")(case, **arrays)


@pytest.mark.parametrize("case", [A8, *EVERY], ids=str)
def test_plain_jax_passes(case):
    assert checking.check(case, "jax", right).passed


@pytest.mark.parametrize("codes", "012")
def test_each_code_alone(codes):
    case = Case(m=7, n=24, k=300, integers=True, out_dtype="float32", codes=codes)
    made = checking.make(case)
    assert (made["codes"] == int(codes)).all()
    assert checking.check(case, "jax", right).passed


def nearly(case, **arrays):
    """Off by two units of bfloat16 in one place."""
    y = np.array(right(case, **arrays))
    y[0, 3] *= 1 + 2.0**-6
    return y


def unwritten(case, **arrays):
    y = np.array(right(case, **arrays))
    y[8, 23] = np.nan
    return y


def swallowed(case, **arrays):
    """inf and NaN of the input lost."""
    return np.nan_to_num(np.array(right(case, **arrays)).astype(np.float32)).astype(jnp.bfloat16)


@pytest.mark.parametrize("wrong", [nearly, unwritten, swallowed])
def test_what_is_wrong_is_caught(wrong):
    outcome = checking.check(A8, "jax", wrong)
    assert outcome.error > 1
    assert not outcome.passed


def test_another_result_in_a_second_run_is_caught():
    results = iter([0.0, 2.0**-24])

    def unsteady(case, **arrays):
        return np.asarray(right(case, **arrays)) + np.float32(next(results))

    case = Case(m=3, n=24, k=300, out_dtype="float32")
    outcome = checking.check(case, "jax", unsteady)
    assert not outcome.repeats
    assert not outcome.passed


def test_integers_must_be_exact():
    case = Case(m=3, n=24, k=300, integers=True, out_dtype="float32")

    def off(case, **arrays):
        return np.asarray(right(case, **arrays)) + np.float32(1)

    assert checking.check(case, "jax", right).error == 0
    assert not checking.check(case, "jax", off).passed
