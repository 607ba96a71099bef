"""The ways of Trimtab, by kind of case: a function from a case's options to ways, of which the first is the base."""

from __future__ import annotations

from benchmarks.ours.capture import capturing
from benchmarks.ours.compiled import compiled
from benchmarks.ours.learning import learning
from benchmarks.ours.lookahead import lookaheads, released
from benchmarks.ours.starting import loading, starting
from benchmarks.ours.steering import generating, mixing, scoring
from benchmarks.ours.steps import stepping
from benchmarks.ours.weights import dense, low_rank

KINDS = {
    "capture": capturing,
    "compiled": compiled,
    "dense": dense,
    "generate": generating,
    "learn": learning,
    "load": loading,
    "lookahead": lookaheads,
    "low-rank": low_rank,
    "mix": mixing,
    "released": released,
    "score": scoring,
    "start": starting,
    "step": stepping,
}
