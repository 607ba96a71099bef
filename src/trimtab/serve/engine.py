"""What the server asks of an engine; `trimtab.engines.continuous` has one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from trimtab.artifact import AnyKnob
from trimtab.engines.admission import Admission
from trimtab.engines.continuous.requests import Request, Step
from trimtab.render import Renderer


class Engine(Protocol):
    """A model behind a queue, with a rack of knobs; every method may be called from any thread."""

    @property
    def admission(self) -> Admission:
        """The knobs by name, and the check of every setting."""
        ...

    @property
    def renderer(self) -> Renderer:
        """Prompts to ids, and ids to text."""
        ...

    @property
    def ends(self) -> Collection[int]:
        """Tokens that end an answer."""
        ...

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt and its answer together."""
        ...

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        ...

    @property
    def directions(self) -> Collection[str]:
        """Names of the knobs that the stream can be projected on."""
        ...

    def submit(self, request: Request, deliver: Callable[[Step], None]) -> str:
        """Queue a request and return its name; `deliver` gets every step, in a thread of the engine's."""
        ...

    def cancel(self, name: str, /) -> None:
        """Give up a request, if it is not over."""
        ...

    def load(self, name: str, knob: AnyKnob) -> None:
        """Give a knob a name; raises `KnobError` where it does not fit the model."""
        ...

    def unload(self, name: str) -> None:
        """Take a name away; raises `UnknownName` where there is none."""
        ...
