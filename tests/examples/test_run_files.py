"""The files of a training run: written in parts, read back the same."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from examples.tiny_flux.run_files import load_parts, save_parts
from flux_jax.errors import UserError


def test_parts_come_back_in_bfloat16(tmp_path):
    rng = np.random.default_rng(0)
    params = {f"w{i}": jnp.asarray(rng.standard_normal((8, 16), np.float32)) for i in range(5)}
    # 256 bytes each: two fit.
    save_parts(tmp_path, "flow", params, limit=600)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"flow.{i}.safetensors" for i in range(3)]
    loaded = load_parts(tmp_path, "flow")
    assert loaded.keys() == params.keys()
    for name, value in params.items():
        assert loaded[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(loaded[name], np.asarray(value.astype(jnp.bfloat16)))


def test_a_parameter_larger_than_a_part_gets_its_own(tmp_path):
    save_parts(tmp_path, "flow", {"large": jnp.ones(512), "small": jnp.ones(4)}, limit=100)
    assert len(list(tmp_path.iterdir())) == 2
    assert load_parts(tmp_path, "flow").keys() == {"large", "small"}


def test_no_parts(tmp_path):
    with pytest.raises(UserError, match=r"no flow\.\*\.safetensors in"):
        load_parts(tmp_path, "flow")
