"""What a transformer is called with; `tests/parity` compares what it computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.rope import image_ids, text_ids
from flux_jax.transformer import check_inputs
from tests.random_module import random_module
from tests.small_pipeline import TRANSFORMER


def inputs(**changed):
    given = {
        "img": jnp.ones((2, 4, 16)),
        "img_ids": image_ids(2, 2),
        "txt": jnp.ones((2, 5, 24)),
        "txt_ids": text_ids(5),
        "timesteps": jnp.ones(2),
        "y": jnp.ones((2, 16)),
        "guidance": jnp.ones(2),
    }
    return {**given, **changed}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("img", jnp.ones((4, 16)), r"img must have shape \(batch, image tokens, 16\), got \(4, 16"),
        ("img", jnp.ones((1, 4, 16)), r"txt must have shape \(batch=1, text .*, got \(2, 5, 24\)"),
        ("img_ids", np.ones((1, 4, 3)), r"img_ids must have shape \(image tokens=4, 3\), got \(1,"),
        ("img_ids", image_ids(2, 3), r"img_ids must have shape \(image tokens=4, 3\), got \(6, 3"),
        ("txt", jnp.ones((2, 5, 8)), r"txt must have shape \(batch=2, text tokens, 24\), got .* 8"),
        ("txt_ids", text_ids(4), r"txt_ids must have shape \(text tokens=5, 3\), got \(4, 3\)"),
        ("timesteps", 0.5, r"timesteps must have shape \(batch=2\), got \(\)"),
        ("timesteps", jnp.ones(1), r"timesteps must have shape \(batch=2\), got \(1,\)"),
        ("y", jnp.ones((2, 8)), r"y must have shape \(batch=2, 16\), got \(2, 8\)"),
        ("guidance", jnp.ones(4), r"guidance must have shape \(batch=2\), got \(4,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_inputs(TRANSFORMER, inputs(**{name: value}))


def test_inputs_that_fit():
    check_inputs(TRANSFORMER, inputs())
    check_inputs(TRANSFORMER, inputs(guidance=None))


def test_a_call_checks_its_inputs_before_it_computes():
    module = random_module("transformer", TRANSFORMER, jnp.float32)
    with pytest.raises(ValueError, match=r"^txt must have shape \(batch=2, text tokens, 24\)"):
        jax.eval_shape(lambda given: module(**given), inputs(txt=jnp.ones((2, 5, 8))))
