"""What an answer costs with a vector in the weights, and with the level asked for in the prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from inspect import signature
from random import Random
from typing import Any, NamedTuple

import torch

from trimtab.adapter import CACHE_NAMES
from trimtab.prompts import end_ids
from trimtab.render import Renderer
from trimtab.reproduce.alignment_bench import LevelBench, share
from trimtab.reproduce.alignment_recipe import LEVELS, Question
from trimtab.types import Message
from trimtab.weights.live import applied

Record = dict[str, Any]
LEVEL = "expert"


class Timed(NamedTuple):
    """An answer: seconds until its first token, seconds of the rest, and its tokens."""

    prefill: float
    decode: float
    tokens: int


def cost(bench: LevelBench, domain: str, strength: float, sentence: str) -> Record:
    """Time answers with the vector and with prompts of growing length, and see how well each brings the expert level.

    A prompt is the sentence that validation chose, then answered questions, as many as the recipe's `shots`, all of
    them real. One answer at a time, greedy, in rounds that go through all ways in a new order, so that what else the
    machine does falls on all alike. "prefix" reuses the keys and values of what stands before the question.
    """
    renderer, knob = Renderer(bench.tokenizer), bench.vector(domain, "plain")
    shown = bench.data.questions(bench.recipe.domains[domain], "train", max(*bench.recipe.shots, 1))
    asked = bench.questions(domain, "test")[: bench.sizes.answers]
    before = {shots: _before(sentence, shown[:shots]) for shots in bench.recipe.shots}
    ways: list[tuple[str, int, bool]] = [("vector", 0, False)]
    ways += [("prompt", shots, cached) for shots in bench.recipe.shots for cached in (False, True)]
    times: dict[tuple[str, int, bool], list[list[Timed]]] = {way: [] for way in ways}
    for number in range(bench.sizes.rounds + 1):
        for way in Random(number).sample(ways, len(ways)):
            kind, shots, cached = way
            turns = before[shots] if kind == "prompt" else ()
            with applied(bench.model, {knob: strength if kind == "vector" else 0.0}):
                made = _answers(bench, renderer, turns, asked, cached=cached)
            if number:  # the first round warms up
                times[way].append(made)
    rows: list[Record] = []
    for way in ways:
        kind, shots, cached = way
        turns = before[shots] if kind == "prompt" else ()
        whole = [len(renderer.prompt_ids([*turns, Message("user", q.prompt)])) for q in asked]
        rows.append(
            {
                "way": kind,
                "shots": shots,
                "prefix": cached,
                "prompt_tokens": [n - _bare(renderer, q) for n, q in zip(whole, asked, strict=True)],
                "question_tokens": [_bare(renderer, q) for q in asked],
                "answers": [[list(answer) for answer in made] for made in times[way]],
            }
        )
    _add_levels(bench, domain, rows, before, strength)
    return {"rows": rows, "lambda": strength, "sentence": sentence}


def _add_levels(
    bench: LevelBench, domain: str, rows: Sequence[Record], before: dict[int, tuple[Message, ...]], strength: float
) -> None:
    """Add to every row the levels of test questions: the likeliest answer's, and that of a sampled answer."""
    found: dict[tuple[str, int], Record] = {}
    for row in rows:
        key = row["way"], row["shots"]
        if key not in found:
            turns = before[row["shots"]] if row["way"] == "prompt" else ()
            with applied(bench.model, {bench.vector(domain, "plain"): strength if row["way"] == "vector" else 0.0}):
                levels = bench.likeliest("test", [domain], before=turns)[domain]
                made = bench.generated(domain, bench.sizes.sampled, before=turns)
            found[key] = {"test": levels, "generated": made, "share": share(levels, LEVEL)}
        row.update(found[key])


def _before(sentence: str, shown: Sequence[Question]) -> tuple[Message, ...]:
    turns = [Message("system", sentence)]
    for question in shown:
        turns += [Message("user", question.prompt), Message("assistant", question.answers[LEVELS.index(LEVEL)])]
    return tuple(turns)


def _bare(renderer: Renderer, question: Question) -> int:
    return len(renderer.prompt_ids([Message("user", question.prompt)]))


@torch.inference_mode()
def _answers(
    bench: LevelBench, renderer: Renderer, turns: Sequence[Message], asked: Sequence[Question], *, cached: bool
) -> list[Timed]:
    """Answer questions one at a time, greedily; with `cached` what all begin with is run once, outside the clock."""
    from transformers import DynamicCache

    ends = set(end_ids(bench.model, bench.tokenizer))
    rows = [renderer.prompt_ids([*turns, Message("user", q.prompt)]) for q in asked]
    shared = _shared(rows) if cached else 0
    known = signature(bench.model.forward).parameters
    name = next(name for name in CACHE_NAMES if name in known)
    cache = {name: DynamicCache()}
    if shared:
        _next(bench, cache, rows[0][:shared])
    made: list[Timed] = []
    for ids in rows:
        if not shared:
            cache = {name: DynamicCache()}
        elif extra := int(cache[name].get_seq_length()) - shared:
            cache[name].crop(-extra)
        begun = time.perf_counter()
        token = _next(bench, cache, ids[shared:])
        first, tokens = time.perf_counter(), 1
        while token not in ends and tokens < bench.sizes.max_new_tokens:
            token, tokens = _next(bench, cache, [token]), tokens + 1
        made.append(Timed(first - begun, time.perf_counter() - first, tokens))
    return made


def _next(bench: LevelBench, cache: dict[str, Any], ids: Sequence[int]) -> int:
    given = torch.tensor([list(ids)], device=bench.model.device)
    return int(bench.model(input_ids=given, use_cache=True, logits_to_keep=1, **cache).logits[0, -1].argmax())


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows begin with, of each at least one being left."""
    shortest = min(map(len, rows)) - 1
    return next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
