"""In the scheduler's process: what a request's knobs add is part of the key under which its KV blocks are shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.engines.slots import block_key
from trimtab.engines.vllm.settings import stamp_of


def key_block(original: Callable[..., Any], request: Any, start_token_idx: int, end_token_idx: int) -> list[Any]:
    """Add what is done to a block's tokens to its key; blocks that no knob touches are shared with everybody."""
    keys = original(request, start_token_idx, end_token_idx)
    stamp = stamp_of(request.sampling_params)
    said = block_key(stamp["keys"], request.num_prompt_tokens, start_token_idx, end_token_idx) if stamp else ""
    return [*keys, ("trimtab", said)] if said else keys
