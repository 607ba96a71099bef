"""Start vLLM with knobs: what its options have to be, and its own server."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.artifact import DeltaKnob, Rack
from trimtab.engines.admission import top_rank
from trimtab.engines.vllm import compat
from trimtab.engines.vllm.settings import KEY
from trimtab.errors import KnobError, OptionError, brief
from trimtab.render.loading import BUNDLED, locate

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM's adapters can be made for."""
ADAPTERS = 8
"""Settings of weight knobs that can be in one step, where the user says nothing."""
MIDDLEWARE = "trimtab.engines.vllm.http.KnobsInBody"


class Files:
    """The knobs of a rack as files, which every process of an engine reads for itself; `cleanup` removes what was made.

    `known` are paths of knobs that lie in files already. Others, made in memory or changed, are written down.
    """

    def __init__(self, rack: Rack, known: Mapping[str, str | Path] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="trimtab-knobs-")
        self.paths = {name: str(path) for name, path in (known or {}).items()}
        for number, (name, knob) in enumerate(rack.items()):
            if name not in self.paths:
                self.paths[name] = str(Path(self._folder.name) / f"{number}.knob.safetensors")
                knob.save(self.paths[name])

    def cleanup(self) -> None:
        """Remove what was made."""
        self._folder.cleanup()


def model_options(model: str | Path) -> tuple[str, dict[str, Any]]:
    """Return what vLLM is to load, a hub name or a folder, and in which dtype where that is not as stored.

    The bundled model computes in float32, as with `trimtab.load`. Raises `OptionError` for a folder without a model.
    """
    return str(locate(model).name), {"dtype": "float32"} if str(model) == BUNDLED else {}


def engine_options(rack: Rack, settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `vllm.LLM` for a rack: the plugin's settings, room for weight knobs, and the user's own.

    Adapters are made for the ranks of all weight knobs turned at once. Raises `KnobError` where that is more than vLLM
    can.
    """
    options: dict[str, Any] = {}
    rank = sum(top_rank(knob) for knob in rack.values() if isinstance(knob, DeltaKnob) and knob.low_rank)
    if rank:
        fitting = next((size for size in RANKS if size >= rank), None)
        if fitting is None and "max_lora_rank" not in own:
            raise KnobError(
                f"The weight knobs have rank {rank} together; vLLM's adapters have {RANKS[-1]} at most. Compress them "
                "further, or set max_lora_rank and turn fewer at once."
            )
        options = {"enable_lora": True, "max_lora_rank": fitting, "max_loras": ADAPTERS}
    additional: object = own.get("additional_config", {})
    if not isinstance(additional, Mapping) or KEY in additional:
        said = f"an object without {KEY!r}, which is written here"
        raise OptionError(f"additional_config is {said}; got {brief(additional)}.")
    return {**options, **own, "additional_config": {**additional, KEY: dict(settings)}}


def words_of(model: str, options: Mapping[str, Any]) -> list[str]:
    """Write options as the words of vLLM's command line.

    >>> words_of("m", {"max_model_len": 512, "enforce_eager": True, "additional_config": {"a": 1}})
    ['m', '--max-model-len', '512', '--enforce-eager', '--additional-config', '{"a": 1}']
    """
    words = [model]
    for name, value in options.items():
        if value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, value if isinstance(value, str) else json.dumps(value)]
    return words


def serve(model: str, options: Mapping[str, Any]) -> None:
    """Run vLLM's OpenAI server until it is stopped; requests may have a field `knobs` in their body."""
    compat.run_server([*words_of(model, options), "--middleware", MIDDLEWARE])
