"""A plugin for vLLM: knobs per request, by names and strengths, without a fork.

vLLM loads it by its entry point in every process. An engine has knobs if its `additional_config` says so:
`{"trimtab": {"knobs": {"math": "math.knob.safetensors"}}}`; others are left as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.engines.vllm.front import load_knob as load_knob
    from trimtab.engines.vllm.offline import Engine as Engine


def register() -> None:
    """Put the plugin into this process; vLLM calls it, as often as it likes."""
    from trimtab.engines.vllm.compat import install

    install()


def __getattr__(name: str) -> object:
    if name == "Engine":
        from trimtab.engines.vllm.offline import Engine

        return Engine
    if name == "load_knob":
        from trimtab.engines.vllm.front import load_knob

        return load_knob
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
