"""Side effects of a knob: divergence from the bare model, perplexity of neutral text, what becomes of answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from trimtab.adapter import Adapter
from trimtab.checkpoint import NO_CHECKPOINT, Checkpoint
from trimtab.errors import OptionError, PairsError, brief
from trimtab.evals.graders import repetition
from trimtab.evals.likelihood import Text, divergences, log_likelihoods, render_texts
from trimtab.evals.stats import Interval, Scores, bootstrap_ratio, paired_bootstrap
from trimtab.evals.tasks import Prompt
from trimtab.files import read_bytes, reason
from trimtab.formats import read_file
from trimtab.prompts import read_prompt
from trimtab.render import Renderer
from trimtab.runtime import Dose
from trimtab.types import Where, is_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 1024
"""Tokens of neutral text that are read at once; fewer where the model's context holds fewer."""
TEXT_LIMIT = 2**26
"""Longest file of neutral text that is read, in bytes."""

STEERED_OF_NEUTRAL: dict[Where, str] = {
    "all": "every token",
    "completion": "every token",
    "answer": "every token outside thoughts",
    "prompt": "the opening token only",
    "context": "no token",
    "thinking": "no token outside thoughts",
}
"""What each `where` steers of a text without a prompt: its opening is the prompt, and all that follows is said."""


class Effect(NamedTuple):
    """A mean over items without the knob and with it, and the mean of the items' differences with its interval."""

    bare: float
    steered: float
    change: Interval


def effect(bare: Scores, steered: Scores) -> Effect:
    """Compare a measure of the same items `[N]` without and with a knob, by paired bootstrap."""
    return Effect(float(np.mean(bare)), float(np.mean(steered)), paired_bootstrap(bare, steered))


# Answers


class Manner(NamedTuple):
    """How answers are, `[n]` each: share of repeated 4-grams, and length in tokens (0 for an empty answer)."""

    repetition: np.ndarray
    tokens: np.ndarray


def manner(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answers: Sequence[str]) -> Manner:
    """Measure answers after their prompts; tokens are those of the text, without the ones that close the turn."""
    renderer = Renderer(tokenizer)
    tokens = [
        renderer.response_length(read_prompt(prompt), answer) if answer.strip() else 0
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return Manner(np.array([repetition(answer) for answer in answers]), np.array(tokens, dtype=float))


def own_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answers: Sequence[str]
) -> list[Text]:
    """Render the bare model's answers with their prompts; empty ones, and those past its context, are left out."""
    told = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer.strip()]
    texts = render_texts(tokenizer, [read_prompt(prompt) for prompt, _ in told], [answer for _, answer in told])
    limit = Adapter(model).context_length
    return [text for text in texts if limit is None or len(text.ids) <= limit]


class Divergence(NamedTuple):
    """KL(base || steered) of N answers: `nats` summed over the tokens of each, and how many `tokens` these are."""

    nats: np.ndarray
    tokens: np.ndarray

    def per_token(self) -> Interval:
        """Return nats per token over all answers, with its bootstrap interval over answers."""
        found = bootstrap_ratio(self.nats, self.tokens)
        return Interval(*(max(0.0, end) for end in found))  # rounding can leave a little less than 0


def divergence_of_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    setting: Dose,
    *,
    kept: Checkpoint = NO_CHECKPOINT,
    key: str = "kl",
) -> Divergence:
    """Measure how far a setting moves the model's next-token distributions along its own answers.

    `texts` are `own_answers`. Where the bare model was sure, a small change costs much: that is meant, since these are
    the tokens that it would have said. What `kept` holds under `key` is not measured again.
    """
    nats = kept.step(key, lambda: divergences(model, tokenizer, texts, setting))
    return Divergence(np.array(nats), np.array([len(text.ids) - text.start for text in texts], dtype=float))


# Neutral text


