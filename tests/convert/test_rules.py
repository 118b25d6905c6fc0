"""Rules, maps and plans: inversion, totality, and what a bad table or a bad source is told."""

import numpy as np
import pytest

from convert.plan import backward_plan, forward_plan
from convert.rules import Ignored, Map, Rule
from convert.tensors import Assembled, read_whole
from convert.transforms import CONV_TO_LINEAR, IDENTITY, SWAP_HALVES, Rows
from flux_jax.errors import UserError
from tests.convert.models import Arrays, check_cover

TABLE = Map(
    name="test",
    rules=(
        Rule("blocks.{i}.q.{p}", "b.{i}.qkv.{p}", Rows(0, of=3)),
        Rule("blocks.{i}.k.{p}", "b.{i}.qkv.{p}", Rows(1, of=3)),
        Rule("blocks.{i}.v.{p}", "b.{i}.qkv.{p}", Rows(2, of=3)),
        Rule("mlp.weight", "fused.weight", Rows(1, sizes=(2, 3))),
        Rule("attn.weight", "fused.weight", Rows(0, sizes=(2, 3))),
        Rule("norm.weight", "mod.weight", SWAP_HALVES),
        Rule("conv.weight", "lin.weight", CONV_TO_LINEAR),
        Rule("scale", "scale"),
    ),
    ignored=(Ignored("ids", "computed"), Ignored("copy", "tied", same_as="scale")),
    prefixes=("model.",),
)
OURS = {
    "b.0.qkv.weight": (6, 2),
    "b.0.qkv.bias": (6,),
    "fused.weight": (5, 2),
    "mod.weight": (4, 3),
    "lin.weight": (3, 2),
    "scale": (),
}


def theirs() -> dict[str, tuple[int, ...]]:
    return {a.name: a.shape for a in backward_plan(TABLE, OURS).assemblies}


def test_values_land_where_the_transforms_say():
    rng = np.random.default_rng(0)
    stored = {n: rng.standard_normal(s).astype(np.float32) for n, s in theirs().items()}
    plan = forward_plan(TABLE, {n: a.shape for n, a in stored.items()}, OURS, what="w")
    reader = Assembled(Arrays(stored), plan.assemblies, None, what="w")
    ours = {name: read_whole(reader, name) for name in reader.specs}
    qkv = [stored[f"blocks.0.{part}.weight"] for part in "qkv"]
    np.testing.assert_array_equal(ours["b.0.qkv.weight"], np.concatenate(qkv))
    both = [stored["attn.weight"], stored["mlp.weight"]]
    np.testing.assert_array_equal(ours["fused.weight"], np.concatenate(both))
    np.testing.assert_array_equal(ours["mod.weight"], np.roll(stored["norm.weight"], 2, axis=0))
    np.testing.assert_array_equal(ours["lin.weight"], stored["conv.weight"][:, :, 0, 0])
    np.testing.assert_array_equal(ours["scale"], stored["scale"])


def test_back_and_forth_is_the_identity():
    rng = np.random.default_rng(0)
    ours = {n: rng.standard_normal(s).astype(np.float32) for n, s in OURS.items()}
    back = backward_plan(TABLE, OURS)
    stored = Assembled(Arrays(ours), back.assemblies, None, what="w")
    shapes = {name: spec.shape for name, spec in stored.specs.items()}
    forward = forward_plan(TABLE, shapes, OURS, what="w")
    for plan in (back, forward):
        check_cover(plan.assemblies)
    again = Assembled(stored, forward.assemblies, None, what="w")
    for name, value in ours.items():
        np.testing.assert_array_equal(read_whole(again, name), value)


def test_a_prefix_is_stripped_and_what_is_ignored_is_told():
    sources = {f"model.{name}": shape for name, shape in theirs().items()} | {"ids": (7,)}
    plan = forward_plan(TABLE, sources, OURS, what="w")
    assert plan.dropped == (("ids", "computed"),)
    assert {p.source for a in plan.assemblies for p in a.pieces} == set(sources) - {"ids"}


