"""The cases: what is measured, and at which sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

OURS, THEIRS = "ours", "theirs"
Side = Literal["ours", "theirs"]


@dataclass(frozen=True)
class Case:
    """Ways that are run one after another in each round; the first way of each side is the one it is divided by."""

    name: str
    section: str
    about: str
    kind: str
    options: Mapping[str, Any]
    sides: tuple[Side, ...] = (OURS,)
    ways: tuple[str, ...] = ()
    """The ways that are run; none stands for all."""
    rounds: float = 1.0
    """In multiples of what is asked for: fewer where a round takes minutes, more where it takes a second."""
    once: bool = False
    """On the first of the numbers of threads alone."""
    fresh: Literal["", "run", "round"] = ""
    """What has a process of its own: every run, for what is counted of a process; or every round, where it matters
    where things happen to lie in memory."""
    curve: str = ""
    """The axis of a plot, of which this case is a point."""
    accelerator: bool = False
    """Whether it is measured on accelerators too."""

    @property
    def spec(self) -> dict[str, Any]:
        """What was measured, as it is kept; results of another spec are not taken up."""
        return {"kind": self.kind, "options": dict(self.options), "ways": [*self.ways]}


BOTH: tuple[Side, ...] = (OURS, THEIRS)
SIZES = ("tiny", "small", "1b", "3b", "7b")
"""Of models on an accelerator, as in `models.SHAPES`."""
DTYPES = ("float32", "float16", "bfloat16")
SHARES = (0.0, 0.5, 0.8)
"""Of the prompt in a side's tokens."""
BATCHES = (1, 4, 16, 64)
STEPPED = (1, 16)
ROUNDS = {1: 3.0, 4: 2.0, 16: 2.0, 64: 1.0}
"""More rounds where each is short."""
MEMORY = (100, 1000, 10_000)
KEPT = 256
"""Pairs whose activations are kept, as `trimtab.learn` does by methods of means."""
SHALLOW = "; width 1024, two layers"
WIDE_LAYERS, SITES = 10, (4, 7)


def capturing() -> list[Case]:
    """Return the cases of reading pairs."""
    small = {"shape": "small", "tokens": 96}
    short = {"shape": "small", "tokens": 32, "share": 0.5}
    cases = [
        Case(
            f"capture-{pairs}-share-{100 * share:.0f}",
            "Reading pairs",
            f"{pairs:,} pairs of 72 to 120 tokens a side, {100 * share:.0f} % the prompt's; all layers, last token",
            "capture",
            {**small, "pairs": pairs, "share": share},
            BOTH,
            ways=() if pairs == 100 else ("bare", "trimtab", "trimtab, learn", "repeng", "steering-vectors"),
            rounds=1.0 if pairs == 100 else 1 / 5,
            once=pairs > 100,
            accelerator=True,
        )
        for pairs in (100, 1000)
        for share in SHARES
    ]
    cases.append(
        Case(
            "capture-vocabulary-150k",
            "Reading pairs",
            "25 pairs, prompt of one token, by a model with a vocabulary of 150,000: what the LM head costs",
            "capture",
            {**small, "pairs": 25, "share": 0.0, "vocabulary": 150_000},
            BOTH,
        )
    )
    cases += [
        Case(
            f"memory-{pairs}",
            "Memory of reading pairs",
            f"{pairs:,} pairs of 24 to 40 tokens a side, half of them the prompt's; 4,096 tokens a batch; activations "
            f"of {KEPT} at most are kept; every run in a new process",
            "capture",
            {**short, "pairs": pairs, "keep": KEPT, "budget": 4096},
            ways=("bare", "trimtab") if pairs < 10_000 else ("trimtab",),
            rounds=1 / 9,
            once=True,
            fresh="run",
        )
        for pairs in MEMORY
    ]
    cases += [
        Case(
            f"pairs-{pairs}",
            "Curves",
            f"{pairs:,} pairs of 24 to 40 tokens a side, half of them the prompt's",
            "capture",
            {**short, "pairs": pairs},
            BOTH,
            ways=("bare", "trimtab", "repeng", "steering-vectors, batch 32"),
            rounds=1.0 if pairs < 1000 else 1 / 3,
            once=True,
            curve="pairs",
        )
        for pairs in (25, 100, 400, 1600)
    ]
    cases += [
        Case(
            f"layers-{layers}",
            "Curves",
            f"100 pairs of 24 to 40 tokens a side, half of them the prompt's, read at the upper {layers} of 8 layers",
            "capture",
            {**short, "pairs": 100, "read": layers},
            ways=("bare", "trimtab"),
            once=True,
            curve="layers",
        )
        for layers in (1, 2, 4, 8)
    ]
    return cases


