"""Find the decoder blocks of any causal language model, and read and write the residual stream there.

The only part that registers hooks, knows paths of layers, or looks into the outputs of blocks and the caches of models.
"""

from trimtab.adapter.alone import Alone, block_alone
from trimtab.adapter.aside import cache_tensors, parameters_to, run_aside, second_cache, with_cache
from trimtab.adapter.calls import CACHE_NAMES, CallInfo, Generating, generating, read_note, write_note
from trimtab.adapter.heads import cache_name, full_cache, shared_rows
from trimtab.adapter.stream import Adapter, Reading, WriteFn

__all__ = [
    "CACHE_NAMES",
    "Adapter",
    "Alone",
    "CallInfo",
    "Generating",
    "Reading",
    "WriteFn",
    "block_alone",
    "cache_name",
    "cache_tensors",
    "full_cache",
    "generating",
    "parameters_to",
    "read_note",
    "run_aside",
    "second_cache",
    "shared_rows",
    "with_cache",
    "write_note",
]
