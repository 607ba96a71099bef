"""The engine: a model behind a queue, every request under knobs of its own, all of them in one batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.adapter import Adapter
from trimtab.artifact import AnyKnob, DeltaKnob, Rack
from trimtab.engines.admission import Admission, DosePolicy
from trimtab.engines.continuous.batching import Batching, Hooks, Scheduled, cache_bytes
from trimtab.engines.continuous.requests import Request, Sampling, Step, Token
from trimtab.engines.continuous.sampling import Draw, choose, log_probabilities
from trimtab.engines.continuous.steering import Steering, Turned, check_place, projects
from trimtab.engines.continuous.trial import compare, expectations
from trimtab.engines.slots import Plan
from trimtab.errors import AdapterError, EngineError, OptionError, brief
from trimtab.prompts import end_ids
from trimtab.render import Renderer

Deliver = Callable[[Step], None]
"""Takes a step from the engine's thread; must return at once and not raise."""
CACHE_SHARE = 8
"""The KV cache takes one part in so many of the memory that there is, where nobody says otherwise."""
NOT_FINITE = "The model's probabilities are not finite numbers: a strength is too large for it."
STEP = 512
"""Tokens of a step, where nobody says otherwise."""
RANK = 4096
"""Ranks of weight knobs that one request may turn together."""
_NOBODY = Draw(Sampling())


@dataclass
class _Live:
    """A request that is not over."""

    request: Request
    turned: Turned
    draw: Draw
    deliver: Deliver
    made: int = 0  # tokens