def steering() -> list[Case]:
    """Return the cases of generating and scoring."""
    cases = [
        Case(
            f"generate-{rows}",
            "Generation",
            f"greedy, KV cache, 64 tokens after 64, batch {rows}; a vector at four layers",
            "generate",
            {"shape": "small", "rows": rows, "prompt": 64, "new": 64},
            BOTH,
            rounds=ROUNDS[rows],
            curve="batch",
            accelerator=True,
        )
        for rows in BATCHES
    ]
    cases += [
        Case(
            f"steps-{rows}",
            "Generation, step by step",
            f"greedy, KV cache, 64 tokens after 64, batch {rows}, without `generate`; a vector at four layers",
            "step",
            {"shape": "small", "rows": rows, "prompt": 64, "new": 64},
            rounds=ROUNDS[rows],
            fresh="round",
        )
        for rows in STEPPED
    ]
    cases.append(
        Case(
            "score-16",
            "Scoring",
            "logits of 16 rows of 128 tokens; a vector at four layers",
            "score",
            {"shape": "small", "rows": 16, "prompt": 128},
            BOTH,
            rounds=2.0,
            accelerator=True,
        )
    )
    cases += [
        Case(
            f"knobs-{knobs}",
            "Curves",
            f"64 tokens after 64 at batch 16, {knobs} knobs turned at once, in every row at other strengths",
            "mix",
            {"shape": "small", "rows": 16, "prompt": 64, "new": 64, "knobs": knobs},
            once=True,
            curve="knobs",
            accelerator=True,
        )
        for knobs in (1, 4, 16, 64)
    ]
    cases.append(
        Case(
            "compiled-1",
            "Compiled",
            "64 tokens after 64 at batch 1, static KV cache, decode steps under torch.compile; a vector at four layers",
            "compiled",
            {"shape": "small", "rows": 1, "prompt": 64, "new": 64},
            rounds=3.0,
            once=True,
            accelerator=True,
        )
    )
    return cases


def weighing() -> list[Case]:
    """Return the cases of weight knobs and of lookahead knobs."""
    cases = [
        Case(
            f"dense-{dtype}-{stored}-{'fresh' if fresh else 'used'}",
            "Dense weight knobs",
            f"differences in {stored} on 268 million weights in {dtype}, in memory "
            + ("that was not used before" if fresh else "that was used before"),
            "dense",
            {"shape": "wide", "layers": 16, "dtype": dtype, "stored": stored, "fresh": fresh},
            once=True,
        )
        for dtype, stored in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
        for fresh in (True, False)
    ]
    cases += [
        Case(
            f"low-rank-{'decode' if new else 'prefill'}-{rows}",
            "Low-rank weight knobs",
            (f"16 tokens after 4, batch {rows}" if new else f"a prompt of 32 tokens, batch {rows}")
            + "; another mixture in every row"
            + SHALLOW,
            "low-rank",
            {"shape": "wide", "layers": 2, "rows": rows, "prompt": 4 if new else 32, "new": new},
            once=True,
            accelerator=True,
        )
        for new in (0, 16)
        for rows in (1, 8, 32)
    ]
    sites = {"shape": "wide", "sites": [*SITES]}
    works = {"decode-1": (1, 8, 8), "decode-4": (4, 8, 8), "prefill-1": (1, 128, 0)}
    cases += [
        Case(
            f"lookahead-{name}",
            "Lookahead knobs",
            (f"8 tokens after 8, batch {rows}" if new else "a prompt of 128 tokens") + "; width 1024, ten layers",
            "lookahead",
            {**sites, "rows": rows, "prompt": prompt, "new": new},
            once=True,
        )
        for name, (rows, prompt, new) in works.items()
    ]
    cases.append(
        Case(
            "lookahead-released",
            "Lookahead knobs",
            "4 tokens after 64, batch 1, beside the released algorithm, which keeps no KV cache for its second model",
            "released",
            {**sites, "rows": 1, "prompt": 64, "new": 4},
            once=True,
        )
    )
    return cases


def others() -> list[Case]:
    """Return the cases of learning, of files and of starting."""
    return [
        Case(
            "learn",
            "Learning and training",
            "100 pairs of PrefWorld's math, the bundled model: PaLRS, and DPO and SimPO at one setting each",
            "learn",
            {"pairs": 100},
            rounds=1 / 3,
            once=True,
        ),
        Case("start", "Starting", "a new process that ends when it is done", "start", {}, once=True),
        Case(
            "load",
            "Starting",
            "a knob file with vectors of 4,096 at 32 layers, in a new process, after the imports",
            "load",
            {"width": 4096, "layers": 32},
            once=True,
        ),
    ]


def all_cases() -> list[Case]:
    """Return all cases, for a processor, in the order of the page."""
    cases = [*capturing(), *steering(), *weighing(), *others()]
    return [replace(case, options={"device": "cpu", "dtype": "float32", **case.options}) for case in cases]


def on_accelerator(cases: Sequence[Case], shape: str, device: str, dtype: str) -> list[Case]:
    """Return the cases that an accelerator is asked for too, with a model as large as those in use."""
    found: list[Case] = []
    for case in cases:
        if case.accelerator:
            options = {**case.options, "device": device, "dtype": dtype, "shape": shape}
            options.pop("layers", None)  # of a model that was made shallow
            found.append(replace(case, options=options, about=case.about.removesuffix(SHALLOW)))
    return found


def quick(case: Case) -> Case:
    """Make a case small enough for a smoke run."""
    most = {"pairs": 12, "tokens": 24, "rows": 4, "prompt": 16, "new": 8, "vocabulary": 8000, "knobs": 8}
    options = {n: min(v, most[n]) if n in most else v for n, v in case.options.items()}
    if case.curve == "pairs":
        options["pairs"] = case.options["pairs"] // 25  # so that there is a curve
    elif case.curve == "batch":
        options["rows"] = min(case.options["rows"], 16)
    if "shape" in options:
        options |= {"shape": "tiny"} | ({"layers": 2} if "layers" in options else {})
    if "sites" in options:
        options["sites"] = [0, 2]
    if "read" in options:
        options["read"] = min(options["read"], 4)
    if case.kind == "learn":
        options |= {"steps": 2}
    return replace(case, options=options, rounds=1.0)
