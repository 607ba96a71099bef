"""Losses whose gradient steers: what the examples ask of the model, as functions of its answers' log-likelihoods.

Cards and equations: COLD-Steer (arXiv:2603.06495); DPO (arXiv:2305.18290, Eq. 7); SimPO (arXiv:2405.14734, Eq. 6). All
of them at the model as it is: DPO's reference is the model itself, so that its margin starts at 0. Only directions
matter, since strengths are relative to norms; a loss's scale cancels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.errors import OptionError, PairsError, brief, unknown_name
from trimtab.types import Pair, check_strength

Per = Literal["answer", "token"]
IGNORED = -100
"""The label of a token that belongs to no answer."""

LossFn = Callable[[Tensor, Tensor], Tensor]
"""`(logits [R, T, V], labels [R, T]) -> loss`, one for each pair `[pairs]`, or their sum `[]`: the chosen answers of a
batch of pairs come first, then the rejected ones. `labels[r, t]` is the token that `logits[r, t]` predicts, `IGNORED`
outside of the answer. A mean would make a pair's gradient depend on the batch it is in."""


@dataclass(frozen=True)
class Loss:
    """A loss by name, and which answers of a pair it looks at."""

    name: str
    function: Callable[..., Tensor]
    """`(likelihoods [B, K], tokens [B, K], shares [B, K], *, options) -> [B]`, in nats; or a `LossFn`."""
    answers: Literal["both", "chosen", "rejected", "options"]
    options: Mapping[str, float | str] = field(default_factory=dict[str, "float | str"])
    own: bool = False
    """The caller's own function of logits and labels."""

    def __call__(self, logits: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        """Return the sum of the loss over a batch of items, [] float32, from all their rows, answer by answer.

        `logits [K * B, T, V]` hold the first answers of all items, then the second ones; `labels [K * B, T]` as in
        `LossFn`; `shares [B, K]`.
        """
        if self.own:
            value = self.function(logits, labels)
            if not isinstance(value, Tensor) or not value.requires_grad:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptionError(f"The loss {self.name} must return a tensor that depends on the logits.")
            if value.dim() > 1 or value.numel() not in (1, len(shares)):
                raise OptionError(
                    f"The loss {self.name} must return one value for each of {len(shares)} pairs, or their sum; got "
                    f"shape {list(value.shape)}."
                )
            return value.float().sum()
        sums, counts = answer_likelihoods(logits, labels)
        answers = shares.shape[1]
        likelihoods, tokens = (rows.unflatten(0, (answers, -1)).T for rows in (sums, counts))  # [B, K]
        return self.function(likelihoods, tokens, shares, **self.options).sum()

    @property
    def sums_tokens(self) -> bool:
        """Whether it compares two answers by sums over their tokens, so that a longer one counts for more."""
        return self.answers == "both" and self.name != "simpo" and self.options.get("per", "answer") == "answer"

    def check_checkpoint(self, folder: object) -> None:
        """Raise `OptionError` for a function of the caller's where a folder would keep what it made."""
        if self.own and folder is not None:
            raise OptionError(
                f"A checkpoint cannot tell the loss {self.name} from another function of that name. Leave checkpoint "
                "out, or use a loss that Trimtab names."
            )

    def texts(self, pair: Pair, number: int) -> tuple[str, ...]:
        """Return the answers of one pair that the loss looks at."""
        if self.answers == "options":
            return _survey(pair, number)[0]
        both = {"chosen": (pair.chosen,), "rejected": (pair.rejected,)}
        return both.get(self.answers, (pair.chosen, pair.rejected))

    def shares(self, pair: Pair, number: int) -> tuple[float, ...]:
        """Return what is wanted of each answer: shares where the loss has a target, else ones."""
        return _survey(pair, number)[1] if self.answers == "options" else (1.0,) * len(self.texts(pair, number))

    @property
    def closing(self) -> bool:
        """Whether the tokens that close an answer count: an option is what an answer begins with."""
        return self.answers != "options"

    def __str__(self) -> str:
        said = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}:{said}" if said else self.name


