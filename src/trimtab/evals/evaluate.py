"""A model without knobs and under each setting: tasks, preference, side effects, a judge, cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trimtab.adapter import Adapter
from trimtab.checkpoint import Checkpoint, describe_model
from trimtab.errors import OptionError, TrimtabWarning
from trimtab.evals.choices import ChoiceTask
from trimtab.evals.cost import Cost, measured
from trimtab.evals.effects import Divergence, divergence_of_answers, manner, own_answers, perplexities
from trimtab.evals.entries import (
    PROMPTS,
    Ask,
    Said,
    as_fields,
    compare_manner,
    compare_scores,
    describe_answers,
    describe_neutral,
    describe_preference,
    join,
    total_cost,
)
from trimtab.evals.evaluation import Evaluation, describe_spec
from trimtab.evals.judge import Judge
from trimtab.evals.likelihood import pair_margins
from trimtab.evals.stats import holm
from trimtab.evals.tasks import AnyTask, Outcome, Task, grade_said, run_task, what_is_asked
from trimtab.pairs import Pairs, prompt_hash
from trimtab.prompts import read_prompt
from trimtab.runtime import Dose
from trimtab.types import check_seed, check_strength, format_setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[AnyTask] = (),
    settings: Dose | Sequence[Dose] = (),
    *,
    guardrails: Sequence[AnyTask] = (),
    pairs: Pairs | None = None,
    neutral: Sequence[str] | None = None,
    judge: Judge | None = None,
    sampled: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    max_new_tokens: int = 128,
    kl_items: int = 16,
    judge_items: int = 100,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure the model without knobs and under every setting, on the same items.

    `settings` is one setting or several, knobs with strengths; none measures the bare model alone. All data must be
    data that neither learning nor tuning has seen: prompts that a knob remembers bring a `TrimtabWarning` and a note.

    Per task and guardrail: accuracy (Wilson's interval for scores of 0 and 1, else bootstrap), the paired difference
    to the bare model with its bootstrap interval, McNemar's exact p for scores of 0 and 1, adjusted by Holm over all
    tasks, guardrails and modes of one setting; shares of the sides and accuracy within each; broken answers,
    repetition, length in tokens, what kept programs apart that were run (`isolation`); KL(base || steered) in nats
    per token along the bare model's own answers to the first `kl_items` prompts. Answers are greedy; `sampled` asks
    each task (not guardrails) once more at `temperature`. Of tasks by likelihood there are scores and differences
    only.

    `pairs`: share of pairs whose chosen answer is likelier (ties half) and the margin in nats. `neutral`: perplexity
    of texts without a prompt (see `trimtab.evals.effects` for what is steered there). `judge` compares the steered
    answers with the bare ones, on the first `judge_items` of the pairs' prompts, or without pairs of each task's; with
    a judge, or with neither tasks nor guardrails, the pairs' prompts are answered, up to `max_new_tokens`.

    Cost is that of answering and grading: seconds of wall time, tokens, and the largest memory beyond what was in use.
    The bare model goes first, so that what a process does once only (loading kernels, caches) counts against it.
    `checkpoint` is a folder that keeps answers, likelihoods and KLs, as for `tune`; kept answers are graded again, and
    bring their seconds along. Raises `OptionError` where there is nothing to measure, or two tasks have one name,
    and `AdapterError` inside `steer`, where no model is bare.
    """
    doses: list[Dose] = [settings] if isinstance(settings, Mapping) else list(settings)
    graded = [*((task, "task") for task in tasks), *((task, "guardrail") for task in guardrails)]
    _check(graded, pairs, neutral, judge, doses, (temperature, seed), (kl_items, judge_items))
    Adapter(model).check_plain("evaluating")
    notes = _seen_before(doses, graded, pairs)
    asks = [Ask(task, role, "likelihood" if isinstance(task, ChoiceTask) else "greedy") for task, role in graded]
    asks += [Ask(task, "task", "sampled") for task in tasks if sampled and not isinstance(task, ChoiceTask)]
    if pairs is not None and (judge is not None or not graded):
        # Beside tasks they are there for the judge alone.
        asks.append(Ask(_prompts_of(pairs, judge_items if graded else None, max_new_tokens), PROMPTS, "greedy"))
    options = {
        "sampled": sampled,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "kl_items": kl_items,
        "judge_items": judge_items,
    }
    spec = describe_spec(model, tokenizer, asks, doses, pairs, neutral, judge, options)
    kept = Checkpoint(checkpoint, lambda: _job(model, tokenizer, asks, spec))
    done, total = count(1), len(asks) * (1 + len(doses)) + len(doses) + 1

    def advance() -> None:
        progress(next(done), total)

    bench = _Bench(model, tokenizer, temperature, seed, batch_size, kept)
    bare = [bench.answer(ask, 0, {}, advance) for ask in asks]
    margins = pair_margins(model, tokenizer, pairs, [{}, *doses], kept=kept) if pairs is not None else []
    read = perplexities(model, tokenizer, neutral, [{}, *doses], kept=kept) if neutral else []
    advance()
    entries: list[Mapping[str, Any]] = []
    for number, dose in enumerate(doses, 1):
        said = [bench.answer(ask, number, dose, advance) for ask in asks]
        entry = _setting_entry(bench, dose, number, asks, bare, said, kl_items)
        if margins:
            entry["preference"] = describe_preference(margins[number], margins[0])
        if read:
            entry["neutral"] = describe_neutral(read[number], read[0])
        if judge is not None:
            entry["judge"] = _judged(judge, asks, bare, said, judge_items)
        entries.append(entry)
        advance()
    first: dict[str, Any] = {"tasks": [describe_answers(ask, said) for ask, said in zip(asks, bare, strict=True)]}
    first["cost"] = total_cost(bare)
    if margins:
        first["preference"] = describe_preference(margins[0])
    if read:
        first["neutral"] = describe_neutral(read[0])
    return Evaluation(spec, first, tuple(entries), tuple(notes))