class Engine:
    """A model under transformers' continuous batching, with a rack of knobs; use it as a context, or `close` it.

    `requests` is the most requests of a step, `tokens` the most tokens (512, or as many as requests), `cache_tokens`
    what the KV cache holds (an eighth of the memory, or as much as `requests` can use). `dose` says what becomes of
    strengths outside a knob's safe range; `strict=False` turns a knob from another architecture or chat template into a
    warning. The model belongs to the engine until it is closed.

    Raises `AdapterError` for a model, or a version of transformers, on which a mixed batch does not come out as each
    request does alone, which is tried at the start; `KnobError` for knobs that no table of addends can express.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rack: Rack | None = None,
        *,
        dose: DosePolicy = "strict",
        strict: bool = True,
        requests: int = 64,
        tokens: int | None = None,
        cache_tokens: int | None = None,
    ) -> None:
        tokens = max(STEP, requests) if tokens is None else tokens
        if not 1 <= requests <= tokens:
            raise OptionError(
                f"A step holds a request or more, and a token for each; got {requests=}, {tokens=}. Leave tokens out."
            )
        self._model, self._strict = model, strict
        self.adapter = Adapter(model)
        self.renderer = Renderer(tokenizer)
        self.ends = end_ids(model, tokenizer)
        self.admission = Admission(self.adapter.dtype, max_rank=RANK, dose=dose)
        held = self._cache_tokens(requests) if cache_tokens is None else cache_tokens
        # A request that is alone must fit, whatever the margins that transformers keeps.
        self.context_length = min(self.adapter.context_length or held, held - 2 * Batching.PAGE)
        if self.context_length < 2:
            raise OptionError(f"A KV cache of {held} tokens is too small. Give cache_tokens, or free some memory.")
        self._live: dict[str, _Live] = {}
        self._numbers, self._lock = count(), threading.Lock()
        self._held: set[DeltaKnob] = set()  # weight knobs that the steering knows
        self.trouble = ""
        """What transformers said when it last gave up a request: for the log, and for nobody outside."""
        self._stale = True  # what the steering knows of the rack
        self._asked: list[str] = []  # requests of this step that predict
        expected = expectations(self.adapter)
        self._steering = Steering(self.adapter, requests=requests, tokens=tokens)
        try:
            for name, knob in (rack or Rack()).items():
                self.load(name, knob)
            hooks = Hooks(self._before, self._sample, self._fail)
            self._batching = Batching(model, hooks, requests=requests, tokens=tokens, cache_tokens=held)
        except BaseException:
            self._steering.close()
            raise
        try:
            self._batching.start()
            compare(self.adapter, expected, self._try)
        except AdapterError as error:
            self.close()
            said = f" It said: {brief(self.trouble, 200)}." if self.trouble else ""
            raise AdapterError(f"{error}{said}") from None
        except BaseException:
            self.close()
            raise

    def _try(self, request: Request, plan: Plan | None, deliver: Deliver) -> None:
        self._queue(request, Turned(plan, len(request.ids), {}, projections=False), deliver)

    def _cache_tokens(self, requests: int) -> int:
        wanted = requests * (self.adapter.context_length or 4096)
        each = cache_bytes(self._model)
        device = self.adapter.input_device
        cuda = device.type == "cuda"
        memory = (
            torch.cuda.mem_get_info(device)[1] if cuda else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        )
        return min(wanted, max(memory // (CACHE_SHARE * each), 2 * Batching.PAGE))

    # Knobs

    def load(self, name: str, knob: AnyKnob) -> None:
        """Give a knob a name, in the place of whatever had it; requests in flight keep what they were given.

        Raises `KnobError` for one that does not fit the model, or that no table of addends can express.
        """
        self.admission.check(knob)
        knob.check(self._model, self.renderer.tokenizer, strict=self._strict)
        if isinstance(knob, DeltaKnob):
            check_place(self.adapter, knob)
        self.admission.put(name, knob)
        self._stale = True

    def unload(self, name: str) -> None:
        """Take a knob's name away; raises `UnknownName` where there is none."""
        self.admission.drop(name)
        self._stale = True

    @property
    def directions(self) -> list[str]:
        """Names of the knobs that `Request.projections` tells of."""
        return [name for name, knob in self.admission.knobs.items() if projects(knob)]

    # Requests

    def submit(self, request: Request, deliver: Deliver) -> str:
        """Queue a request and return its name; `deliver` is called with every step, and the last one has an ending.

        Raises `OptionError` for a prompt that does not fit with its answer, `EngineError` once the engine has stopped.
        """
        prompt = len(request.ids)
        if not prompt or request.max_new_tokens < 1:
            raise OptionError(
                f"A request has a prompt and room for an answer; got {prompt} and {request.max_new_tokens}."
            )
        if prompt + request.max_new_tokens > self.context_length:
            raise OptionError(
                f"The prompt has {prompt} tokens, and an answer of up to {request.max_new_tokens} does not fit behind "
                f"it: this engine holds {self.context_length} tokens of a request."
            )
        self.adapter.check_ids(request.ids)
        admitted = request.knobs
        plan = admitted.plan if admitted is not None and any(admitted.keys) else None
        weights = {} if admitted is None else admitted.deltas
        return self._queue(request, Turned(plan, prompt, weights, request.projections), deliver)

    def _queue(self, request: Request, turned: Turned, deliver: Deliver) -> str:
        if not self.alive:
            raise EngineError("The engine has stopped.")
        name = f"request-{next(self._numbers)}"
        with self._lock:
            self._live[name] = _Live(request, turned, Draw(request.sampling), deliver)
            # A knob that was taken away since the request was admitted is needed once more.
            self._stale |= not turned.weights.keys() <= self._held
        try:
            self._batching.add(name, request.ids, request.max_new_tokens, sorted(request.ends))
        except BaseException:
            self._live.pop(name, None)
            raise
        return name

    def cancel(self, name: str) -> None:
        """Give up a request: its place is free from the next step on, and one step may still be on its way."""
        if self._live.pop(name, None) is not None:
            self._batching.cancel(name)

    @property
    def live(self) -> int:
        """How many requests are not over."""
        return len(self._live)

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._batching.running

    def close(self) -> None:
        """Stop; requests that are not over end with an error."""
        try:
            self._batching.stop()
        finally:
            for name in list(self._live):
                self._fail(name, "The engine was closed.")
            self._steering.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # In the thread of the loop

    def _before(self, step: Sequence[Scheduled]) -> None:
        if self._stale:
            with self._lock:
                self._stale = False
                knobs = dict(self.admission.knobs)
                kept = [knob for live in self._live.values() for knob in live.turned.weights]
                self._held = {*kept, *(knob for knob in knobs.values() if isinstance(knob, DeltaKnob))}
            self._steering.set_knobs(knobs, kept)
        live = self._live
        self._steering.prepare(step, {part.id: live[part.id].turned for part in step if part.id in live})
        self._asked = [part.id for part in step if part.predicts]

    def _sample(self, logits: Tensor) -> Tensor:
        """Draw a token for each request that predicts, and hand it on."""
        live = [self._live.get(name) for name in self._asked]
        fine = logits.max(-1).values.isfinite().tolist()
        if not all(fine):
            logits = logits.nan_to_num(0.0, 0.0)
        chosen = choose(logits, [_NOBODY if one is None else one.draw for one in live])
        seen = self._steering.projections()
        for i, (name, one, token) in enumerate(zip(self._asked, live, chosen.tolist(), strict=True)):
            if one is None:
                continue  # given up meanwhile
            if not fine[i]:
                self.cancel(name)
                one.deliver(Step(None, "error", NOT_FINITE))
                continue
            shown = {knob: values[i] for knob, values in seen.items()} if one.request.projections else {}
            self._advance(name, one, token, logits[i], shown)
        return chosen

    def _advance(self, name: str, one: _Live, token: int, row: Tensor, shown: dict[str, float]) -> None:
        one.made += 1
        if token in one.request.ends:
            self._live.pop(name, None)
            one.deliver(Step(None, "stop"))
            return
        logprob, top = None, []
        if one.request.sampling.logprobs is not None:
            logprob, top = log_probabilities(row, token, one.request.sampling.logprobs)
        over = one.made >= one.request.max_new_tokens
        if over:
            self._live.pop(name, None)
        one.deliver(Step(Token(token, logprob, top, shown), "length" if over else ""))

    def _fail(self, name: str, error: str) -> None:
        one = self._live.pop(name, None)
        if one is not None:
            self.trouble = error
            one.deliver(Step(None, "error", "The engine could not go on with this request."))
