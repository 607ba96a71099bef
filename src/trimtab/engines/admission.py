"""What an engine's front end knows of knobs: their names, whether a request may turn them, and what that comes to.

A request carries names and strengths. They are looked up here, once, and travel on as digests of tensors with
strengths, so that a name may be given to another knob while requests under the old one are in flight, and no cache
confuses the two.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch

from trimtab.addends import ALPHAS
from trimtab.artifact import AnyKnob, DeltaKnob, Knob
from trimtab.artifact.checks import check_knob_name
from trimtab.artifact.parts import LowRank, digest_of
from trimtab.engines.slots import PLACES, Plan, knob_digest, plan_request
from trimtab.errors import KnobError, OptionError, brief, unknown_name
from trimtab.files import parse_json
from trimtab.types import check_strength, parse_setting

ADAPTER = "trimtab:"
"""How the path of an adapter begins that is no path, but digests of weight knobs with their alphas."""
PREPARED = 256
"""Settings that are remembered with what they come to."""

DosePolicy = Literal["strict", "clamp", "free"]
"""What happens to a strength outside a knob's safe range: it is refused, moved to the nearer end, or taken as it is.

A knob that was never tuned has no safe range, and can be turned under `free` only.
"""
DOSES: tuple[DosePolicy, ...] = get_args(DosePolicy)


@dataclass(frozen=True)
class Admitted:
    """What a request's knobs come to: all that travels with it."""

    turned: dict[str, float]
    """Strengths of added knobs, by their digests."""
    keys: tuple[str, str, str]
    """What is added before the prompt's last token, on it and after it; see `trimtab.engines.slots.Plan`."""
    weights: dict[str, float]
    """Alphas of weight knobs, by their digests."""
    applied: dict[str, float]
    """Strengths by name, as they are turned: those that a policy has moved are as it left them."""
    plan: Plan
    """What the added knobs come to."""
    deltas: dict[DeltaKnob, float]
    """The weight knobs themselves, with their alphas: they are there for as long as a request is."""

    @property
    def adapter(self) -> str:
        """The weight knobs, as the path of a LoRA adapter; empty where none is turned."""
        return adapter_path(self.weights)

    def stamp(self) -> dict[str, Any]:
        """Return what the engine's other processes are to know, in types that every serialiser has."""
        return {"turned": self.turned, "keys": list(self.keys)}


def engine_digest(knob: AnyKnob) -> str:
    """Say in hexadecimal digits what a knob does; raises `KnobError` for one that an engine cannot run."""
    if isinstance(knob, DeltaKnob):
        if not knob.low_rank:
            raise KnobError(
                f"Knob {knob.name!r} is a dense difference of weights, which an engine cannot turn per request. "
                "Compress it (trimtab.weights.compress), or merge it into a checkpoint."
            )
        return digest_of(knob.parts, whole=True)
    if not isinstance(knob, Knob) or knob.operation != "add":
        raise KnobError(
            f"Knob {knob.name!r} ({knob.operation}) looks at the stream or ahead, which an engine's table of addends "
            "cannot express. Use trimtab.generate, or trimtab generate on the command line."
        )
    if knob.where not in PLACES:
        raise KnobError(
            f"Knob {knob.name!r} steers {knob.where!r} tokens, which are not known before they are there. Use "
            f"where={', '.join(PLACES)}, or trimtab.generate."
        )
    return knob_digest(knob)


