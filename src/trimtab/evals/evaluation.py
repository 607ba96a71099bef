"""The record of an evaluation with its spec: which model, knobs, data, options and versions it rests on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.artifact import AnyKnob, DeltaKnob, LookaheadKnob
from trimtab.artifact.identity import model_identity
from trimtab.checkpoint import digest, fingerprint, versions
from trimtab.errors import OptionError
from trimtab.evals.choices import ChoiceTask
from trimtab.evals.effects import STEERED_OF_NEUTRAL
from trimtab.evals.entries import Ask
from trimtab.evals.judge import Judge
from trimtab.evals.tasks import AnyTask
from trimtab.files import write_atomically
from trimtab.pairs import Pairs
from trimtab.prompts import read_prompt
from trimtab.runtime import Dose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPEC = frozenset("model settings tasks pairs neutral judge options versions".split())
"""What the spec of an evaluation says; without all of it there is no evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, with the spec of how: it cannot be made, and so not written, without.

    `bare` holds the model without knobs, `settings` one entry per setting with its differences to that; `notes` say
    what speaks against the result.
    """

    spec: Mapping[str, Any]
    bare: Mapping[str, Any]
    settings: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        missing = sorted(SPEC - self.spec.keys())
        if missing:
            raise OptionError(f"An evaluation without its spec is none; the spec lacks {', '.join(missing)}.")

    def record(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "trimtab": "evaluation",
            "spec": dict(self.spec),
            "bare": dict(self.bare),
            "settings": [dict(entry) for entry in self.settings],
            "notes": list(self.notes),
        }

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, atomically; raises `OSError` that names the file."""
        write_atomically(path, (json.dumps(self.record(), indent=1) + "\n").encode())


def describe_spec(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asks: Sequence[Ask],
    doses: Sequence[Dose],
    pairs: Pairs | None,
    neutral: Sequence[str] | None,
    judge: Judge | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "model": {**model_identity(model, tokenizer), "dtype": str(model.dtype), "device": model.device.type},
        "settings": [[describe_knob(knob, strength) for knob, strength in dose.items()] for dose in doses],
        "tasks": [describe_task(ask.task, ask.role, ask.mode) for ask in asks],
        "pairs": None if pairs is None else {"count": len(pairs), "hash": pairs.hash()},
        "neutral": {"texts": len(neutral), "hash": fingerprint(list(neutral))} if neutral else None,
        "judge": judge and judge.spec(),
        "options": dict(options),
        "versions": versions(),
    }


def describe_task(task: AnyTask, role: str, mode: str) -> dict[str, Any]:
    """Return what tells a task from others, in which role and mode it is asked."""
    return {
        "task": task.name,
        "role": role,
        "mode": mode,
        "n": len(task.prompts),
        "max_new_tokens": task.max_new_tokens,
        "prompts_hash": fingerprint([read_prompt(prompt) for prompt in task.prompts]),
        **_choice_spec(task),
    }


def _choice_spec(task: AnyTask) -> dict[str, Any]:
    if not isinstance(task, ChoiceTask):
        return {}
    answers = fingerprint([task.choices, [sorted(places) for places in task.right]])
    return {"answers_hash": answers, "per": task.per, "closing": task.closing, "rule": task.rule}


def describe_knob(knob: AnyKnob, strength: float) -> dict[str, Any]:
    """Return what tells a knob from others, and the strength at which it stands."""
    spec = {
        "knob": knob.name,
        "kind": knob.kind,
        "method": knob.method,
        "pairs_hash": knob.provenance.get("pairs_hash"),
        "gain": knob.gain,
        "where": knob.where,
        "operation": knob.operation,
        "strength": float(strength),
        "alpha": knob.alpha(strength),
        "safe_range": knob.safe_range,
    }
    if isinstance(knob, DeltaKnob):
        return spec | {"weights_sha256": knob.digest, "weights": len(knob.parts)}
    if isinstance(knob, LookaheadKnob):
        reach = {"gradient_sha256": knob.digest, "layers": list(knob.layers)}
        reach |= {name: getattr(knob, name) for name in ("backend", "step", "per_token")}
        reach |= {"norms": [knob.norms[i] for i in knob.layers], "scales": [knob.scales[i] for i in knob.layers]}
        return spec | reach | {"steered_of_neutral": STEERED_OF_NEUTRAL[knob.where]}
    if knob.kernel is not None:
        spec["kernel"] = {
            "kind": knob.kernel.kind,
            "temperature": knob.kernel.temperature,
            "examples": knob.kernel.count,
            "sha256": knob.kernel.digest(knob.site).hex(),
        }
    return spec | {
        "vectors_sha256": digest((str(site), vector) for site, vector in knob.vectors.items()),
        "site": str(knob.site),
        "norm": knob.norms[knob.site.layer],
        **({"also": list(map(str, knob.also))} if knob.also else {}),
        "steered_of_neutral": STEERED_OF_NEUTRAL[knob.where],
    }
