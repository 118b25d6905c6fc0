"""The stacked Muon: the same updates as optax's Muon on each matrix and AdamW on the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.tiny_flux.optimizer import stacked_muon

# Two matrices of one shape, one of another, and what Muon must leave to AdamW.
SHAPES = {
    "transformer.double_blocks.0.img_attn.qkv.weight": (12, 4),
    "transformer.double_blocks.1.img_attn.qkv.weight": (12, 4),
    "transformer.single_blocks.0.linear1.weight": (4, 8),
    "transformer.time_in.out_layer.weight": (4, 4),
    "transformer.double_blocks.0.img_attn.qkv.bias": (12,),
    "transformer.img_in.weight": (4, 8),
    "text_encoder.token_embedding.weight": (6, 4),
}
MATRICES = list(SHAPES)[:4]
WEIGHT_DECAY = 0.05


def draw(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(s, np.float32)) for k, s in SHAPES.items()}


def updates(optimizer: optax.GradientTransformation, params, gradients) -> list:
    """The update of each of a row of gradients."""
    state, found = optimizer.init(params), []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params)
        found.append(update)
    return found


def test_same_as_optax_matrix_by_matrix():
    params, gradients = draw(0), [draw(1), draw(2)]
    stacked = updates(stacked_muon(weight_decay=WEIGHT_DECAY, max_norm=1e9), params, gradients)
    dims = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    for name in SHAPES:
        alone = optax.contrib.muon(
            1.0,
            weight_decay=WEIGHT_DECAY,
            consistent_rms=0.2,
            adam_b2=0.99,
            muon_weight_dimension_numbers={name: dims if name in MATRICES else None},
        )
        expected = updates(alone, {name: params[name]}, [{name: g[name]} for g in gradients])
        for step, (ours, theirs) in enumerate(zip(stacked, expected, strict=True)):
            np.testing.assert_allclose(
                ours[name], theirs[name], rtol=2e-5, atol=2e-6, err_msg=f"{name}, update {step}"
            )


def test_matrices_are_orthogonalised():
    """Without decay, a matrix's first update has singular values near one another."""
    name = MATRICES[0]
    (update,) = updates(stacked_muon(weight_decay=0.0), draw(0), [draw(1)])
    singular = np.linalg.svd(update[name], compute_uv=False)
    assert singular.max() / singular.min() < 2.0
    gradient = np.linalg.svd(draw(1)[name], compute_uv=False)
    assert gradient.max() / gradient.min() > 2.0, "the gradient itself must not be that"


def test_gradients_are_clipped_together():
    """A huge gradient counts, in all that follows, as one of norm `max_norm`."""
    huge = {name: 1e3 * value for name, value in draw(1).items()}
    norm = optax.tree.norm(huge)
    clipped = {name: 2.0 * value / norm for name, value in huge.items()}
    small = {name: 1e-3 * value for name, value in draw(2).items()}
    (_, found), (_, expected), (_, unbounded) = (
        updates(stacked_muon(max_norm=bound), draw(0), [first, small])
        for bound, first in ((2.0, huge), (1e9, clipped), (1e9, huge))
    )
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
        assert not np.allclose(found[name], unbounded[name], rtol=1e-2), name


def test_parameters_are_needed():
    optimizer = stacked_muon()
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(draw(1), optimizer.init(draw(0)))
