"""What `save_checkpoint` refuses, lest it be loaded as something else."""

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