def test_tied_weights_are_to_be_compared_or_stand_in():
    both = forward_plan(TABLE, theirs() | {"copy": ()}, OURS, what="w")
    assert both.ties == (("copy", "scale"),)
    alone = theirs() | {"copy": ()}
    del alone["scale"]
    plan = forward_plan(TABLE, alone, OURS, what="w")
    assert plan.ties == ()
    assert plan.assemblies[-1].pieces[0].source == "copy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, r"`norm.weight` is missing, expected shape \[4, 3\]"),
        ({"extra": (1, 2)}, r"`extra` of shape \[1, 2\] is not expected \(no rule"),
        ({"blocks.7.q.bias": (2,)}, r"it would be `b.7.qkv.bias`, which the model"),
        ({"norm.weight": (4, 4)}, r"`norm.weight` has shape \[4, 4\], expected \[4, 3\]"),
        ({"model.scale": ()}, "`scale` and `model.scale` are the same one twice"),
    ],
)
def test_every_kind_of_misfit_is_named(change, message):
    sources = {n: s for n, s in (theirs() | change).items() if s is not None}
    with pytest.raises(UserError, match=f"^vae of x: 1 problem: .*{message}"):
        forward_plan(TABLE, sources, OURS, what="vae of x")


def test_all_problems_come_in_one_report():
    sources = {f"stray{i}": (1,) for i in range(9)}
    with pytest.raises(UserError, match="20 problems: .*; and 14 more$"):
        forward_plan(TABLE, sources, OURS, what="w")


def test_a_template_is_read_either_way():
    rule = Rule("{i}.x+{k|v.}.{j}.{p}", "{k|v.}:{j}.{i}.{p}")
    assert rule.target_of("3.x+v..12.bias") == "v.:12.3.bias"
    assert rule.source_of("v.:12.3.bias") == "3.x+v..12.bias"
    for stranger in ("3.x+vx.12.bias", "3.xxk.12.bias", "a.x+k.1.bias", "3.x+k.12.biases"):
        assert rule.target_of(stranger) is None


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a.{i}", "x", "a place is on one side alone"),
        ("a", "x.{i}", "a place is on one side alone"),
        ("a.{k}", "x.{k}", "'a.{k}': a place is one of i, j, p, name or words as a|b"),
        ("a.{i}.{i}", "x.{i}", "'a.{i}.{i}': a place is one of .* each once"),
        ("a{b", "x", "'a{b': a place is one of"),
        ("a.{}", "x.{}", "'a.{}': a place is one of"),
    ],
)
def test_a_rule_that_cannot_be_inverted_is_refused(source, target, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("|", r"\|")):
        Rule(source, target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rows(0), "exactly one of `of` and `sizes`"),
        (lambda: Rows(0, of=2, sizes=(1,)), "exactly one of `of` and `sizes`"),
        (lambda: Rows(2, of=2), "part 2 is outside its 2 parts"),
        (lambda: Rows(0, of=3).source_shape((4, 2)), "does not split into 3 equal parts"),
        (lambda: Rows(0, sizes=(1, 2)).source_shape((4,)), r"\(1, 2\) rows do not add up to the 4"),
        (lambda: Rows(0, of=2).source_shape(()), "a scalar has no rows"),
        (lambda: SWAP_HALVES.source_shape((3,)), "no two halves"),
        (lambda: CONV_TO_LINEAR.source_shape((3, 2, 1, 1)), "no linear weight"),
    ],
)
def test_a_transform_refuses_what_it_cannot_place(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_linear_is_filled_from_a_1x1_convolution():
    assert CONV_TO_LINEAR.source_shape((3, 2)) == (3, 2, 1, 1)


def test_a_table_with_two_rules_for_one_source_is_refused():
    table = Map("t", (Rule("a.{i}", "x.{i}"), Rule("a.{1|2}", "y.{1|2}")))
    with pytest.raises(ValueError, match="'a.1' matches 2 rules"):
        table.target_of("a.1")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((), "no rule fills 'x'"),
        ((Rule("a", "x", Rows(0, of=2)),), "not covered exactly once"),
        ((Rule("a", "x"), Rule("b", "x")), "not covered exactly once"),
        ((Rule("a", "x", Rows(0, of=2)), Rule("b", "x", Rows(1, of=3))), "not covered exactly"),
    ],
)
def test_a_table_that_does_not_cover_a_target_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        Map("t", rules).sources_of("x", (6,))


def test_a_table_that_does_not_lead_back_is_refused():
    with pytest.raises(ValueError, match="matches 2 rules"):
        backward_plan(Map("t", (Rule("a", "x"), Rule("a", "y"))), {"x": (1,)})


def test_cover_finds_a_gap():
    plan = backward_plan(Map("t", (Rule("a", "x", IDENTITY),)), {"x": (2,)})
    piece = plan.assemblies[0].pieces[0]
    cut = piece.runs[0]._replace(rows=1)
    broken = type(plan.assemblies[0])("a", (2,), (type(piece)("x", (2,), (cut,)),))
    with pytest.raises(ValueError, match="1 of 2 rows are filled"):
        check_cover([broken])
