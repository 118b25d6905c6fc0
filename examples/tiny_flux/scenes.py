"""Training scenes with captions, drawn in bulk: token ids and scene arrays, never pixels.

    python -m examples.tiny_flux.scenes --count 1000000 --out scenes.npz --workers 16
    python -m examples.tiny_flux.scenes --count 16384 --seed 17 --prompts prompts.txt

Chunk number i of a seed is always the same, whatever the number of workers. No held-out pair or
arrangement is ever drawn, and no caption equals an evaluation prompt (`normalise`d).
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Int16
from tqdm import tqdm

from examples.tiny_flux.captions import write_caption
from examples.tiny_flux.tokenizers import CLIP_END, T5_MAX_LENGTH, rust_tokenizers
from flux_jax.composition.claim import Claim, Group
from flux_jax.composition.layout import realise
from flux_jax.composition.prompts import load_prompts, normalise
from flux_jax.composition.scene import SceneArrays
from flux_jax.composition.vocabulary import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    is_held_out_arrangement,
    is_held_out_pair,
)

CHUNK = 8192
T5_LENGTH = T5_MAX_LENGTH  # with </s>; the longest caption of the grammar fits
CLIP_LENGTH = 42  # with <|startoftext|> and <|endoftext|>

# Shares of the training captions: most to what a small model learns last.
CATEGORIES = {
    "single": 0.04,
    "color": 0.08,
    "two": 0.10,
    "counting": 0.20,
    "two_counts": 0.10,
    "position": 0.28,
    "attribution": 0.13,
    "many": 0.07,
}


def _allowed_colors(shape: str) -> tuple[str, ...]:
    return tuple(color for color in COLORS if not is_held_out_pair(color, shape))


ALLOWED_COLORS = {shape: _allowed_colors(shape) for shape in SHAPES}


def _group(
    rng: random.Random, *, count: int = 1, named: float = 1.0, shape: str | None = None
) -> Group:
    """A random group whose colour is stated with probability `named`."""
    shape = shape or rng.choice(SHAPES)
    return Group(
        shape=shape,
        count=count,
        color=rng.choice(ALLOWED_COLORS[shape]) if rng.random() < named else None,
        size=rng.choice(SIZES) if rng.random() < 0.12 else None,
    )


def _groups(rng: random.Random, counts: tuple[int, ...], named: float) -> tuple[Group, ...]:
    """Groups that a caption can tell apart; `named` decides for all of them, mostly."""
    share = 1.0 if rng.random() < named else rng.choice((0.0, 0.0, 0.5))
    while True:
        groups = tuple(_group(rng, count=count, named=share) for count in counts)
        keys = {(group.shape, group.color) for group in groups}
        shapes = [group.shape for group in groups]
        unnamed = any(group.color is None and shapes.count(group.shape) > 1 for group in groups)
        if len(keys) == len(groups) and not unnamed:
            return groups


def sample_claim(rng: random.Random) -> Claim:
    """One claim of the training mix, free of held-out pairs and arrangements."""
    category = rng.choices(tuple(CATEGORIES), tuple(CATEGORIES.values()))[0]
    background = rng.choice(tuple(BACKGROUNDS)) if rng.random() < 0.2 else None
    relation = None
    if category == "single":
        groups = (_group(rng, named=0.0),)
    elif category == "color":
        groups = (_group(rng),)
    elif category == "two":
        groups = _groups(rng, (1, 1), named=0.35)
    elif category == "counting":
        count = rng.choices((1, 2, 3, 4), (1, 3, 4, 4))[0]
        groups = (_group(rng, count=count, named=0.6),)
    elif category == "two_counts":
        counts = rng.choice(((2, 1), (3, 1), (2, 2), (1, 2), (1, 3)))
        groups = _groups(rng, counts, named=0.8)
    elif category == "many":
        groups = _groups(
            rng, rng.choice(((1, 1, 1), (1, 1, 1), (1, 1, 1, 1), (2, 1, 1))), named=0.9
        )
    elif category == "attribution":
        while True:
            groups = _groups(rng, (1, 1), named=1.0)
            if groups[0].color != groups[1].color:
                break
    else:
        while True:
            groups = _groups(rng, (1, 1), named=0.65)
            relation = rng.choice(RELATIONS)
            if not is_held_out_arrangement(relation, groups[0].shape, groups[1].shape):
                break
    return Claim(groups=groups, relation=relation, background=background)


@cache
def evaluation_strings() -> frozenset[str]:
    """The prompts that training never sees."""
    return frozenset(normalise(prompt.prompt) for prompt in load_prompts())


def sample_captions(seed: int, chunk: int, count: int = CHUNK) -> tuple[list[str], SceneArrays]:
    """`count` captions with a scene each; the same seed and chunk number give the same ones."""
    captions: list[str] = []
    parts: list[SceneArrays] = []
    rng = random.Random(f"{seed}/{chunk}")
    numbers = np.random.default_rng([seed, chunk])
    while len(captions) < count:
        wanted = count - len(captions)
        claims, texts = [], []
        while len(claims) < wanted:
            claim = sample_claim(rng)
            text = write_caption(claim, rng)
            if normalise(text) not in evaluation_strings():
                claims.append(claim)
                texts.append(text)
        scenes, placed = realise(claims, numbers)
        captions += [text for text, good in zip(texts, placed, strict=True) if good]
        parts.append(scenes.take(placed))
    return captions, SceneArrays.concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Scenes and their captions as token ids.

    `t5_ids` is padded with 0; `clip_ids` with the end token, which the text encoder's pooling
    relies on.
    """

    scenes: SceneArrays
    t5_ids: Int16[np.ndarray, "N 40"]
    clip_ids: Int16[np.ndarray, "N 42"]

    def __len__(self) -> int:
        return len(self.t5_ids)

    def save(self, path: str | Path) -> None:
        """Write one .npz file."""
        np.savez(path, t5_ids=self.t5_ids, clip_ids=self.clip_ids, **self.scenes._asdict())

    @classmethod
    def load(cls, path: str | Path) -> TrainingData:
        """Read what `save` wrote."""
        with np.load(path) as data:
            scenes = SceneArrays(*(data[name] for name in SceneArrays._fields))
            return cls(scenes=scenes, t5_ids=data["t5_ids"], clip_ids=data["clip_ids"])


