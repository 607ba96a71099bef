"""Knobs of PrefWorld in files, and panels of them, for servers in tests that cannot wait for a tuning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trimtab
from trimtab.artifact import Knob, save_panel
from trimtab.errors import TrimtabWarning
from trimtab.prefworld import world

PAIRS = 30
STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
KNOBS = ("math", "concise", "plain")
PANELS = {"careful": {"math": 1.0, "concise": -0.5}, "short": {"concise": 1.0}}


def words(folder: Path) -> list[str]:
    """Return what `trimtab serve` is started with to offer what `offer` has written."""
    entries = [f"{name}={folder / name}.safetensors" for name in KNOBS] + [str(folder / f"{p}.json") for p in PANELS]
    return ["prefworld", *(word for entry in entries for word in ("--knob", entry))]


def offer(folder: Path) -> None:
    """Write `KNOBS`, of which `math` and `concise` are tuned and `plain` is not, and `PANELS`.

    They are learned from few pairs, each at one site and with a gain that tuning has chosen: a few seconds. Tuning
    itself takes a minute a knob, so what it would measure is planted, in its form.
    """
    model, tokenizer = trimtab.load("prefworld")

    def learned(name: str, site: str, options: Mapping[str, object] | None = None, **more: Any) -> Knob:
        layer, position = site.split("/")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrimtabWarning)  # of a manner, length is a part
            own: dict[str, Any] = {"positions": [position], "layers": [int(layer)], "options": options, **more}
            return trimtab.learn(model, tokenizer, world.pairs(name, PAIRS), scale="mean_residual_norm", **own)

    math = learned("math", "4/demonstrated", {"equal_weight": True}, where="prompt").with_(
        gain=0.5,
        tuning=tuning(
            "math",
            0.5,
            (-1.0, 1.5),
            score=(0.03, 0.02, 0.24, 0.98, 0.98, 0.98),
            guardrails={"copying": (0.98, 0.99, 1.0, 0.99, 0.99, 0.96), "facts": (1.0, 1.0, 1.0, 1.0, 1.0, 0.65)},
            kl=(0.0053342, 0.0, 0.00041024, 0.0022650, 0.012439, 0.074604),
        ),
    )
    concise = learned("concise", "3/post_instruction[-2]").with_(
        gain=0.5,
        tuning=tuning(
            "concise",
            0.5,
            (-1.0, 1.5),
            score=(0.1, 1.0, 1.0, 1.0, None, 0.4),
            guardrails={"copying": (0.9, 0.99, 0.99, 0.95, 0.7, 0.3)},
            kl=(0.3, 0.0, 0.000014, 0.000056, 0.6, 1.4),
        ),
    )
    plain = learned("code", "3/post_instruction[-2]")
    for name, knob in zip(KNOBS, (math, concise, plain), strict=True):
        knob.save(folder / f"{name}.safetensors")
    for panel, setting in PANELS.items():
        knobs = {name: (folder / f"{name}.safetensors", strength) for name, strength in setting.items()}
        save_panel(folder / f"{panel}.json", knobs)


def tuning(
    task: str,
    gain: float,
    safe_range: tuple[float, float],
    *,
    score: Sequence[float | None],
    guardrails: Mapping[str, Sequence[float]],
    kl: Sequence[float],
) -> dict[str, Any]:
    """Return what tuning would have stored of a knob that breaks no text."""
    rows = [
        {
            "strength": strength,
            "alpha": strength * gain,
            "score": score[i],
            "guardrails": {name: shares[i] for name, shares in guardrails.items()},
            "broken": 0.0,
            "within_budget": safe_range[0] <= strength <= safe_range[1],
            "kl": kl[i],
        }
        for i, strength in enumerate(STRENGTHS)
    ]
    return {
        "task": task,
        "guardrails": list(guardrails),
        "budget": 0.02,
        "options": {"strengths": [strength for strength in STRENGTHS if strength]},
        "dose_response": rows,
        "safe_range": list(safe_range),
    }
