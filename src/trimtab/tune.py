"""Choose site, tokens and gain on validation data, under a budget for guardrails; measure the dose-response."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import count, product
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np

from trimtab.adapter import Adapter
from trimtab.artifact import AnyKnob, DeltaKnob, Knob, LookaheadKnob
from trimtab.checkpoint import Checkpoint, describe_model, knob_content
from trimtab.errors import OptionError, PairsError, TrimtabWarning, TuneError, brief
from trimtab.evals.choosing import choose
from trimtab.evals.likelihood import pair_margins
from trimtab.evals.stats import selection_bias
from trimtab.evals.tasks import AnyTask, what_is_asked
from trimtab.evals.trial import KL_ITEMS, Trial, safe_range
from trimtab.pairs import MOST_HASHES, Pairs, prompt_hash
from trimtab.prompts import read_prompt
from trimtab.render import Renderer
from trimtab.runtime import Dose
from trimtab.types import THOUGHTS, WHERE, Site, Where, check_count, check_several, check_strength, check_where

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GAINS = (0.1, 0.2, 0.3, 0.5)
"""Gains that are tried for directions, in multiples of the mean residual norm."""
WEIGHT_GAINS = (0.25, 0.5, 1.0, 1.5)
"""Gains that are tried for weights: a Preference Vector is usable up to 1.5 (arXiv:2504.20106, figure 5)."""
STRENGTHS = (-1.0, 0.5, 1.0, 1.5, 2.0)


AnyK = TypeVar("AnyK", bound=AnyKnob)


class _Candidate(NamedTuple):
    site: Site | None
    """None where weights change, which have no site."""
    where: Where
    gain: float
    margin: float
    chosen: float


def tune(
    knob: AnyK,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    task: AnyTask | None = None,
    guardrails: Sequence[AnyTask] = (),
    gains: Sequence[float] | None = None,
    where: Sequence[Where] | Where | None = None,
    finalists: int = 3,
    budget: float = 0.02,
    broken_budget: float = 0.05,
    agreement: float = 0.2,
    rank_pairs: int = 8,
    rank_tokens: int = 16,
    strengths: Sequence[float] = STRENGTHS,
    dose_response: bool = True,
    batch_size: int = 128,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AnyK:
    """Return the knob at the site, the tokens and the gain that do best on validation data, pruned to that site.

    A weight knob has neither sites nor tokens: its gain alone is chosen, in multiples of the difference. The sites of a
    lookahead knob are its candidate layers, one of which is taken; a knob that acts at several sites at once keeps
    them, and its gain is that of the active one. `gains` are `GAINS` or, for weights, `WEIGHT_GAINS` where none are
    given; an ablation has none to choose.

    `where` names the tokens to try, one or several of `trimtab.types.WHERE`; None keeps those of the knob. A candidate
    is a site with one of them. Sites whose plain differences the two halves of the learning pairs do not share (a
    split-half cosine below `agreement`, in -1..1, where learning stored one) are noise, as they are for pairs with
    shuffled labels, and no candidates.

    Two stages. Teacher-forced margins of `rank_pairs` validation `pairs`, over the first `rank_tokens` tokens of the
    answers, rank every candidate at every gain (alpha, in multiples of the mean residual norm); a setting counts only
    where it makes the chosen answers themselves more likely, which a destructive dose never does. Then the model
    answers `task` and every guardrail at each gain of the `finalists` best candidates, from small to large until a
    budget is broken. A setting qualifies whose guardrails all stay within `budget` (a share of items) of the base model
    and whose broken answers (empty, cut, repeating) rise by at most `broken_budget`. The best score wins, or rather the
    mildest setting that gains and that the items cannot tell from it: by paired difference at most one standard error,
    so that one item never decides. Mildest is the smallest KL to the base model on the guardrails' answers, which
    notices damage before an answer turns wrong; without guardrails the smallest gain. Without a task the margin itself
    decides, and answers to the pairs' prompts show what breaks.

    `pairs`, `task` and guardrails must be validation data: whatever is chosen on them cannot be tested on them. Pairs
    with prompts that learning has seen bring a warning.
    `knob.tuning` of the result holds the options, what the best of as many useless settings would seem to gain
    (`selection_bias`, see `trimtab.evals.stats`; a gain within it brings a warning), both tables, the dose-response
    over `strengths` (score, guardrails, KL, broken answers; see `trimtab.evals.trial`) and the `safe_range` around
    [0, 1] within the budgets. `progress` is called with the number of settings that were measured and the largest
    number that there can be. Raises `TuneError` if nothing qualifies.

    `checkpoint` is a folder that keeps finished steps (batches of the ranking, answers to a task under a setting, KLs):
    the same call takes them from there after it was stopped or killed, and so does one with other budgets, finalists or
    strengths. Kept answers are graded again; `seconds` are those of the last call. The folder is left in place; see
    `trimtab.checkpoint`.
    """
    if not isinstance(guardrails, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"Guardrails are several tasks, as in [task], or none, as in []; got {brief(guardrails)}.")
    _check_kinds(knob, pairs, [*([] if task is None else [task]), *guardrails])
    if not isinstance(dose_response, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"dose_response is True or False; got {brief(dose_response)}.")
    Adapter(model).check_plain("tuning")
    if not -1 <= check_strength(agreement, "agreement") <= 1:
        raise OptionError(f"The agreement is a cosine, from -1 to 1; got {agreement:g}.")
    gains = _gains(knob, gains)
    searched = _reproducible(knob, agreement) if isinstance(knob, Knob) and not knob.also else knob
    wheres = _wheres(knob, where, tokenizer)
    seen = _seen(knob, pairs)
    if seen:
        warnings.warn(
            f"Knob {knob.name!r} was learned from {seen}: what is chosen on them fits them too well. "
            "Tune on pairs whose prompts learning has not seen.",
            TrimtabWarning,
            stacklevel=2,
        )
    _check(pairs, gains, guardrails, (budget, broken_budget), (finalists, rank_pairs, rank_tokens), strengths)
    begun = time.perf_counter()
    done, total = count(1), 1 + 1 + finalists * len(gains) + len(strengths) * dose_response

    def advance() -> None:
        progress(next(done), total)

    tried = {
        "where": wheres,
        "gains": list(map(float, gains)),
        "ranked pairs": rank_pairs,
        "ranked tokens": rank_tokens,
    }
    prompts, scored = [pair.prompt for pair in pairs], [task] if task else []
    tasks = [*scored, *guardrails]
    kept = Checkpoint(
        checkpoint, lambda: _job(searched, model, tokenizer, pairs, tasks) | tried | {"batch size": batch_size}
    )
    ranking = _rank(searched, model, tokenizer, pairs[:rank_pairs], wheres, gains, rank_tokens, kept)
    advance()
    trial = Trial(model, tokenizer, prompts, scored, guardrails, budget, broken_budget, batch_size, kept)
    advance()
    table, scores = _measure_finalists(searched, trial, ranking, finalists, gains, advance)
    bias = selection_bias(trial.base_items[0], scores) if task else None
    best = choose(table, scores, trial, knob.name, task, bias)
    chosen = _at(searched, best["site"], best["where"], best["gain"])
    tuning: dict[str, Any] = {
        "ranking": [{**c._asdict(), "site": _named(c.site)} for c in ranking],
        "table": table,
        "base": trial.base,
        "isolation": trial.isolation,
        "selection_bias": bias and bias._asdict(),
        "task": task.name if task else None,
        "guardrails": [g.name for g in guardrails],
        "budget": budget,
        "pairs": len(pairs),
        "pairs_hash": pairs.hash(),
        "prompt_hashes": _prompt_hashes(pairs, tasks),
        "options": {
            "gains": list(gains),
            "where": list(wheres),
            "finalists": finalists,
            "broken_budget": broken_budget,
            "agreement": agreement,
            "rank_pairs": rank_pairs,
            "rank_tokens": rank_tokens,
            "kl_items": KL_ITEMS,
            "strengths": list(strengths),
            "items": {t.name: len(t) for t in tasks},
        },
    }
    if dose_response:
        # Strength 1 was measured among the finalists.
        known = {name: value for name, value in best.items() if name not in ("site", "where", "gain", "margin")}
        curve = trial.curve(chosen, strengths, known, advance)
        tuning |= {"dose_response": curve, "safe_range": list(safe_range(curve))}
    tuning["seconds"] = time.perf_counter() - begun
    return cast(AnyK, chosen.with_(tuning=tuning))


def _at(knob: AnyKnob, site: Site | str | None, where: Where, gain: float) -> AnyKnob:
    """Return the knob at one setting, pruned to its site; weights have a gain alone."""
    if isinstance(knob, DeltaKnob):
        return knob.with_(gain=gain)
    return knob.with_(site=site, where=where, gain=gain).pruned()


def _named(site: Site | None) -> str:
    return "weights" if site is None else str(site)


def _check_kinds(knob: AnyKnob, pairs: Pairs, tasks: Sequence[AnyTask]) -> None:
    """Raise `OptionError` for what is no knob, no pairs or no task, as when arguments change places."""
    for value, kind, wanted in (
        (knob, AnyKnob, "a Knob"),
        (pairs, Pairs, "Pairs"),
        *((t, AnyTask, "a Task") for t in tasks),
    ):
        if not isinstance(value, kind):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(
                f"tune(knob, model, tokenizer, pairs, task=..., guardrails=[...]) wants {wanted} where it got "
                f"{type(value).__name__}."
            )


def _seen(knob: AnyKnob, pairs: Pairs) -> str:
    """Say what of the pairs learning has seen; empty where it has seen nothing, or the knob does not know."""
    if knob.provenance.get("pairs_hash") == pairs.hash():
        return "these very pairs"
    known: object = knob.provenance.get("prompt_hashes")
    prompts = pairs.prompt_hashes()
    shared = set(prompts) & set(cast(list[object], known) if isinstance(known, list) else [])
    return f"{len(shared)} of these {len(prompts)} prompts" if shared else ""


def _reproducible(knob: Knob, agreement: float) -> Knob:
    """Leave out the sites whose direction half of the pairs does not reproduce; raises `TuneError` if none is left."""
    sites: object = knob.diagnostics.get("sites")
    stored = cast(Mapping[str, object], sites) if isinstance(sites, Mapping) else {}
    halves: dict[Site, float] = {}
    for site in knob.vectors:
        entry = stored.get(str(site))
        cosine = cast(Mapping[str, object], entry).get("split_half_cosine") if isinstance(entry, Mapping) else None
        if isinstance(cosine, float):
            halves[site] = cosine
    kept = [site for site in knob.vectors if halves.get(site, 1.0) >= agreement]
    if not kept:
        raise TuneError(
            f"The pairs of {knob.name!r} do not agree on a direction: at none of {len(knob.vectors)} sites do two "
            f"halves of them have a cosine of {agreement:g} (at best {max(halves.values()):.4g}). Look at the labels, "
            "or add pairs."
        )
    return knob.with_(site=knob.site if knob.site in kept else kept[0]).at(kept)


def _prompt_hashes(pairs: Pairs, tasks: Sequence[AnyTask]) -> list[str]:
    """Return the hashes of all prompts that the choice rests on, so that a later test on them can be warned of."""
    asked = {prompt_hash(read_prompt(prompt)) for task in tasks for prompt in task.prompts}
    return sorted(asked | set(pairs.prompt_hashes()))[:MOST_HASHES]


def _job(
    knob: AnyKnob, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Pairs, tasks: Sequence[AnyTask]
) -> dict[str, Any]:
    """Return what the kept steps depend on; graders are not among it, since kept answers are graded again."""
    return {
        "work": "tuning",
        **describe_model(model, tokenizer),
        **knob_content(knob),
        "pairs": pairs.hash(),
        "tasks": [what_is_asked(t) for t in tasks],
    }


def _gains(knob: AnyKnob, gains: Sequence[float] | None) -> Sequence[float]:
    """Return what is to be tried; an ablation is the same at any gain, and would only count as so many settings."""
    if knob.operation == "ablate":
        if gains is not None:
            raise OptionError(f"Knob {knob.name!r} is an ablation, the same at any gain: leave gains out.")
        return (knob.gain or 1.0,)
    return (WEIGHT_GAINS if isinstance(knob, DeltaKnob) else GAINS) if gains is None else gains


def _wheres(
    knob: AnyKnob, where: Sequence[Where] | Where | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[Where, ...]:
    if isinstance(knob, DeltaKnob) and where is not None:
        raise OptionError(f"Knob {knob.name!r} changes weights, which know of no tokens: leave where out.")
    asked = [knob.where] if where is None else list(where) if isinstance(where, list | tuple) else [where]
    if not asked:
        raise OptionError(f"Name the tokens to steer, one or several of {', '.join(WHERE)}; got none.")
    wheres: tuple[Where, ...] = tuple(dict.fromkeys(check_where(name) for name in asked))
    if set(wheres) & THOUGHTS and Renderer(tokenizer).thinking() is None:
        raise OptionError(
            f"Tokens of {', '.join(sorted(set(wheres) & THOUGHTS))} cannot be told here: this tokenizer has none of "
            "the known tokens that open and close thoughts. Choose other tokens to steer."
        )
    return wheres


def _measure_finalists(
    knob: AnyKnob,
    trial: Trial,
    ranking: Sequence[_Candidate],
    finalists: int,
    gains: Sequence[float],
    advance: Callable[[], None],
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Measure the best of the ranking at every gain, from small to large until a budget is broken.

    Returns the table and, row by row, the scores of the task's items.
    """
    table: list[dict[str, Any]] = []
    scores: list[np.ndarray] = []
    margins = {(c.site, c.where, c.gain): c.margin for c in ranking}
    spots: dict[tuple[Site | None, Where], None] = dict.fromkeys((c.site, c.where) for c in ranking)  # best first
    for site, where in list(spots)[:finalists]:
        for gain in sorted(gains):
            row, items, _ = trial.measure({_at(knob, site, where, gain): 1.0})
            scores += items
            margin = margins[site, where, gain]
            table.append({"site": _named(site), "where": where, "gain": gain, "margin": margin, **row})
            advance()
            if not row["within_budget"]:
                break  # a larger dose of the same direction only does more damage
    return table, scores


