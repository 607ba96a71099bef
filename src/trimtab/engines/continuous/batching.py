"""The seam: transformers' continuous batching, with a look at every step before it runs and at its logits after.

Two functions inside transformers are replaced on one manager's own objects, and nothing on its classes. The functions
that are relied on are checked before a model is touched, and the engine compares itself with plain transformers when it
starts.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers import __version__ as transformers_version

from trimtab.errors import AdapterError, EngineError, OptionError

PLACE = "transformers.generation.continuous_batching"
SEAMS = {
    "continuous_api.ContinuousBatchingConfig": ("page_size", "num_blocks", "allow_block_sharing"),
    "input_outputs.ContinuousBatchingIOs.prepare_batch_tensors": ("self", "requests_in_batch"),
    "model_runner.ModelRunner._sample": ("self", "scores", "output_ids"),
    "continuous_api.ContinuousBatchingManager.warmup": ("self",),
    "continuous_api.ContinuousBatchingManager.start": ("self",),
    "continuous_api.ContinuousBatchingManager.stop": ("self", "block", "timeout", "hard_stop"),
    "continuous_api.ContinuousBatchingManager.is_running": ("self",),
    "continuous_api.ContinuousBatchingManager.cancel_request": ("self", "request_id"),
    "continuous_api.ContinuousBatchingManager.add_request": (
        "self",
        "input_ids",
        "request_id",
        "max_new_tokens",
        "eos_token_id",
    ),
}
"""Functions of transformers that are replaced or called, with the parameters that are relied on."""


class Scheduled(NamedTuple):
    """A request's part in a step."""

    id: str
    begin: int
    """Absolute position of its first token in this step."""
    tokens: int
    """How many it has in this step."""
    predicts: bool
    """Whether its last token predicts a new one; not so for a prompt that is cut into pieces."""


class Hooks(NamedTuple):
    """What an engine does around the steps, all of it in the thread of transformers' loop."""

    before: Callable[[Sequence[Scheduled]], None]
    """Called before a step is run."""
    sample: Callable[[Tensor], Tensor]
    """Given logits `[N, V]` float32, chooses the tokens `[N]`, one for each of the step's requests that predict."""
    fail: Callable[[str, str], None]
    """Told of a request that transformers has given up, and why."""