@dataclass
class Admission:
    """The knobs of an engine by their names, and the check of every request.

    `dtype` is the model's; `max_rank` the largest rank of an adapter, None where the engine runs without adapters;
    `dose` says what becomes of strengths outside a knob's safe range. Threads may share it: a request sees all of a
    knob that is put meanwhile or nothing of it, and `knobs` and `digests` are replaced, never changed.
    """

    dtype: torch.dtype
    max_rank: int | None = None
    dose: DosePolicy = "free"
    knobs: dict[str, AnyKnob] = field(default_factory=dict[str, AnyKnob])
    digests: dict[str, str] = field(default_factory=dict[str, str])
    _peaks: dict[str, float] = field(default_factory=dict[str, float])
    _known: dict[frozenset[tuple[str, float]], Admitted] = field(
        default_factory=dict[frozenset[tuple[str, float]], Admitted]
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, knob: AnyKnob) -> str:
        """Return a knob's digest; raises `KnobError` for one that this engine cannot run."""
        digest = engine_digest(knob)
        if isinstance(knob, DeltaKnob) and self.max_rank is None:
            raise KnobError(
                f"Knob {knob.name!r} changes weights, and this engine runs without adapters. Start it with "
                "enable_lora=True and max_lora_rank (in vLLM: --enable-lora --max-lora-rank)."
            )
        return digest

    def put(self, name: str, knob: AnyKnob) -> str:
        """Give a knob a name, in the place of whatever had it, and return its digest.

        Raises `KnobError` for a name that no setting can spell, and for a knob that this engine cannot run.
        """
        check_knob_name(name)
        digest = self.check(knob)
        if isinstance(knob, DeltaKnob) and digest not in self._peaks:
            sides = [part.b for part in knob.parts.values() if isinstance(part, LowRank)]
            self._peaks[digest] = max(float(side.abs().max()) for side in sides)
        with self._lock:
            self._known.clear()
            self.knobs, self.digests = {**self.knobs, name: knob}, {**self.digests, name: digest}
        return digest

    def drop(self, name: str) -> None:
        """Take a knob's name away; raises `UnknownName` where there is none."""
        with self._lock:
            if name not in self.knobs:
                raise unknown_name("knob", name[:100], self.knobs)
            self._known.clear()
            self.knobs = {key: knob for key, knob in self.knobs.items() if key != name}
            self.digests = {key: digest for key, digest in self.digests.items() if key != name}

    def admit(self, knobs: object) -> Admitted | None:
        """Read a request's setting, as text or a mapping, and return what it comes to; None where that is nothing.

        Raises `OptionError` and `UnknownName` that say what is wrong with it.
        """
        setting = read_setting(knobs)
        with self._lock:
            return self._admit(setting)

    def _admit(self, setting: Mapping[str, float]) -> Admitted | None:
        for name in setting:
            if name not in self.knobs:
                raise unknown_name("knob", name[:100], self.knobs)
        setting = {name: strength for name, strength in setting.items() if strength}
        key = frozenset(setting.items())
        if not setting or key in self._known:
            return self._known.get(key)
        admitted = self._prepare(setting)
        if len(self._known) >= PREPARED:
            self._known.clear()
        self._known[key] = admitted
        return admitted

    def _prepare(self, setting: Mapping[str, float]) -> Admitted:
        strengths: dict[str, float] = {}  # by digest: names of one knob add up
        all_names: dict[str, list[str]] = {}
        applied: dict[str, float] = {}
        for name, strength in setting.items():
            digest = self.digests[name]
            strengths[digest] = strengths.get(digest, 0.0) + strength
            all_names.setdefault(digest, []).append(name)
        names = {digest: sorted(own)[0] for digest, own in all_names.items()}
        dosed = {digest: self._dosed(all_names[digest], strength) for digest, strength in strengths.items()}
        for name, strength in setting.items():
            asked, given = strengths[self.digests[name]], dosed[self.digests[name]]
            applied[name] = strength if given == asked else given * (strength / asked)
        added: dict[str, tuple[Knob, float]] = {}
        deltas: dict[DeltaKnob, float] = {}
        weights: dict[str, float] = {}
        for digest, strength in dosed.items():
            knob = self.knobs[names[digest]]
            self._check_size(names[digest], strength)
            if isinstance(knob, DeltaKnob):
                weights[digest] = deltas[knob] = knob.alpha(strength)
            else:
                assert isinstance(knob, Knob)
                added[digest] = knob, strength
        self._check_rank({names[digest] for digest in weights})
        plan = plan_request(added, self.dtype)
        turned = {digest: strength for digest, (_, strength) in added.items() if strength}
        return Admitted(turned, plan.keys, weights, applied, plan, deltas)

    def _dosed(self, names: Sequence[str], strength: float) -> float:
        """Hold the strength of one knob, under all its names, against its safe range, as the policy says.

        Off is always allowed. Each name's knob may have been tuned by itself, and the strength has to be safe for all.
        """
        if self.dose == "free" or not strength:
            return strength
        for name in names:
            bounds = self.knobs[name].safe_range
            if bounds is None:
                raise OptionError(
                    f"Knob {name!r} was never tuned, so that no range of strengths is known to be safe. Tune it, or "
                    "start the engine with the dose policy 'free'."
                )
            if self.dose == "clamp":
                strength = min(max(strength, bounds[0]), bounds[1])
            elif not bounds[0] <= strength <= bounds[1]:
                raise OptionError(
                    f"Strength {strength:.12g} of {name!r} lies outside its safe range, {bounds[0]:g} to {bounds[1]:g}."
                )
        return strength

    def _check_size(self, name: str, strength: float) -> None:
        """Refuse what numbers of the model's dtype cannot hold: no worker has to look at it again."""
        alpha = self.knobs[name].alpha(strength)
        peak = self._peaks.get(self.digests[name], 0.0)
        if not abs(alpha) <= ALPHAS or not abs(alpha) * peak <= torch.finfo(self.dtype).max:
            raise OptionError(
                f"Strength {strength:g} of {name!r} is too large: alpha is {alpha:g}, and the most that is taken is "
                f"{ALPHAS:g}, or what {self.dtype} can hold."
            )

    def _check_rank(self, names: set[str]) -> None:
        rank = sum(top_rank(knob) for name in names if isinstance(knob := self.knobs[name], DeltaKnob))
        if self.max_rank is not None and rank > self.max_rank:
            raise OptionError(
                f"The weight knobs {', '.join(sorted(names))} have rank {rank} together; this engine runs adapters up "
                f"to rank {self.max_rank} (max_lora_rank)."
            )


