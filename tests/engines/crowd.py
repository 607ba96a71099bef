"""Forty requests that crowd one engine: `python crowd.py NAME FOLDER` writes FOLDER/crowd-NAME.json.

Prompts begin alike, so that the prefix cache is hit; they come in pieces of 48 tokens; and blocks are so few that
requests are preempted and computed again. Controls leave knobs out of the key of cached blocks.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import load  # noqa: E402
import rows  # noqa: E402

CROWDED: dict[str, Any] = {
    "max_num_seqs": 6,
    "max_num_batched_tokens": 48,
    "enable_chunked_prefill": True,
    "block_size": 32,
    "num_gpu_blocks_override": 12,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
}


@dataclass
class Crowd(rows.Row):
    """One engine that is crowded."""

    key: bool = True
    """Whether knobs are in the key of cached blocks."""


ON_GPU: dict[str, Any] = {"weights": False, "gpu": True}
EAGER: dict[str, Any] = {**CROWDED, "enforce_eager": True}
GRAPHS: dict[str, Any] = {**CROWDED, **rows.TRITON, "async_scheduling": True}
CROWDS = {
    "first": Crowd("V1 runner", EAGER, rows.IN_PROCESS),
    "second": Crowd("V2 runner (Triton interpreted)", EAGER, {**rows.IN_PROCESS, **rows.INTERPRETED}),
    "control": Crowd("V1 runner, knobs left out of the key (control)", EAGER, rows.IN_PROCESS, key=False),
    "graphs": Crowd("V2 runner on a GPU, CUDA graphs, async scheduling", GRAPHS, rows.EXACT, **ON_GPU),
    "graphs-control": Crowd("the same, knobs left out of the key (control)", GRAPHS, rows.EXACT, key=False, **ON_GPU),
}
COUNTERS = {
    "preemptions": "vllm:num_preemptions",
    "hits": "vllm:prefix_cache_hits",
    "queries": "vllm:prefix_cache_queries",
}
"""What is counted, by the names of vLLM's metrics; hits and queries are tokens."""


def run(name: str, folder: Path) -> tuple[list[load.Answer], dict[str, Any]] | None:
    """Crowd an engine in a process of its own; see `rows.run`."""
    if not rows.can_run(gpu=CROWDS[name].gpu):
        return None
    own = rows.environment(folder, CROWDS[name].variables)
    return rows.run_apart(["crowd.py", name, str(folder)], own, folder / f"crowd-{name}")


def main(name: str, folder: Path) -> None:
    """Answer the forty requests, all at once."""
    crowd = CROWDS[name]
    if "TRITON_INTERPRET" in crowd.variables:
        import interpreted  # noqa: F401
    from vllm import LLM

    from trimtab.engines.vllm.launch import engine_options

    settings = {"knobs": rows.knob_files(folder, weights=crowd.weights)}
    options = engine_options(load.rack(weights=crowd.weights), settings, {**rows.SIZES, **crowd.options})
    engine = LLM(model=str(folder / "model"), **options)
    if not crowd.key:
        from vllm.v1.core import kv_cache_utils as utils

        utils._gen_prompt_embeds_extra_hash_keys = utils._gen_prompt_embeds_extra_hash_keys.__wrapped__
    answers = rows.ask(engine, load.stress_requests(weights=crowd.weights))
    counted = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
    facts = {said: counted.get(counter) for said, counter in COUNTERS.items()}
    load.write_answers(folder / f"crowd-{name}.json", answers, {**facts, "runner": rows.runner_of(engine)})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
