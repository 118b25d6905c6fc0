"""What tells a checkpoint's weights from others."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from ternary.storage.source import weights_crc32
from tests.small_pipeline import small_folder
from tests.ternary.teacher_files import negate_tensor


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("teacher") / "m")


@pytest.mark.parametrize(
    ("component", "tensor"),
    [
        # A row of the middle, or of the end, of a matrix that is joined of several.
        ("transformer", "transformer_blocks.0.attn.to_k.weight"),
        ("transformer", "transformer_blocks.0.attn.to_v.weight"),
        ("transformer", "single_transformer_blocks.0.proj_mlp.weight"),
        ("transformer", "x_embedder.bias"),
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.v.weight"),
        ("vae", "decoder.conv_in.weight"),
    ],
)
def test_one_other_tensor_makes_another_name(teacher, tmp_path, component, tensor):
    """A fine-tuned teacher may differ in some matrices of the attention alone."""
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    dtype = np.dtype(np.float32)
    assert weights_crc32(other, dtype) == weights_crc32(teacher, dtype)
    negate_tensor(other / component, tensor)
    assert weights_crc32(other, dtype) != weights_crc32(teacher, dtype)