def read_setting(knobs: object) -> dict[str, float]:
    """Read a setting: a mapping of names to numbers, the same as JSON text, or text such as `math=0.8,concise=-1`."""
    if isinstance(knobs, str) and knobs.lstrip().startswith("{"):
        try:
            knobs = parse_json(knobs)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"knobs is not JSON: {error}.") from None
    if isinstance(knobs, str):
        return parse_setting(knobs)
    if not isinstance(knobs, Mapping):
        raise OptionError(f'knobs are written {{"math": 0.8}} or "math=0.8"; got {brief(knobs)}.')
    entries = cast(Mapping[object, object], knobs)
    strange = next((name for name in entries if not isinstance(name, str)), None)
    if strange is not None:
        raise OptionError(f"Knobs are set by their names here; got {type(strange).__name__}.")
    wrong = next((name for name, value in entries.items() if not isinstance(value, int | float)), None)
    if wrong is not None:
        raise OptionError(f"The strength of {brief(wrong)} must be a number; got {brief(entries[wrong])}.")
    return {str(name): check_strength(cast(float, value), f"strength of {name!r}") for name, value in entries.items()}


def top_rank(knob: DeltaKnob) -> int:
    """Return the largest rank among a low-rank knob's parts."""
    return max(part.rank for part in knob.parts.values() if isinstance(part, LowRank))


def adapter_path(weights: Mapping[str, float]) -> str:
    """Write weight knobs at their alphas, by digest, as the path of an adapter; empty where nothing is turned.

    >>> adapter_path({"b": 0.5, "a": -1.0})
    'trimtab:a=-1.0,b=0.5'
    """
    parts = [f"{digest}={weights[digest]!r}" for digest in sorted(weights) if weights[digest]]
    return ADAPTER + ",".join(parts) if parts else ""


def read_adapter_path(path: str) -> dict[str, float]:
    """Read what `adapter_path` wrote; nothing where an adapter only stands for none."""
    parts = (part.partition("=") for part in path[len(ADAPTER) :].split(",") if part)
    return {digest: float(alpha) for digest, _, alpha in parts}


def adapter_name(path: str) -> tuple[str, int]:
    """Return a name and a number (1 to 2**31 - 1) for an adapter, the same in every process.

    The engine tells the few adapters that it holds at a time apart by their numbers, which two of them share about once
    in 10^8 times.
    """
    digest = hashlib.sha256(path.encode()).hexdigest()
    return f"trimtab-{digest[:16]}", 1 + int(digest, 16) % (2**31 - 1)


def compose_adapter(
    alphas: Sequence[tuple[DeltaKnob, float]], dtype: torch.dtype
) -> tuple[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Put weight knobs at their alphas side by side: `[a1 B1, a2 B2]` times `[A1; A2]`, which is their sum exactly.

    Returns the rank R and, by module, A `[R, in]` and B `[out, R]` in `dtype`; modules that a knob leaves alone have
    zeros there. `Admission` has seen to it that `dtype` can hold them.
    """
    total = sum(top_rank(knob) for knob, _ in alphas)
    composed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in dict.fromkeys(name for knob, _ in alphas for name in knob.parts):
        some = next(knob.parts[name] for knob, _ in alphas if name in knob.parts)
        a, b = torch.zeros(total, some.shape[1]), torch.zeros(some.shape[0], total)
        at = 0
        for knob, alpha in alphas:
            part: Any = knob.parts.get(name)
            if part is not None:
                a[at : at + part.rank], b[:, at : at + part.rank] = part.a.float(), alpha * part.b.float()
            at += top_rank(knob)
        composed[name.removesuffix(".weight")] = a.to(dtype), b.to(dtype)
    return total, composed
