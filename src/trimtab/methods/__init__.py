"""Evidence to directions: one file, one pure function and one paper per method; `METHODS` is the list."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimtab.errors import OptionError, unknown_name
from trimtab.methods.cold_kernel import cold_kernel
from trimtab.methods.diffmean import diffmean
from trimtab.methods.icv import icv
from trimtab.methods.palrs import palrs
from trimtab.methods.pca import pca
from trimtab.methods.random import random

KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Method:
    """A method by name: its function, its paper, and how the paper reads the pairs where the caller does not say."""

    name: str
    function: Callable[..., Tensor]
    """`(chosen [N, S, D], rejected [N, S, D], *, options) -> vectors [S, D]`; keyword-only parameters are options.

    Where the evidence is gradients, it takes `(gradients [N, S, D], activations [N, S, D], *, options)`.
    """
    paper: str
    summary: str
    format: Literal["response_as_user", "question_response"]
    position: str
    """Position that is read; "" leaves it to the format and the template."""
    selection: str
    evidence: Literal["activations", "gradients"] = "activations"
    of_means: bool = False
    """Whether the function looks at nothing but the pairs' means; `equal_weight` makes it look at every pair."""

    @property
    def defaults(self) -> dict[str, object]:
        """The function's options with their default values."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def check(self, options: Mapping[str, object]) -> Mapping[str, object]:
        """Return `options`; one that the method does not have, or of another type than its default, is an error."""
        if not isinstance(options, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"Options are a mapping of names to values; got {options!r}.")
        for name, value in options.items():
            if name not in self.defaults:
                raise unknown_name(f"option of method {self.name}", name, self.defaults)
            wanted, got = type(self.defaults[name]), type(value)
            if got is not wanted and (got, wanted) != (int, float):
                said = KINDS[wanted]
                raise OptionError(f"Option {name!r} of method {self.name} is {said}; got {value!r}.")
        return options

    def run(self, chosen: Tensor, rejected: Tensor, options: Mapping[str, object]) -> Tensor:
        """Return the vectors `[S, D]` float64 of the pairs' activations `[N, S, D]`."""
        self.check(options)
        if chosen.shape != rejected.shape or chosen.dim() != 3 or not len(chosen):
            raise OptionError(
                "Activations must be two tensors [N, S, D] of one shape, N at least 1; "
                f"got {list(chosen.shape)} and {list(rejected.shape)}."
            )
        return self.function(chosen, rejected, **options)


METHODS: dict[str, Method] = {
    "palrs": Method(
        "palrs",
        palrs,
        "arXiv:2509.23982",
        "mean difference of the answers alone, read at the template's tokens after the user's slot",
        "response_as_user",
        "",
        "eq3_cosine",
        of_means=True,
    ),
    "diffmean": Method(
        "diffmean",
        diffmean,
        "arXiv:2312.06681",
        "mean difference at the answer's last token, after its question (CAA)",
        "question_response",
        "last",
        "max_relative_norm",
        of_means=True,
    ),
    "pca": Method(
        "pca",
        pca,
        "arXiv:2310.01405",
        "first principal component of the pairs' differences (RepE)",
        "question_response",
        "last",
        "max_relative_norm",
    ),
    "icv": Method(
        "icv",
        icv,
        "arXiv:2311.06668",
        "first principal component of the pairs' differences over all layers together (ICV)",
        "question_response",
        "last",
        "max_relative_norm",
    ),
    "cold-kernel": Method(
        "cold-kernel",
        cold_kernel,
        "arXiv:2603.06495",
        "minus the mean gradient of a loss at the prompt's last token (COLD-Kernel)",
        "question_response",
        "last_prompt",
        "first_order",
        "gradients",
    ),
    "random": Method(
        "random",
        random,
        "",
        "random directions as long as the mean difference, read as PaLRS reads: a control",
        "response_as_user",
        "",
        "eq3_cosine",
        of_means=True,
    ),
}
TRAINED = {"preference-vector": "arXiv:2504.20106", "alignment-vector": "arXiv:2410.19206"}
"""Methods whose evidence is training, with their papers: `trimtab.learn_weights`."""
ELSEWHERE = {
    **dict.fromkeys(TRAINED, "learn_weights"),
    "cold-fd": "learn_lookahead",
    "one-step": "learn_step",
    "bipo": "learn_vector",
}
"""Methods that are no function of activations, or of gradients there, with the package's functions that learn so."""