def _check(
    pairs: Pairs,
    gains: Sequence[float],
    guardrails: Sequence[AnyTask],
    budgets: tuple[float, float],
    counts: tuple[int, int, int],
    strengths: Sequence[float],
) -> None:
    """Raise `OptionError` or `PairsError` for what no search can work with."""
    if not len(pairs):
        raise PairsError("There are no pairs to tune on.")
    gains = check_several(gains, "gains")
    if not gains or any(not np.isfinite(g) or g <= 0 for g in gains):
        raise OptionError(f"Gains must be positive numbers; got {list(gains)}.")
    if any(isinstance(b, bool) or not isinstance(b, Real) or not np.isfinite(float(b)) or b < 0 for b in budgets):
        raise OptionError(f"Budgets are numbers, finite and not negative; got {budgets[0]!r} and {budgets[1]!r}.")
    for strength in check_several(strengths, "strengths"):
        check_strength(strength)
    names = [rail.name for rail in guardrails]
    if len(set(names)) < len(names):
        raise OptionError(f"Guardrails need names of their own; got {', '.join(names)}.")
    for name, number in zip(("finalists", "rank_pairs", "rank_tokens"), counts, strict=True):
        check_count(number, name)


def _rank(
    knob: AnyKnob,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    wheres: Sequence[Where],
    gains: Sequence[float],
    answer_tokens: int,
    kept: Checkpoint,
) -> list[_Candidate]:
    """Order the candidates by how much they raise the margin; settings that lower the chosen answers come last."""
    sites: list[Site | None] = [None]
    if isinstance(knob, Knob):
        sites = (
            [site for site, vector in knob.vectors.items() if float(vector.norm()) > 0]
            if not knob.also
            else [knob.site]
        )
    elif isinstance(knob, LookaheadKnob):
        sites = [*knob.sites]
    spots = list(product(sites, wheres, gains))
    if not spots:
        raise TuneError(f"Every vector of {knob.name!r} is zero: its pairs do not differ at any site that was read.")
    # A knob copies its vectors: one each is enough.
    lone = {site: knob if isinstance(knob, DeltaKnob) else knob.pruned(site) for site in sites}
    settings: list[Dose] = [{_at(lone[s], s, w, gain): 1.0} for s, w, gain in spots]
    base, *steered = pair_margins(model, tokenizer, pairs, [{}, *settings], answer_tokens=answer_tokens, kept=kept)
    found = [
        _Candidate(*spot, float((m.margin - base.margin).mean()), float((m.chosen - base.chosen).mean()))
        for spot, m in zip(spots, steered, strict=True)
    ]
    return sorted(found, key=lambda c: (c.chosen > 0, c.margin if c.chosen > 0 else c.chosen), reverse=True)
