"""Pairs from a contrast: the same prompts asked under two system lines, or of two models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import TYPE_CHECKING, Any, Literal, cast

from trimtab.adapter import Adapter
from trimtab.artifact import model_identity
from trimtab.errors import OptionError, PairsError, RenderError, TrimtabWarning, brief, unknown_name
from trimtab.generate import Generation, check_context, generate
from trimtab.pairs import Pairs, check_prompt
from trimtab.prompts import Lines, Prompt, check_decoding, check_sampling, read_lines, read_prompts
from trimtab.render import Renderer
from trimtab.types import Message, Pair, check_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
Conversation = tuple[Message, ...]
ROUNDS = 4
"""Batches between two calls of `progress`; prompts of similar length share a batch."""
LENGTHS_APART = 2.0
"""The ratio of mean lengths above which a contrast may be one of lengths, whatever else differs."""
CUT_SHARE = 0.5
"""The share of answers cut short above which a side is warned of."""


@dataclass(frozen=True)
class Answers:
    """What a model says under each system line of one side."""

    side: Side
    model: str
    """As knobs name it: a hub name, or a folder's last part."""
    prompts: tuple[Conversation, ...]
    """Without the side's system lines."""
    lines: tuple[str | None, ...]
    samples: int
    decoding: Mapping[str, object]
    answers: tuple[Generation, ...]
    """Of every prompt, under every line, every sample, in this order."""


@dataclass(frozen=True)
class Contrast:
    """The pairs of a contrast, what was left out of them, and what might be wrong with them."""

    pairs: Pairs
    asked: int
    """Pairs before any was left out: prompts times contrasts times samples."""
    empty: int
    """Left out: an answer said nothing."""
    same: int
    """Left out: both sides said the same."""
    repeated: int
    """Left out: the same prompt and answers as in an earlier pair."""
    contradictory: int
    """Left out: two contrasts or samples hold the same two answers the other way round."""
    chosen_cut: int
    """Chosen answers in `pairs` that did not end by themselves."""
    rejected_cut: int
    chosen_tokens: float
    """Mean length of the chosen answers in `pairs`, in tokens of the model that gave them."""
    rejected_tokens: float

    def record(self) -> dict[str, Any]:
        """Return every number, with the number of pairs for the pairs."""
        numbers = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**numbers, "pairs": len(self.pairs)}


def contrast_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    chosen_system: Sequence[str] = (),
    rejected_system: Sequence[str] = (),
    samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Contrast:
    """Make preference pairs out of two system lines: the answer under the one is chosen, under the other rejected.

    The i-th line of `chosen_system` and the i-th of `rejected_system` are a contrast, and every prompt is asked under
    every contrast, `samples` times; a side without lines is asked without one. This is how persona vectors get their
    answers (arXiv:2507.21509, several phrasings of one trait), and RLCD its preference data (arXiv:2307.12950). The
    prompts of the pairs lack those lines, so that what is learned from the pairs brings the behaviour itself; a system
    line of a prompt's own stays, and a contrast's is added to it. The `meta` of a pair says how it was made: the system
    line, the model, the answer's length in tokens, and whether it was cut short, of each side (`chosen_system`,
    `chosen_model`, `chosen_tokens`, `chosen_cut`, and so on), `sample` (from 1) and `decoding`.

    Decoding is as in `trimtab.generate`. Pairs are left out, and counted, where an answer is empty, where both are the
    same, and where a pair repeats or contradicts another. For answers of two models, one at a time in memory, see
    `answer_side` and `join_sides`.

    Raises `OptionError` for options that do not fit together, `RenderError` for a chat template without system lines,
    and `PairsError` for prompts that cannot be asked and where no pair is left. Warns (`TrimtabWarning`) where most
    answers are cut short, and where the sides differ in length by more than a factor of two.
    """
    lines = read_lines(chosen_system, rejected_system)
    check_sampling(samples, temperature)
    conversations = _conversations(prompts)
    _check_told_apart(Renderer(tokenizer), conversations, lines)

    def ask(side: Side, before: int) -> Answers:
        return answer_side(
            model,
            tokenizer,
            conversations,
            side,
            lines=getattr(lines, side),
            samples=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            progress=lambda done, total: progress(before * total + done, 2 * total),
        )

    return join_sides(ask("chosen", 0), ask("rejected", 1))