class Batching:
    """transformers' manager of one model, running in a thread of its own from `start` to `stop`.

    `requests` is the most requests of a step, `tokens` the most tokens, and `cache_tokens` the tokens that the KV cache
    holds. Raises `AdapterError` for a model, or a version of transformers, that it cannot run with.
    """

    PAGE = 16
    """Tokens of a page of the KV cache."""

    def __init__(self, model: PreTrainedModel, hooks: Hooks, *, requests: int, tokens: int, cache_tokens: int) -> None:
        check_seams()
        self._hooks, self._predicting, self._level = hooks, 0, logging.NOTSET
        config = ContinuousBatchingConfig(
            allow_block_sharing=False,  # blocks are shared by their tokens alone, whatever knobs made them
            use_async_batching=False,  # the next step would be prepared while the rows of this one are read
            use_cuda_graph=False,  # sampling is Python, request by request
            page_size=self.PAGE,
            num_blocks=-(-cache_tokens // self.PAGE),
            max_batch_tokens=tokens,
            max_requests_per_batch=min(requests, tokens),
        )
        try:
            manager = cast(Any, model).init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
                continuous_batching_config=config,
            )
            manager.output_router = _Router(hooks.fail)
            manager.warmup()  # makes what runs the steps
            self._manager = manager
            ios, runner = manager.batch_processor.inputs_and_outputs, manager.batch_processor.model_runner
            self._prepare = ios.prepare_batch_tensors
            ios.prepare_batch_tensors = self._prepare_step
            runner._sample = self._choose
            _ = self.running  # what it looks at is there
        except MemoryError as error:
            raise OptionError(f"A KV cache of {cache_tokens} tokens does not fit: {error}. Give fewer.") from None
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise AdapterError(
                f"transformers' continuous batching does not run a {type(model).__name__}: {error}"
            ) from None

    def start(self) -> None:
        """Start the loop."""
        log = logging.getLogger(PLACE)
        self._level = log.level
        log.setLevel(logging.CRITICAL)  # failures are told to `fail`
        # A thread is a daemon if the one that starts it is: a program that ends without `stop` must not hang.
        starter = threading.Thread(target=self._manager.start, daemon=True)
        starter.start()
        starter.join()

    def stop(self) -> None:
        """Stop the loop; requests that are not over fail."""
        self._manager.stop(block=True, timeout=60, hard_stop=True)
        logging.getLogger(PLACE).setLevel(self._level)

    @property
    def running(self) -> bool:
        """Whether the loop takes requests."""
        return bool(self._manager.is_running()) and self._manager.background_thread_status.fatal_error is None

    def add(self, name: str, ids: Sequence[int], max_new_tokens: int, ends: Sequence[int]) -> None:
        """Queue a request; raises `EngineError` where the loop takes none any more."""
        taken = self._manager.add_request(
            list(ids), request_id=name, max_new_tokens=max_new_tokens, eos_token_id=list(ends) or -1
        )
        if taken is None:
            raise EngineError("The engine has stopped.")

    def cancel(self, name: str) -> None:
        """Take a request out of the batch, or of the queue, before the next step."""
        self._manager.cancel_request(name)

    def _prepare_step(self, *args: Any, **options: Any) -> None:
        futures: Sequence[Any] = options["requests_in_batch"] if "requests_in_batch" in options else args[0]
        step = [
            Scheduled(f.state.request_id, f.state.position_offset, f.query_length, f.has_new_token) for f in futures
        ]
        self._prepare(*args, **options)
        self._predicting = sum(part.predicts for part in step)
        self._hooks.before(step)

    def _choose(self, scores: Tensor, output_ids: Tensor) -> None:
        """Stand in for transformers' sampling; rows of `scores` beyond those that predict are padding."""
        chosen = self._hooks.sample(scores[0, : self._predicting])
        output_ids[0, : self._predicting].copy_(chosen)


class _Router:
    """Stands where transformers puts its answers: tokens are handed on as they are drawn, so only failures count."""

    def __init__(self, fail: Callable[[str, str], None]) -> None:
        self._fail = fail

    def deliver(self, output: object) -> None:
        """Ignore an answer."""

    def deliver_batch(self, outputs: object) -> None:
        """Ignore answers."""

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """Tell of a failure."""
        self._fail(state.request_id, str(error))


def check_seams() -> None:
    """Raise `AdapterError` where a function of transformers' has moved, or lost a parameter that is relied on."""
    for place, needed in SEAMS.items():
        module, *path = place.split(".")
        try:
            found: Any = import_module(f"{PLACE}.{module}")
            for part in path:
                found = getattr(found, part)
            missing = [name for name in needed if name not in inspect.signature(found).parameters]
        except (ImportError, AttributeError, TypeError, ValueError):
            missing = [path[-1]]
        if missing:
            raise AdapterError(
                f"transformers {transformers_version} has no {missing[0]!r} where {PLACE}.{place} is relied on. "
                "The engine was tried with 5.19 and 5.24: install one of them, or use the engine 'vllm'."
            )


def cache_bytes(model: PreTrainedModel) -> int:
    """Return how many bytes a token takes in the KV cache, at most; raises `AdapterError` for a model without heads."""
    config: Any = model.config.get_text_config()
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        raise AdapterError(
            f"transformers' continuous batching does not run a {type(model).__name__}: its configuration tells of no "
            "attention heads. Use trimtab.generate, or the engine 'vllm'."
        )
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return 2 * config.num_hidden_layers * heads * width * torch.finfo(model.dtype).bits // 8