class _Bench:
    """A model with how it is asked; answers that `kept` holds are not made again."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float,
        seed: int,
        batch_size: int,
        kept: Checkpoint,
    ) -> None:
        self._model, self._tokenizer, self._kept = model, tokenizer, kept
        self._temperature, self._seed, self._batch = temperature, seed, batch_size

    def answer(self, ask: Ask, number: int, dose: Dose, advance: Callable[[], None]) -> Said:
        """Answer a task under setting number `number`, 0 being the bare model."""
        fresh: list[Outcome] = []
        heat = self._temperature if ask.mode == "sampled" else 0.0

        def run() -> dict[str, Any]:
            with measured() as cost:
                made = run_task(
                    self._model,
                    self._tokenizer,
                    ask.task,
                    dose,
                    temperature=heat,
                    seed=self._seed,
                    batch_size=self._batch,
                )
            fresh.append(made)
            return {"said": made.said(), "seconds": cost.seconds, "peak": cost.peak_bytes}

        said = self._kept.step(f"answers {number} {ask.role} {ask.mode} {ask.task.name}", run)
        outcome = fresh[0] if fresh else grade_said(ask.task, said["said"])
        advance()
        # By likelihood nothing is said.
        spoken = outcome.answers if ask.mode != "likelihood" else [""] * len(outcome.answers)
        how = manner(self._tokenizer, ask.task.prompts, spoken)
        return Said(outcome, how, Cost(said["seconds"], said["peak"]))

    def diverge(self, ask: Ask, number: int, dose: Dose, bare: Outcome, items: int) -> Divergence | None:
        """Measure the KL along the bare model's first answers; None where all of them are empty."""
        prompts, answers = ask.task.prompts[:items], bare.answers[:items]
        texts = own_answers(self._model, self._tokenizer, prompts, answers)
        if not texts:
            return None
        key = f"kl {number} {ask.role} {ask.task.name}"
        return divergence_of_answers(self._model, self._tokenizer, texts, dose, kept=self._kept, key=key)


# Entries of the record


