"""What a judge's verdicts amount to: win rate, win rate at equal length, position bias, agreement of both orders."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.evals.stats import Interval, bootstrap_mean, wilson

Verdict = Literal["A", "B", "TIE"] | None
"""What a judge says of one order; None for a malformed reply."""

DRAWS = 2000
"""Of the bootstrap of the fit at equal length."""


class Comparison(NamedTuple):
    """A judge's verdicts on N pairs of answers, a and b.

    `orders` are the verdicts with a shown first and with b shown first; `lengths` are those of a and b in characters.
    `same` marks pairs whose answers are the same, which are ties without a call. `calls` were made, and `kept` taken
    from the cache; `read` and `written` are the tokens of the calls, None where the endpoint does not say.
    """

    orders: tuple[tuple[Verdict, Verdict], ...]
    lengths: tuple[tuple[int, int], ...]
    same: tuple[bool, ...]
    calls: int = 0
    kept: int = 0
    read: int | None = None
    written: int | None = None

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """What b gets of each pair, [N]: 1 if both orders prefer it, 0 if both prefer a, else 0.5; NaN if malformed."""
        points: dict[tuple[Verdict, Verdict], float] = {("B", "A"): 1.0, ("A", "B"): 0.0}
        return np.array([np.nan if None in order else points.get(order, 0.5) for order in self.orders], dtype=float)

    @property
    def win_rate(self) -> Interval | None:
        """The mean score of b over pairs with a verdict, ties half, with its interval; None without verdicts.

        Wilson's where there are no ties, else bootstrap.
        """
        scores = self.scores[~np.isnan(self.scores)]
        if not len(scores):
            return None
        whole = np.isin(scores, (0.0, 1.0)).all()
        return wilson(int(scores.sum()), len(scores)) if whole else bootstrap_mean(scores)

    @property
    def win_rate_at_equal_length(self) -> Interval | None:
        """The win rate of b if answers were equally long, by logistic regression, with its bootstrap interval.

        As in length-controlled AlpacaEval (arXiv:2404.04475), without its term for how hard a prompt is: the
        log-odds that b wins are theta + phi tanh(d / s), d being how many characters b is longer and s the root mean
        square of d; the rate is the logistic of theta. Ties count half. One tie is added to the data, half of it at
        either extreme of length, so that there is a finite fit even where lengths or sides decide everything.
        None where one side is longer in every pair: there nothing tells length from merit.
        """
        known = ~np.isnan(self.scores)
        scores, lengths = self.scores[known], np.array(self.lengths, dtype=float).reshape(-1, 2)[known]
        longer = lengths[:, 1] - lengths[:, 0]
        if not len(scores) or (longer.any() and (longer.min() > 0 or longer.max() < 0)):
            return None
        scale = float(np.sqrt((longer**2).mean())) or 1.0
        x = np.tanh(longer / scale)
        random = np.random.default_rng(0)
        weights = random.multinomial(len(x), np.full(len(x), 1 / len(x)), size=DRAWS)
        rates = 1 / (1 + np.exp(-_fit(x, scores, np.vstack([np.ones(len(x)), weights]))))
        low, high = np.quantile(rates[1:], [0.025, 0.975])
        return Interval(float(rates[0]), float(low), float(high))

    def summary(self) -> dict[str, Any]:
        """Return everything that a reader needs to judge the judge, as plain values.

        `agreement` is the share of pairs, of those that were asked and understood, on which both orders say the same;
        `position_bias` the share on which both prefer the same place; `first_share` the share of preferences that go
        to the answer shown first, half without bias.
        """
        asked = [order for order, same in zip(self.orders, self.same, strict=True) if not same]
        both = [order for order in asked if None not in order]
        alike = sum(order in (("A", "B"), ("B", "A"), ("TIE", "TIE")) for order in both)
        stuck = sum(order in (("A", "A"), ("B", "B")) for order in both)
        named = [word for order in asked for word in order if word in ("A", "B")]
        scores = self.scores
        rate, equal = self.win_rate, self.win_rate_at_equal_length
        means = np.array(self.lengths, dtype=float).reshape(-1, 2).mean(axis=0)
        return {
            "pairs": len(self.orders),
            "wins": int((scores == 1).sum()),
            "losses": int((scores == 0).sum()),
            "ties": int((scores == 0.5).sum()),
            "without_verdict": int(np.isnan(scores).sum()),
            "malformed_replies": sum(word is None for order in self.orders for word in order),
            "same_answers": sum(self.same),
            "win_rate": rate and rate._asdict(),
            "win_rate_at_equal_length": equal and equal._asdict(),
            "characters": {"a": float(means[0]), "b": float(means[1])},
            "agreement": alike / len(both) if both else None,
            "position_bias": stuck / len(both) if both else None,
            "first_share": named.count("A") / len(named) if named else None,
            "calls": self.calls,
            "kept_replies": self.kept,
            "tokens_read": self.read,
            "tokens_written": self.written,
        }


def _fit(x: npt.NDArray[Any], y: npt.NDArray[Any], weights: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Fit theta + phi x to soft labels y `[N]` for every row of weights `[R, N]`; return theta `[R]`.

    Newton's method, damped where a step is long: the loss is strictly convex thanks to the tie that is added.
    """
    x, y = np.append(x, [-1.0, 1.0]), np.append(y, [0.5, 0.5])
    w = np.hstack([weights, np.full((len(weights), 2), 0.5)])  # [R, N + 2]
    theta, phi = np.zeros(len(w)), np.zeros(len(w))
    for _ in range(100):
        p = 1 / (1 + np.exp(-(theta[:, None] + phi[:, None] * x)))
        slack, curve = w * (y - p), w * p * (1 - p)
        a, b, c = curve.sum(1), (curve * x).sum(1), (curve * x * x).sum(1)
        g, h = slack.sum(1), (slack * x).sum(1)
        determinant = np.maximum(a * c - b * b, 1e-12)
        steps = np.stack([(c * g - b * h) / determinant, (a * h - b * g) / determinant])
        steps /= np.maximum(1.0, np.abs(steps).max(axis=0) / 2)
        theta, phi = theta + steps[0], phi + steps[1]
        if np.abs(steps).max() < 1e-8:
            break
    return theta