class Perplexity(NamedTuple):
    """Neutral texts as the model reads them, `[N]` each: `nats` (negative log-likelihood), `tokens` and `bytes`."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @property
    def per_token(self) -> float:
        """Exponential of nats per token: for one tokenizer only."""
        return math.exp(min(float(self.nats.sum() / self.tokens.sum()), 700.0))  # of a model that is beside itself

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the text, which compares over tokenizers."""
        return float(self.nats.sum() / self.bytes.sum()) / math.log(2)


def perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: Sequence[Dose],
    *,
    kept: Checkpoint = NO_CHECKPOINT,
) -> list[Perplexity]:
    """Read texts without a prompt or a chat template under every setting; one `Perplexity` per setting.

    A text is opened as the tokenizer opens one (BOS) and read in windows of at most `WINDOW` tokens, each of which
    begins anew; every token counts once, but for the first where nothing opens a text. What a knob steers of such a
    text is `STEERED_OF_NEUTRAL`: knobs on prompts leave it alone, and their side effects show in answers.
    Raises `OptionError` for a text with nothing to predict.
    """
    limit = Adapter(model).context_length
    size = WINDOW if limit is None else min(limit, WINDOW)
    windows: list[Text] = []
    owners: list[int] = []
    lengths: list[int] = []
    for number, text in enumerate(texts):
        cut, length = _windows(Renderer(tokenizer), text, size)
        if not cut:
            raise OptionError(f"Neutral text {number + 1} has no token to predict: {brief(text)}. Leave it out.")
        windows += cut
        owners += [number] * len(cut)
        lengths.append(length)
    if not windows:
        raise OptionError("There is no neutral text. Pass at least one.")
    rows = [(window, setting) for setting in settings for window in windows]
    sums = log_likelihoods(model, tokenizer, rows, kept=kept, key="neutral").reshape(len(settings), len(windows))
    tokens = np.bincount(owners, [len(window.ids) - window.start for window in windows])
    return [Perplexity(np.bincount(owners, -row), tokens, np.array(lengths, dtype=float)) for row in sums]


def perplexity_change(bare: Perplexity, steered: Perplexity) -> Interval:
    """Return how many nats per token the text becomes less likely, with its bootstrap interval over texts."""
    return bootstrap_ratio(steered.nats - bare.nats, bare.tokens)


def _windows(renderer: Renderer, text: str, size: int) -> tuple[list[Text], int]:
    """Cut a text so that every token is predicted once; return the windows, and the bytes that they predict."""
    whole = renderer.plain(text)
    opening, body, length = whole.ids[: whole.response_start], whole.ids[whole.response_start :], len(text.encode())
    if not opening:  # the last token of a window opens the next, and the first of all goes unpredicted
        length -= len(renderer.decode(body[:1]).encode())
        step = size - 1
        cut = [Text(body[max(0, at - 1) : at + step], 1) for at in range(1, len(body), step)]
        return cut, max(1, length)
    step = size - len(opening)
    return [Text([*opening, *body[at : at + step]], len(opening)) for at in range(0, len(body), step)], length


def load_texts(path: str | Path) -> list[str]:
    """Read neutral texts: paragraphs of a .txt or .md file, or the field `text` of records (see `trimtab.formats`).

    Raises `OptionError` that says what is wrong with the file.
    """
    if Path(path).suffix in (".txt", ".md"):
        try:
            text = read_bytes(path, TEXT_LIMIT).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise OptionError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
        except OSError as error:
            raise OptionError(f"{path} cannot be read: {reason(error)}.") from None
        texts = [part.strip() for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]
    else:
        texts = _records(path)
    if not texts:
        raise OptionError(f"{path} holds no text.")
    return texts


def _records(path: str | Path) -> list[str]:
    texts: list[str] = []
    try:
        records = read_file(path)
    except PairsError as error:
        raise OptionError(str(error)) from None
    for place, record in records:
        text = cast(Mapping[str, object], record).get("text") if isinstance(record, Mapping) else None
        if not isinstance(text, str) or not text.strip() or not is_unicode(text):
            raise OptionError(f"{path}: {place} needs a text; got {brief(record)}.")
        texts.append(text)
    return texts
