"""How likely a model finds given answers, under knobs: margins of pairs and divergence from the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from trimtab.adapter import Adapter
from trimtab.capture.activations import evaluating
from trimtab.checkpoint import NO_CHECKPOINT, Checkpoint
from trimtab.errors import PairsError
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.runtime import Dose, batches_of, steer
from trimtab.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Text(NamedTuple):
    """A rendered prompt with an answer: `ids`, of which `start` and later belong to the answer."""

    ids: list[int]
    start: int


Row = tuple[Text, Dose]
"""A text and the knobs under which it is scored."""


class Margins(NamedTuple):
    """Log-likelihoods in nats, summed over the answer's tokens: `chosen` [N], `rejected` [N]."""

    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        """Log p(chosen) - log p(rejected) per pair, [N]."""
        return self.chosen - self.rejected


def render_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[str],
    *,
    closing: bool = True,
) -> list[Text]:
    """Render every prompt with its answer; `closing` tokens included, since they are part of what the model says."""
    renderer = Renderer(tokenizer)
    rendered = [renderer.full(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return [Text(r.ids[: len(r.ids) if closing else r.response_end], r.response_start) for r in rendered]


def pair_margins(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    settings: Sequence[Dose],
    *,
    answer_tokens: int | None = None,
    token_budget: int = 8192,
    kept: Checkpoint = NO_CHECKPOINT,
) -> list[Margins]:
    """Score the answers of every pair under every setting; rows of different settings share batches.

    Returns one `Margins` per setting, in their order. `answer_tokens` scores only the first tokens of every answer.
    Batches that `kept` holds are not run again; a checkpoint serves one such call.
    """
    prompts = [pair.prompt for pair in pairs]
    texts = render_texts(tokenizer, prompts * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs])
    if answer_tokens is not None:
        texts = [Text(text.ids[: text.start + answer_tokens], text.start) for text in texts]
    rows = [(text, setting) for setting in settings for text in texts]
    sums = log_likelihoods(model, tokenizer, rows, token_budget=token_budget, kept=kept)
    return [Margins(*block) for block in sums.reshape(len(settings), 2, len(pairs))]


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    token_budget: int = 8192,
    kept: Checkpoint = NO_CHECKPOINT,
    key: str = "margins",
) -> np.ndarray:
    """Return the log-likelihood of each row's answer under its knobs, in nats, summed over the answer's tokens.

    Batches that `kept` holds under `key` are not run again.
    """
    sums = np.zeros(len(rows))
    for number, batch in enumerate(_batches(rows, token_budget)):
        score = partial(_likelihoods, model, tokenizer, [rows[i] for i in batch])
        sums[batch] = kept.step(f"{key} {number}", score)
    return sums


def divergence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    setting: Dose,
    *,
    other: PreTrainedModel | None = None,
    other_texts: Sequence[Text] | None = None,
    token_budget: int = 8192,
) -> float:
    """Return KL(base || changed) in nats per token, over the answers' tokens.

    Changed is the model under `setting`; or `other`, a model with the same vocabulary, under it; or either with the
    same answers after other prompts, `other_texts`.
    """
    sums = divergences(
        model, tokenizer, texts, setting, other=other, other_texts=other_texts, token_budget=token_budget
    )
    count = sum(len(text.ids) - text.start for text in texts)
    return max(sum(sums) / max(count, 1), 0.0)  # rounding can leave a little less than 0


def divergences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    setting: Dose,
    *,
    other: PreTrainedModel | None = None,
    other_texts: Sequence[Text] | None = None,
    token_budget: int = 8192,
) -> list[float]:
    """Return KL(base || changed) in nats, summed over each answer's tokens, [N]; see `divergence`."""
    sums: list[float] = []
    changed = texts if other_texts is None else other_texts
    # A few texts at a time: at a real vocabulary the log-probabilities of all fill memory.
    for start in range(0, len(texts), 8):
        some = slice(start, start + 8)
        before = _log_probabilities(model, tokenizer, [(text, {}) for text in texts[some]], token_budget)
        after = _log_probabilities(other or model, tokenizer, [(text, setting) for text in changed[some]], token_budget)
        sums += [float((base.exp() * (base - steered)).sum()) for base, steered in zip(before, after, strict=True)]
    return sums


def _log_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], token_budget: int
) -> list[torch.Tensor]:
    """Return the log-probabilities [T, V] at each row's answer, in the order of the rows."""
    found: dict[int, torch.Tensor] = {}
    for batch in _batches(rows, token_budget):
        answers = _forward(model, tokenizer, [rows[i] for i in batch])
        found.update((number, logps) for number, (logps, _) in zip(batch, answers, strict=True))
    return [found[number] for number in range(len(rows))]


def _batches(rows: Sequence[Row], token_budget: int) -> list[list[int]]:
    """Group the numbers of rows of similar length, longest first: `token_budget` tokens with padding, or one row."""
    batches: list[list[int]] = []
    for group in batches_of([setting for _, setting in rows]):
        order = sorted(group, key=lambda i: len(rows[i][0].ids))
        while order:
            batch = [order.pop()]
            width = len(rows[batch[0]][0].ids)
            while order and (len(batch) + 1) * width <= token_budget:
                batch.append(order.pop())
            batches.append(batch)
    return batches


def _likelihoods(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Row]) -> list[float]:
    """Return the log-likelihood of each row's answer, in nats.

    Nothing is read after a text's last token: rows that differ in that token alone, as letters do, are run once.
    """
    groups: dict[Any, list[int]] = {}
    for i, (text, knobs) in enumerate(batch):
        groups.setdefault((tuple(text.ids[:-1]), text.start, tuple(knobs.items())), []).append(i)
    found = [0.0] * len(batch)
    runs = _forward(model, tokenizer, [batch[group[0]] for group in groups.values()])
    for group, (logps, _) in zip(groups.values(), runs, strict=True):
        for i in group:
            text, _ = batch[i]
            found[i] = float(logps.gather(-1, torch.tensor(text.ids[text.start :])[:, None]).sum())
    return found


def _forward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Row]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Run rows in one batch; yield log-probabilities [T, V] and ids [T] of each row's answer."""
    renderer, adapter = Renderer(tokenizer), Adapter(model)
    longest, limit = max(len(text.ids) for text, _ in batch), adapter.context_length
    if limit is not None and longest > limit:
        raise PairsError(
            f"A prompt with its answer is {longest} tokens long when rendered; this model's context holds {limit}. "
            "Leave long pairs out."
        )
    for text, _ in batch:
        adapter.check_ids(text.ids)
    inputs = renderer.pad([list(text.ids) for text, _ in batch], side="right")
    # Position start - 1 predicts the answer's first token: the prompt ends there.
    lengths = [text.start for text, _ in batch]
    settings, thinking = [knobs for _, knobs in batch], renderer.thinking()
    with torch.no_grad(), evaluating(model), steer(adapter, settings, prompt_lengths=lengths, thinking=thinking):
        logits = model(
            input_ids=inputs.input_ids.to(adapter.input_device),
            attention_mask=inputs.attention_mask.to(adapter.input_device),
            position_ids=inputs.position_ids.to(adapter.input_device),
            use_cache=False,
        ).logits
    for row, (text, _) in enumerate(batch):
        answer = logits[row, text.start - 1 : len(text.ids) - 1].float().cpu()
        yield answer.log_softmax(-1), torch.tensor(text.ids[text.start :])