def _setting_entry(
    bench: _Bench,
    dose: Dose,
    number: int,
    asks: Sequence[Ask],
    bare: Sequence[Said],
    said: Sequence[Said],
    kl_items: int,
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    found: dict[int, Divergence] = {}
    for i, (ask, before, after) in enumerate(zip(asks, bare, said, strict=True)):
        row = describe_answers(ask, after)
        if ask.role != PROMPTS:
            row |= compare_scores(before.outcome.scores, after.outcome.scores)
        if ask.mode == "greedy" and kl_items:
            moved = bench.diverge(ask, number, dose, before.outcome, kl_items)
            row["kl"] = moved and as_fields(moved.per_token())
            if moved:
                found[i] = moved
        rows.append(row)
    tested = [row for row in rows if row.get("p") is not None]
    for row, adjusted in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = adjusted
    greedy = [i for i, ask in enumerate(asks) if ask.mode == "greedy"]
    rails = [i for i in greedy if asks[i].role == "guardrail" and i in found] or list(found)
    return {
        "setting": format_setting({knob.name: strength for knob, strength in dose.items()}),
        "tasks": rows,
        "side_effects": {
            **(compare_manner([bare[i] for i in greedy], [said[i] for i in greedy]) if greedy else {}),
            "kl": as_fields(join([found[i] for i in rails]).per_token()) if rails else None,
            "kl_on": [asks[i].task.name for i in rails],
        },
        "cost": total_cost(said),
    }


def _judged(
    judge: Judge, asks: Sequence[Ask], bare: Sequence[Said], said: Sequence[Said], items: int
) -> dict[str, Any]:
    """Let the judge compare steered answers (b) with bare ones (a)."""
    roles = [PROMPTS] if any(ask.role == PROMPTS for ask in asks) else ["task"]
    chosen = [i for i, ask in enumerate(asks) if ask.role in roles and ask.mode == "greedy"]
    prompts = [read_prompt(prompt) for i in chosen for prompt in asks[i].task.prompts[:items]]
    before, after = ([a for i in chosen for a in some[i].outcome.answers[:items]] for some in (bare, said))
    return {"on": [asks[i].task.name for i in chosen], **judge.compare(prompts, before, after).summary()}


def _job(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asks: Sequence[Ask], spec: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the kept steps depend on: the spec without how tasks are graded and judged."""
    rest = {name: part for name, part in spec.items() if name not in ("model", "judge", "versions", "tasks")}
    asked = [[ask.role, ask.mode, *what_is_asked(ask.task)] for ask in asks]
    return {"work": "evaluating", **describe_model(model, tokenizer), **rest, "tasks": asked}


# Before the work


def _prompts_of(pairs: Pairs, limit: int | None, max_new_tokens: int) -> Task:
    prompts = tuple(dict.fromkeys(pair.prompt for pair in pairs))[:limit]
    return Task(PROMPTS, prompts, lambda answers: [0.0] * len(answers), max_new_tokens=max_new_tokens)


def _check(
    graded: Sequence[tuple[AnyTask, str]],
    pairs: Pairs | None,
    neutral: Sequence[str] | None,
    judge: Judge | None,
    doses: Sequence[Dose],
    draws: tuple[float, int],
    counts: tuple[int, int],
) -> None:
    """Raise `OptionError` for what cannot be evaluated."""
    names = [task.name for task, _ in graded]
    if len(set(names)) < len(names):
        raise OptionError(f"Tasks and guardrails need names of their own; got {', '.join(names)}.")
    if PROMPTS in names:
        raise OptionError(f"A task cannot be named {PROMPTS!r}, which is what the pairs' own prompts are called.")
    empty = [*(f"Task {task.name!r}" for task, _ in graded if not len(task.prompts))]
    empty += ["The set of pairs"] if pairs is not None and not len(pairs) else []
    if empty:
        raise OptionError(f"{empty[0]} is empty: there is nothing to measure in it. Leave it out.")
    if not graded and pairs is None and not neutral:
        raise OptionError("There is nothing to measure. Pass a task, a guardrail, pairs or neutral text.")
    if judge is not None and not doses:
        raise OptionError("A judge compares steered answers with bare ones. Pass a knob.")
    spoken = any(role == "task" and not isinstance(task, ChoiceTask) for task, role in graded)
    if judge is not None and pairs is None and not spoken:
        raise OptionError(
            "A judge compares answers to the pairs' prompts, or to those of a task that is answered, not one by "
            "likelihood. Pass one of them."
        )
    if check_strength(draws[0], "temperature") <= 0:
        raise OptionError(f"Sampling needs a temperature above 0; got {draws[0]:g}.")
    check_seed(draws[1])
    if counts[0] < 0 or counts[1] < 1:
        raise OptionError(f"kl_items is 0 or more and judge_items 1 or more; got {counts[0]} and {counts[1]}.")
    for dose in doses:
        for knob, strength in dose.items():
            check_strength(strength, f"strength of {knob.name!r}")


def _seen_before(doses: Sequence[Dose], graded: Sequence[tuple[AnyTask, str]], pairs: Pairs | None) -> list[str]:
    """Say, and warn, of every part of the data whose prompts a knob was learned from or tuned on."""
    parts = {task.name: {prompt_hash(read_prompt(p)) for p in task.prompts} for task, _ in graded}
    if pairs is not None:
        parts["the pairs"] = set(pairs.prompt_hashes())
    notes: dict[str, None] = {}
    for knob in {knob: None for dose in doses for knob in dose}:
        for verb, source in (("learned from", knob.provenance), ("tuned on", knob.tuning or {})):
            known: object = source.get("prompt_hashes")
            hashes = set(cast(list[object], known)) if isinstance(known, list) else set[object]()
            for name, prompts in parts.items():
                if shared := len(prompts & hashes):
                    said = f"Knob {knob.name!r} was {verb} {shared} of the {len(prompts)} prompts of {name}"
                    notes[f"{said}: its figures there are too good. Evaluate on prompts it has not seen."] = None
    for note in notes:
        warnings.warn(note, TrimtabWarning, stacklevel=3)
    return list(notes)
