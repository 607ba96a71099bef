"""Reading pairs: the whole call, rendering included, and learning from them, beside the bare forward pass."""

from __future__ import annotations

from typing import Any

from benchmarks import bare
from benchmarks.models import model_of, tokenizer
from benchmarks.ways import Way, directly
from trimtab.capture import capture
from trimtab.learn import learn
from trimtab.pairs import Pairs


def capturing(options: dict[str, Any]) -> dict[str, Way]:
    """Read the last token of both answers, at all layers or at the upper `read` ones."""
    model = model_of(options)
    depth = model.config.num_hidden_layers
    layers = range(depth - options.get("read", depth), depth)
    pairs = Pairs.from_records([text._asdict() for text in bare.texts_of(options)], duplicates="keep")

    def run() -> None:
        capture(
            model,
            tokenizer(),
            pairs,
            positions=("last",),
            layers=layers,
            format="question_response",
            token_budget=options.get("budget", bare.BUDGET),
            keep=options.get("keep"),
        )

    def learned() -> None:
        learn(model, tokenizer(), pairs, method="pca", layers=layers, token_budget=bare.BUDGET)

    if "keep" in options:  # memory is counted, and what other ways want is not to be in it
        return {"bare": lambda: bare.reading(options)(), "trimtab": directly(run)}
    less = bare.reading(options, even=True)
    return {
        "bare": bare.reading(options),
        "trimtab": directly(run),
        "trimtab, learn": directly(learned),
        "bare, less padding": less,
    }
