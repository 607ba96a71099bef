"""An engine without a model, for tests of the server: it says what it is told to, token by token, from threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count

import torch

import pico
from trimtab.artifact import AnyKnob, Knob
from trimtab.check.twin import WIDTH
from trimtab.engines.admission import Admission, DosePolicy
from trimtab.engines.continuous.requests import Ending, Request, Step, Token
from trimtab.errors import EngineError, KnobError, OptionError
from trimtab.render import Renderer

Say = Callable[[Request], str]


class FakeEngine:
    """Says `say` of every request; tokens are bytes, so that most characters beyond ASCII are several.

    `gate` holds every step back while it is cleared. `fails_at` is the number of tokens after which answers fail, and
    `requests` and `cancelled` keep what came.
    """

    def __init__(
        self,
        say: str | Say = "Hello",
        *,
        knobs: Mapping[str, AnyKnob] | None = None,
        dose: DosePolicy = "free",
        context_length: int = 512,
        fails_at: int | None = None,
        ending: Ending = "stop",
    ) -> None:
        self._say: Say = say if callable(say) else lambda _: say
        self.admission = Admission(torch.float32, dose=dose)
        self.renderer = Renderer(pico.tokenizer(units="bytes"))
        self.ends = [pico.END]
        self.context_length, self.alive = context_length, True
        self.requests: dict[str, Request] = {}
        self.cancelled: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self._fails_at, self._ending = fails_at, ending
        self._held_at: int | None = None
        self._held = threading.Event()
        self._live: dict[str, threading.Event] = {}  # set once a request is given up
        self._numbers = count()
        for name, knob in (knobs or {}).items():
            self.load(name, knob)

    @property
    def live(self) -> int:
        return len(self._live)

    @property
    def directions(self) -> list[str]:
        return [name for name, knob in self.admission.knobs.items() if isinstance(knob, Knob)]

    def submit(self, request: Request, deliver: Callable[[Step], None]) -> str:
        if not self.alive:
            raise EngineError("The engine has stopped.")
        if not request.ids or len(request.ids) + request.max_new_tokens > self.context_length:
            raise OptionError("It does not fit.")
        name = f"request-{next(self._numbers)}"
        self.requests[name] = request
        self._live[name] = left = threading.Event()
        threading.Thread(target=self._run, args=(name, request, deliver, left), daemon=True).start()
        return name

    def cancel(self, name: str) -> None:
        if name in self._live:
            self._live.pop(name).set()
            self.cancelled.append(name)

    def load(self, name: str, knob: AnyKnob) -> None:
        if isinstance(knob, Knob) and knob.width != WIDTH:
            raise KnobError(f"Knob {knob.name!r} has width {knob.width}; this model has {WIDTH}.")
        self.admission.put(name, knob)

    def unload(self, name: str) -> None:
        self.admission.drop(name)

    def _run(self, name: str, request: Request, deliver: Callable[[Step], None], left: threading.Event) -> None:
        ids = self.tokens(self._say(request))
        cut = len(ids) > request.max_new_tokens
        for i, step in enumerate(self.steps_of(request, ids[: request.max_new_tokens], "length" if cut else "")):
            if i == self._held_at:
                self._held.set()
                left.wait(20)
            self.gate.wait(20)
            if left.is_set():
                return
            if i == self._fails_at:
                step = Step(None, "error", "The model's probabilities are not finite numbers.")
            if step.ending:
                self._live.pop(name, None)
            deliver(step)
            if step.ending:
                return

    def steps_of(self, request: Request, ids: Sequence[int], last: Ending) -> Iterable[Step]:
        """Return the steps of an answer; without a `last` ending there is one more step, for it."""
        steps: list[Step] = []
        for i, token in enumerate(ids):
            wanted = request.sampling.logprobs
            logprob = None if wanted is None else -0.5 - i
            top = [(token, -0.5 - i), *((token ^ n, -2.0 - i - n) for n in range(1, 30))][: wanted or 0]
            along = dict.fromkeys(self.directions, 0.25 * i) if request.projections else {}
            steps.append(Step(Token(token, logprob, top, along), last if i == len(ids) - 1 else ""))
        return steps if last else [*steps, Step(None, self._ending)]

    def hold_at(self, step: int) -> threading.Event:
        """Stop every answer before a step until it is given up; return what is set once an answer has come so far."""
        self._held_at = step
        return self._held

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text, one for every byte."""
        return [int(i) for i in self.renderer.tokenizer.encode(text, add_special_tokens=False)]
