"""A method of your own, in one file: a pure function of the pairs' activations, and what it is called."""

from torch import Tensor

import trimtab
from trimtab.methods import METHODS, Method
from trimtab.prefworld import world


def median_difference(chosen: Tensor, rejected: Tensor, *, trim: float = 0.0) -> Tensor:
    """Return the median over pairs of `chosen - rejected`, `[S, D]`; values below `trim` become 0."""
    median = (chosen - rejected).double().quantile(0.5, dim=0)  # [N, S, D] -> [S, D]
    return median * (median.abs() >= trim)


# Keyword-only parameters are its options; their defaults say of which type they are.
METHODS["median"] = Method(
    name="median",
    function=median_difference,
    paper="",
    summary="median of the pairs' differences",
    format="question_response",
    position="last",
    selection="max_relative_norm",
)

model, tokenizer = trimtab.load("prefworld")
pairs, question = world.pairs("math", 100), world.items("math", "test", 1)[0].prompt
for method, options in (("diffmean", {}), ("median", {"trim": 0.01})):
    knob = trimtab.learn(model, tokenizer, pairs, method=method, options=options)
    (answer,) = trimtab.generate(model, tokenizer, [question], knobs={knob: 1})
    print(f"{method} at {knob.site}, options {options}: {answer.text}")
