"""Muon for the matrices, AdamW for the rest, over a flat dictionary of parameters.

Matrices of one shape are stacked, so that one batched Newton-Schulz iteration serves all of them:
thirteen shapes instead of some ninety matrices, which is what keeps the optimiser's share of a
step small.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import optax

from flux_jax.tree import Flat

# Embeddings and the first and last projections are not orthogonalised (K. Jordan's Muon notes).
_MATRICES = re.compile(r".*(blocks\.\d+\..*|_in\.out_layer|adaLN_modulation)\.weight")


def _is_matrix(name: str, value: jax.Array) -> bool:
    return value.ndim == 2 and _MATRICES.fullmatch(name) is not None


def _group_names(params: Flat) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(params):
        value = params[name]
        if _is_matrix(name, value):
            groups.setdefault("x".join(map(str, value.shape)), []).append(name)
    return groups


def _stack(tree: Flat, groups: dict[str, list[str]]) -> tuple[Flat, Flat]:
    stacked = {shape: jnp.stack([tree[n] for n in names]) for shape, names in groups.items()}
    grouped = {name for names in groups.values() for name in names}
    return stacked, {n: v for n, v in tree.items() if n not in grouped}


def stacked_muon(
    *, weight_decay: float = 0.01, max_norm: float = 1.0
) -> optax.GradientTransformation:
    """Muon with AdamW's step size (`consistent_rms`), and AdamW for what is not a matrix.

    The updates are those of a learning rate of 1; the caller scales them. So a schedule can be
    set, or changed, without compiling the step again.

    Args:
      weight_decay: of the matrices.
      max_norm: bound on the global gradient norm.
    """
    muon = optax.contrib.muon(
        1.0,
        weight_decay=weight_decay,
        consistent_rms=0.2,
        adam_b2=0.99,
        muon_weight_dimension_numbers={
            "matrices": optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1),
            "rest": None,
        },
    )

    def regroup(tree: Flat) -> dict[str, Flat]:
        matrices, rest = _stack(tree, _group_names(tree))
        return {"matrices": matrices, "rest": rest}

    def init(params: Flat) -> optax.OptState:
        return muon.init(regroup(params))

    def update(
        updates: Flat, state: optax.OptState, params: Flat | None = None
    ) -> tuple[Flat, optax.OptState]:
        if params is None:
            raise ValueError("stacked_muon needs the parameters (weight decay)")
        groups = _group_names(params)
        new, state = muon.update(regroup(updates), state, regroup(params))
        flat = dict(new["rest"])
        for shape, names in groups.items():
            flat.update({name: new["matrices"][shape][i] for i, name in enumerate(names)})
        return flat, state

    return optax.chain(
        optax.clip_by_global_norm(max_norm), optax.GradientTransformation(init, update)
    )