def answer_likelihoods(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood of each row's answer in nats, and its number of tokens, `[R]` float32 each."""
    counted = labels != IGNORED
    at = counted.nonzero(as_tuple=True)
    # Only the answers' logits: those of whole texts would fill memory in float32.
    found = logits[at].float().log_softmax(-1).gather(-1, labels[at][:, None])[:, 0]
    return found.new_zeros(len(labels)).index_add(0, at[0], found), counted.sum(1).float()


def sft(likelihoods: Tensor, tokens: Tensor, shares: Tensor, *, per: Per = "token") -> Tensor:
    """Return the cross-entropy of the chosen answer `[B]`: per token, or summed over the answer."""
    return -_measured(likelihoods, tokens, per)[:, 0]


def negative_sft(likelihoods: Tensor, tokens: Tensor, shares: Tensor, *, per: Per = "token") -> Tensor:
    """Return minus the cross-entropy of the rejected answer `[B]`."""
    return _measured(likelihoods, tokens, per)[:, 0]


def dpo(likelihoods: Tensor, tokens: Tensor, shares: Tensor, *, beta: float = 0.1, per: Per = "answer") -> Tensor:
    """Return DPO's loss `[B]` where the policy still is its reference: log 2, with a gradient.

    `per` "token" compares mean log-probabilities, as COLD-Steer's released code does, without a reference there.
    """
    measured = _measured(likelihoods, tokens, per)
    ratio = measured - measured.detach()
    return -logsigmoid(beta * (ratio[:, 0] - ratio[:, 1]))


def simpo(likelihoods: Tensor, tokens: Tensor, shares: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Return SimPO's loss `[B]`, of mean log-probabilities and without a reference; pairs already won count less."""
    mean = likelihoods / tokens
    return -logsigmoid(beta * (mean[:, 0] - mean[:, 1]) - gamma)


def distribution(likelihoods: Tensor, tokens: Tensor, shares: Tensor) -> Tensor:
    """Return the cross-entropy `[B]` of the model's choice among options to the shares that a group gives them.

    The model's choice is a softmax of the options' log-likelihoods; of options of one token each it is that over these
    tokens at the last position.
    """
    return -(shares * likelihoods.log_softmax(-1)).sum(-1)


LOSSES: dict[str, Loss] = {
    "sft": Loss("sft", sft, "chosen"),
    "negative-sft": Loss("negative-sft", negative_sft, "rejected"),
    "dpo": Loss("dpo", dpo, "both"),
    "simpo": Loss("simpo", simpo, "both"),
    "distribution": Loss("distribution", distribution, "options"),
}


def read_loss(loss: str | LossFn | Loss) -> Loss:
    """Return a loss by its text, such as "dpo" or "simpo:beta=2,gamma=0.5", or one that is a function.

    >>> str(read_loss("dpo:per=token"))
    'dpo:per=token'
    """
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str):
        if not callable(loss):  # pyright: ignore[reportUnnecessaryComparison]
            raise OptionError(f"A loss is a name or a function of logits and labels; got {brief(loss)}.")
        function = loss.func if isinstance(loss, partial) else loss
        named = getattr(function, "__qualname__", type(function).__name__)
        return Loss(f"function {getattr(function, '__module__', '?')}.{named}", loss, "both", own=True)
    name, colon, text = loss.partition(":")
    if name not in LOSSES:
        raise unknown_name("loss", name, LOSSES)
    known = LOSSES[name]
    signature = inspect.signature(known.function).parameters.values()
    defaults = {p.name: p.default for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}
    if colon and not text.strip():
        raise OptionError(f"The loss {loss!r} names no option behind its colon. Known: {', '.join(sorted(defaults))}.")
    options: dict[str, float | str] = {}
    for part in text.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in defaults:
            raise unknown_name(f"option of loss {name}", key, defaults)
        if not equals:
            raise OptionError(f"The loss {loss!r} names {key} without a value, as in {name}:{key}={defaults[key]}.")
        if key in options:
            raise OptionError(f"The loss {loss!r} sets {key} twice.")
        options[key] = _option(key, value)
    return Loss(name, known.function, known.answers, options)


def _option(key: str, value: str) -> float | str:
    if key == "per":
        if value not in ("answer", "token"):
            raise unknown_name("per", value, ("answer", "token"))
        return value
    number = check_strength(cast(float, value), key)
    if number < 0 or (key == "beta" and number == 0):
        raise OptionError(f"A loss's {key} is {'above 0' if key == 'beta' else '0 or more'}; got {value}.")
    return number


def _measured(likelihoods: Tensor, tokens: Tensor, per: Per) -> Tensor:
    return likelihoods / tokens if per == "token" else likelihoods


def _survey(pair: Pair, number: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return options and shares of a pair's record; raises `PairsError` where it has none that fit each other."""
    options: Any = pair.meta.get("options")
    shares: Any = pair.meta.get("shares")
    good = (
        isinstance(options, list | tuple)
        and isinstance(shares, list | tuple)
        and len(cast(list[object], options)) == len(cast(list[object], shares)) >= 2
        and all(isinstance(option, str) and option for option in cast(list[object], options))
        and all(isinstance(s, int | float) and not isinstance(s, bool) and s >= 0 for s in cast(list[object], shares))
        and 0 < sum(cast(list[float], shares)) < float("inf")
        and len(set(cast(list[str], options))) == len(cast(list[str], options))
    )
    if not good:
        raise PairsError(
            f"Pair {number}: the loss 'distribution' needs options (two texts or more, none empty or twice) and shares "
            f"(as many numbers, not negative and not all 0) beside the answers; got {brief(options)} and "
            f"{brief(shares)}."
        )
    total = float(sum(cast(list[float], shares)))
    return tuple(cast(list[str], options)), tuple(float(share) / total for share in cast(list[float], shares))
