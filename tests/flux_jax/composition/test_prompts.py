"""The committed evaluation prompts: what the generator writes, and what they promise."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from examples.tiny_flux.scenes import sample_captions, sample_claim
from flux_jax.composition import prompts
from flux_jax.composition.prompts import CATEGORIES, held_out_kind, load_prompts, normalise


def test_the_committed_file_is_what_the_generator_writes(tmp_path):
    committed = Path(prompts.__file__).parent / "data" / "prompts.jsonl"
    prompts.write_prompts(tmp_path / "prompts.jsonl")
    assert (tmp_path / "prompts.jsonl").read_text() == committed.read_text()
    assert load_prompts() == prompts.generate_prompts()


def test_every_category_has_at_least_a_hundred():
    counts = Counter(prompt.category for prompt in load_prompts())
    assert set(counts) == set(CATEGORIES)
    assert min(counts.values()) >= 100


def test_no_prompt_occurs_twice():
    texts = [normalise(prompt.prompt) for prompt in load_prompts()]
    assert len(set(texts)) == len(texts)


def test_marks_say_what_is_held_out():
    kinds = Counter()
    for prompt in load_prompts():
        assert prompt.held_out == held_out_kind(prompt.spec)
        kinds[prompt.category, prompt.held_out] += 1
    for category in ("counting", "colors", "color_attribution"):
        assert kinds[category, "pair"] == 24
    assert kinds["position", "arrangement"] == 24


def test_training_claims_hold_nothing_held_out():
    rng = random.Random(0)
    kinds = Counter(held_out_kind(sample_claim(rng)) for _ in range(5000))
    assert set(kinds) == {"string"}


def test_training_captions_avoid_the_prompts():
    """Without the sampler's filter some hundred of these captions would be prompts."""
    held_out = {normalise(prompt.prompt) for prompt in load_prompts()}
    captions, _ = sample_captions(seed=0, chunk=0, count=8192)
    assert held_out.isdisjoint(map(normalise, captions))


@pytest.mark.parametrize("text", ["A photo of a  Star.", "a photo of a star"])
def test_normalise(text):
    assert normalise(text) == "a photo of a star"


@pytest.mark.parametrize("prompt", load_prompts()[::7], ids=lambda prompt: prompt.prompt)
def test_prompts_name_what_they_specify(prompt):
    words = prompt.prompt.split()
    numbers = {1: {"a", "an"}, 2: {"two"}, 3: {"three"}, 4: {"four"}}
    for group in prompt.spec.groups:
        noun = group.shape if group.count == 1 else prompts.PLURALS[group.shape]
        phrase = [word for word in (group.size, group.color, noun) if word]
        starts = [
            at for at in range(len(words)) if words[at : at + len(phrase)] == phrase and at > 0
        ]
        assert any(words[at - 1] in numbers[group.count] for at in starts)
    assert (prompt.spec.relation or "") in prompt.prompt
    assert (prompt.spec.background or "") in prompt.prompt