@cache
def _encoders() -> tuple[Any, Any]:
    return rust_tokenizers()


def _encode(tokenizer: Any, texts: list[str], length: int, pad: int) -> Int16[np.ndarray, "N S"]:
    ids = np.full((len(texts), length), pad, np.int16)
    for row, encoding in enumerate(tokenizer.encode_batch_fast(texts)):
        if len(encoding.ids) > length:
            raise ValueError(
                f"caption of {len(encoding.ids)} tokens does not fit into {length}: {texts[row]!r}"
            )
        ids[row, : len(encoding.ids)] = encoding.ids
    return ids


def encode_captions(
    texts: list[str],
) -> tuple[Int16[np.ndarray, "N 40"], Int16[np.ndarray, "N 42"]]:
    """T5 and CLIP token ids, padded.

    Raises:
      ValueError: a caption that is too long.
    """
    t5, clip = _encoders()
    end = clip.token_to_id(CLIP_END)
    return _encode(t5, texts, T5_LENGTH, 0), _encode(clip, texts, CLIP_LENGTH, end)


def _chunk(arguments: tuple[int, int]) -> TrainingData:
    captions, scenes = sample_captions(*arguments)
    t5_ids, clip_ids = encode_captions(captions)
    return TrainingData(scenes=scenes, t5_ids=t5_ids, clip_ids=clip_ids)


def _chunks(seed: int, first: int, number: int, workers: int) -> Iterator[TrainingData]:
    jobs = [(seed, chunk) for chunk in range(first, first + number)]
    if workers <= 1:
        yield from map(_chunk, jobs)
        return
    # Spawned, not forked: the caller may hold a GPU and JAX's threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_chunk, jobs)


def make_training_data(
    count: int, seed: int = 0, workers: int = 1, *, first_chunk: int = 0, progress: bool = False
) -> TrainingData:
    """Draw `count` scenes with captions, rounded up to whole chunks of 8192.

    Args:
      count: how many at least.
      seed: of the whole data set.
      workers: processes; call from under `if __name__ == "__main__"` when more than one.
      first_chunk: start here, to continue or to split a data set over calls.
      progress: show a bar on stderr.
    """
    number = -(-count // CHUNK)
    bar = tqdm(
        _chunks(seed, first_chunk, number, workers),
        total=number,
        unit="chunk",
        disable=not progress,
    )
    parts = list(bar)
    return TrainingData(
        scenes=SceneArrays.concatenate([part.scenes for part in parts]),
        t5_ids=np.concatenate([part.t5_ids for part in parts]),
        clip_ids=np.concatenate([part.clip_ids for part in parts]),
    )


def main(
    count: Annotated[int, typer.Option(help="How many scenes at least.")] = 1_000_000,
    out: Annotated[Path, typer.Option(help="The .npz file to write.")] = Path("scenes.npz"),
    seed: Annotated[int, typer.Option(help="Seed of the data set.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    show: Annotated[int, typer.Option(help="Print this many captions instead.")] = 0,
    prompts: Annotated[
        Path | None, typer.Option(help="Write the distinct captions alone, one a line.")
    ] = None,
) -> None:
    """Draw captioned training scenes."""
    if show:
        typer.echo("\n".join(sample_captions(seed, 0, show)[0]))
        return
    if prompts is not None:
        chunks = [sample_captions(seed, chunk)[0] for chunk in range(-(-count // CHUNK))]
        distinct = dict.fromkeys(text for captions in chunks for text in captions)
        prompts.write_text("\n".join(distinct) + "\n")
        typer.echo(f"{len(distinct)} prompts in {prompts}")
        return
    data = make_training_data(count, seed, workers, progress=True)
    data.save(out)
    objects = Counter((data.scenes.shape >= 0).sum(axis=1).tolist())
    typer.echo(f"{len(data)} scenes in {out}; by objects: {dict(sorted(objects.items()))}")


if __name__ == "__main__":
    typer.run(main)