def answer_side(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    side: Side,
    *,
    lines: Sequence[str | None] = (None,),
    samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Ask every prompt under every system line of one side; None among `lines` asks without one.

    For pairs of two models: the answers of the one, then those of the other, then `join_sides`. Contrasting the answers
    of a larger model with those of a smaller one makes preference data without a judge (arXiv:2305.13735). `side`
    tells the draws of the two sides apart where they are sampled. Raises as `contrast_pairs` does.
    """
    if side not in SIDES:
        raise unknown_name("side", side, SIDES)
    told: list[object] = [line for line in lines if line is not None]
    if isinstance(lines, str) or not lines or any(not isinstance(line, str) or not line.strip() for line in told):
        raise OptionError(f"lines is a list of system lines, or [None] to ask without; got {brief(lines)}.")
    check_decoding(max_new_tokens, temperature, top_p, seed)
    check_count(batch_size, "batch_size")
    check_sampling(samples, temperature)
    conversations = _conversations(prompts)
    asked = [_under(line, prompt) for prompt in conversations for line in lines]
    ids = dict(zip(asked, _rendered(Renderer(tokenizer), asked), strict=True))
    longest = [max((_under(line, prompt) for line in lines), key=lambda c: len(ids[c])) for prompt in conversations]
    check_context(Adapter(model), [ids[conversation] for conversation in longest], max_new_tokens)
    greedy = temperature == 0  # the same question has the same answer: it is asked once
    work = list(dict.fromkeys(asked)) if greedy else [turns for turns in asked for _ in range(samples)]
    made: list[Generation] = []
    size = ROUNDS * batch_size
    for start in range(0, len(work), size):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrimtabWarning)  # of the context: said above, by the prompt's own number
            made += generate(
                model,
                tokenizer,
                work[start : start + size],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=Random(f"{seed} {side} {start}").getrandbits(62),  # no round and no side draws as another does
                batch_size=batch_size,
            )
        progress(len(made), len(work))
    if greedy:
        answer = dict(zip(work, made, strict=True))
        made = [answer[turns] for turns in asked]
    decoding: dict[str, object] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    decoding |= {"seed": seed, "samples": samples, "batch_size": batch_size}  # rows of a batch share its draws
    name = model_identity(model, hashes=False)["model"]
    return Answers(side, name, tuple(conversations), tuple(lines), samples, decoding, tuple(made))


def join_sides(chosen: Answers, rejected: Answers) -> Contrast:
    """Make pairs of the answers of two sides to the same prompts; raises and warns as `contrast_pairs` does.

    Raises `OptionError` where the sides were not asked the same.
    """
    _check_alike(chosen, rejected)
    rows = [
        (prompt, *lines, sample)
        for prompt in chosen.prompts
        for lines in zip(chosen.lines, rejected.lines, strict=True)
        for sample in range(1, chosen.samples + 1)
    ]
    both = list(zip(chosen.answers, rejected.answers, strict=True))
    empty = [not a.text.strip() or not b.text.strip() for a, b in both]
    same = [not nothing and a.text.strip() == b.text.strip() for (a, b), nothing in zip(both, empty, strict=True)]
    made: list[Pair] = []
    for (prompt, line, other, sample), (a, b), *useless in zip(rows, both, empty, same, strict=True):
        if not any(useless):
            meta = {
                "chosen_system": line,
                "rejected_system": other,
                "chosen_model": chosen.model,
                "rejected_model": rejected.model,
                "chosen_tokens": a.tokens,
                "rejected_tokens": b.tokens,
                "chosen_cut": not a.finished,
                "rejected_cut": not b.finished,
                "sample": sample,
                "decoding": dict(chosen.decoding),
            }
            made.append(Pair(prompt, a.text, b.text, meta))
    unique, pairs = len({(pair.prompt, pair.chosen, pair.rejected) for pair in made}), Pairs(made).deduplicate()
    found = Contrast(
        pairs=pairs,
        asked=len(rows),
        empty=sum(empty),
        same=sum(same),
        repeated=len(made) - unique,
        contradictory=unique - len(pairs),
        chosen_cut=int(_total(pairs, "chosen_cut")),
        rejected_cut=int(_total(pairs, "rejected_cut")),
        chosen_tokens=_total(pairs, "chosen_tokens") / max(len(pairs), 1),
        rejected_tokens=_total(pairs, "rejected_tokens") / max(len(pairs), 1),
    )
    _judge(found)
    return found


def _check_alike(chosen: Answers, rejected: Answers) -> None:
    for name in ("prompts", "samples", "decoding"):
        if getattr(chosen, name) != getattr(rejected, name):
            raise OptionError(f"The two sides differ in their {name}. Ask both of them alike.")
    if len(chosen.lines) != len(rejected.lines):
        raise OptionError(
            f"The chosen side has {len(chosen.lines)} system lines and the rejected side {len(rejected.lines)}. A "
            "contrast is one of each; None among them asks without one."
        )
    if (chosen.side, rejected.side) != SIDES:
        raise OptionError(
            f"The sides to join are chosen and rejected, in this order; got {chosen.side} and {rejected.side}."
        )


def _total(pairs: Pairs, name: str) -> float:
    return sum(cast(float, pair.meta[name]) for pair in pairs)


def _judge(found: Contrast) -> None:
    """Raise `PairsError` where no pair is left, and warn of pairs that may not mean what they seem to."""
    if not found.pairs:
        raise PairsError(
            f"No pair is left of {found.asked}: {dropped_text(found)}. Try system lines that ask for more different "
            "answers, other prompts, or several samples at a temperature above 0."
        )
    for side, cut in (("chosen", found.chosen_cut), ("rejected", found.rejected_cut)):
        if cut > CUT_SHARE * len(found.pairs):
            warnings.warn(
                f"{cut} of {len(found.pairs)} {side} answers were cut short. Let max_new_tokens be larger, or ask for "
                "shorter answers.",
                TrimtabWarning,
                stacklevel=3,
            )
    short, long = sorted([found.chosen_tokens, found.rejected_tokens])
    if long > LENGTHS_APART * short:
        warnings.warn(
            f"The chosen answers have {found.chosen_tokens:.1f} tokens on average and the rejected ones "
            f"{found.rejected_tokens:.1f}: what is learned from these pairs may be length, and little else. Ask both "
            "sides for answers of similar length, unless length is what you are after.",
            TrimtabWarning,
            stacklevel=3,
        )


def dropped_text(found: Contrast) -> str:
    """Say how many pairs were left out, and why."""
    reasons = {
        "with the same answer on both sides": found.same,
        "with an empty answer": found.empty,
        "repeated": found.repeated,
        "contradictory": found.contradictory,
    }
    return ", ".join(f"{number} {why}" for why, number in reasons.items() if number) or "none"


# What is asked


def _conversations(prompts: Sequence[Prompt]) -> list[Conversation]:
    found = read_prompts(prompts)
    if not found:
        raise PairsError("There are no prompts to ask.")
    for number, prompt in enumerate(found, 1):
        check_prompt(prompt, f"Prompt {number}")
    return found


def _under(line: str | None, prompt: Conversation) -> Conversation:
    """Put a system line before a prompt, or behind the one that it has."""
    if line is None:
        return prompt
    if prompt[0].role == "system":
        return (Message("system", f"{prompt[0].content}\n\n{line}"), *prompt[1:])
    return (Message("system", line), *prompt)


def _rendered(renderer: Renderer, conversations: Sequence[Conversation]) -> list[list[int]]:
    try:
        return [renderer.prompt_ids(conversation) for conversation in conversations]
    except RenderError as error:
        if any(conversation[0].role == "system" for conversation in conversations):
            raise RenderError(f"{error} {_NO_SYSTEM}") from None
        raise


_NO_SYSTEM = "A contrast needs a model whose template shows system lines, or two models, which make one without any."


def _check_told_apart(renderer: Renderer, prompts: Sequence[Conversation], lines: Lines) -> None:
    """Refuse a contrast whose two sides are the same tokens, as under a template that shows no system line."""
    for one, other in zip(*lines, strict=True):
        sides = [_rendered(renderer, [_under(line, prompt) for prompt in prompts]) for line in (one, other)]
        for number, (a, b) in enumerate(zip(*sides, strict=True), 1):
            if a == b:
                raise RenderError(
                    f"Prompt {number} is the same tokens under {brief(one)} and under {brief(other)}: the chat "
                    f"template does not show system lines, or says this one by itself. {_NO_SYSTEM}"
                )
