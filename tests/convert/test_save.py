"""What `save_checkpoint` refuses, lest it be loaded as something else."""

import re

import pytest

from flux_jax.checkpoint import save_checkpoint
from flux_jax.errors import UserError
from ternary import Policy, QuantConfig, freeze_student, make_student
from tests.random_module import random_module
from tests.small_pipeline import TRANSFORMER


@pytest.mark.parametrize("learned", [False, True])
def test_a_student_is_not_saved_as_its_teacher(tmp_path, learned):
    """Its latent weights have the names and shapes of a dense transformer's."""
    teacher = random_module("transformer", TRANSFORMER)
    policy = Policy(include=("single_blocks.*",))
    student = make_student(teacher, QuantConfig(learned_scale=learned), policy)
    for module in (student, freeze_student(student)):
        kind = type(module.single_blocks[0].linear1).__name__
        message = rf"`single_blocks\.0\.\w+`, a {kind}, .*`ternary\.save_checkpoint` writes"
        with pytest.raises(UserError, match=message):
            save_checkpoint(tmp_path / "x", {"transformer": module})
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path / "x", {"transformer": teacher})


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_3"])
def test_a_tokenizer_that_would_be_lost_is_refused(tmp_path, name):
    """A folder that is not there would be copied as an empty one."""
    folder = tmp_path / "tokenizer_1"
    if name == "tokenizer_3":
        folder.mkdir()
    modules = {"transformer": random_module("transformer", TRANSFORMER)}
    with pytest.raises(UserError, match=re.escape(f"got '{name}': {folder}")):
        save_checkpoint(tmp_path / "x", modules, tokenizers={name: folder})
    assert not (tmp_path / "x").exists()


def test_a_tokenizers_path_may_be_text(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    modules = {"transformer": random_module("transformer", TRANSFORMER)}
    save_checkpoint(tmp_path / "x", modules, tokenizers={"tokenizer": str(tmp_path / "t")})
    assert (tmp_path / "x" / "tokenizer" / "tokenizer.json").is_file()
