"""Steer a live model: knobs at strengths, per row of a batch, for one or two hundredths of a small model's time.

Everything that depends on the knobs is computed when they are set: one addend per steered layer and row. A forward
adds it to the block's output, and a decode step computes nothing else, but for knobs that look at the stream or ahead.
Positions are absolute, so runs with and without a KV cache agree; padding is never steered; nothing is left on the
model.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from trimtab.adapter import Adapter, CallInfo
from trimtab.addends import Dose, LayerTable, build_tables, check_dose, named, react, row_doses, turned_weights
from trimtab.artifact import AnyKnob, DeltaKnob, LookaheadKnob
from trimtab.errors import AdapterError, OptionError, brief
from trimtab.lookahead import Stream
from trimtab.positions import EVERY_TOKEN, Follower, Masks
from trimtab.types import Markers, Where
from trimtab.weights.live import applied
from trimtab.weights.rows import row_addends


class Steering:
    """A model being steered; `set` changes the knobs without leaving the context."""

    def __init__(
        self,
        adapter: Adapter,
        prompt_lengths: Sequence[int] | None = None,
        thinking: Markers | None = None,
        check_cache: bool = True,
    ) -> None:
        self._adapter = adapter
        self._lengths = None if prompt_lengths is None else _check_lengths(prompt_lengths)
        self._markers = None if thinking is None else _check_markers(thinking, adapter.vocabulary)
        self._check_cache = check_cache
        self._hooks = ExitStack()
        self._holder = _holder()
        self._level, self._active = 0, {0: self._holder}  # alone on the model, until it is counted among others
        self._rows: int | None = None
        self._tables: dict[int, LayerTable] = {}
        self._expanded: tuple[int, dict[int, LayerTable]] = (1, {})
        self._alone: dict[int, Tensor] = {}  # addends of tokens after the prompt, where nothing else is done at a layer
        self._steps: dict[int, Tensor] = {}  # `_alone` in a call of such tokens and no others, else empty
        self._masks: Masks = {}
        self._streams: dict[LookaheadKnob, Stream] = {}
        self._moving: dict[LookaheadKnob, Stream] = {}  # of this call
        self._call = 0, 0  # rows and tokens
        self._ended = False
        self._unmasked = False  # every token of this call takes the addends of "all" and "completion", whole

    def set(self, settings: Dose | Sequence[Dose]) -> None:
        """Steer with these knobs from the next forward on; settings that fail leave the model unsteered.

        `settings` maps knobs to strengths, or is a sequence of such mappings, one per row of the batch. Ablations come
        first, then additions; those that depend on the stream (operations "piecewise" and "kernel") look at the block's
        own output. Raises `OptionError` for strengths that are not finite numbers, `KnobError` for a knob of another
        width, and `AdapterError` while another `steer` acts inside this one, when nothing changes.
        """
        if self._ended:
            raise OptionError("This steer() has ended, and nothing would take its knobs off again. Enter another.")
        self.clear()
        try:
            self._put(settings)
        except BaseException:  # half of the knobs would act
            self.clear()
            raise

    def _put(self, settings: Dose | Sequence[Dose]) -> None:
        if not isinstance(settings, Mapping | Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"Settings map knobs to strengths, as in {{knob: 1.0}}; got {brief(settings)}.")
        uniform = isinstance(settings, Mapping)
        rows = [check_dose(row) for row in ([settings] if isinstance(settings, Mapping) else settings)]
        if not rows:
            raise OptionError("Got no knob settings; pass one mapping for all rows, or one per row of the batch.")
        if not uniform and self._lengths is not None and len(self._lengths) != len(rows):
            raise OptionError(f"Got {len(rows)} knob settings but {len(self._lengths)} prompt lengths.")
        self._rows = None if uniform else len(rows)
        self._turn_weights([turned_weights(row) for row in rows])
        self._tables = build_tables(self._adapter, rows, uniform)
        self._open_streams()
        self._expand(1)
        wheres = frozenset[Where]().union(*(layer.wheres() for layer in self._tables.values()))
        doses = row_doses(self._adapter, rows)
        follower = Follower(doses, wheres, self._lengths, self._markers, self._check_cache, self._level, self._active)
        if self._tables or self._check_cache:  # at strength 0 no block is touched, but a steered cache is a mistake
            functions = {layer: partial(self._apply, layer) for layer in self._tables}
            if functions:
                self._hooks.enter_context(self._adapter.steered())
            self._hooks.enter_context(
                self._adapter.write(functions, partial(self._before, follower), partial(self._after, follower))
            )

    def _open_streams(self) -> None:
        """Prepare a second stream for each lookahead knob that is turned."""
        self._streams, self._moving = {}, {}
        knobs = dict.fromkeys(move.knob for table in self._tables.values() for move in table.moves)
        alike: Counter[str] = Counter()  # copies of a knob follow a cache each for itself
        for knob in sorted(knobs, key=lambda knob: (knob.digest, knob.name)):
            apart, number = min(self._tables) < knob.top or len(self._active) > 1, alike[knob.digest]
            alike[knob.digest] += 1
            stream = Stream(self._adapter, knob, level=self._level, number=number, apart=apart)
            self._hooks.enter_context(stream.ready())
            self._streams[knob] = stream

    def _turn_weights(self, rows: list[dict[DeltaKnob, float]]) -> None:
        """Put dense knobs into the weights, for all rows alike, and hang low-rank ones beside them, row by row."""
        if not any(rows):
            return
        model = self._adapter.model
        for knob in {knob for row in rows for knob in row}:
            knob.check_shapes(model)
        dense = [{knob: s for knob, s in row.items() if not knob.low_rank} for row in rows]
        uneven = next((row for row in dense if row != dense[0]), None)
        if uneven is not None:
            raise OptionError(
                "Dense weight knobs change the model for every row, and two rows of this batch differ: "
                f"{named(dense[0])} and {named(uneven)}. Compress them (trimtab.weights.compress) for a strength per "
                "row, or run one setting at a time."
            )
        self._hooks.enter_context(self._adapter.steered())
        if dense[0]:
            self._hooks.enter_context(applied(model, dense[0]))
        thin = [{knob: knob.alpha(s) for knob, s in row.items() if knob.low_rank} for row in rows]
        alike = all(row == thin[0] for row in thin)
        self._hooks.enter_context(self._adapter.extend(row_addends(model, thin[:1] if alike else thin)))

    def clear(self) -> None:
        """Take every hook off the model, and put its own weights back."""
        if self._ended:
            return
        if max(self._active, default=self._level) > self._level:  # whose hooks and weights lie on top of these
            raise AdapterError("Another steer() acts inside this one. Leave that one first, or change its knobs.")
        self._hooks.close()

    @contextmanager
    def counted(self) -> Generator[None]:
        """Take the next level among the settings that steer this model; all of them belong to one thread and task.

        Raises `AdapterError` while another one steers it.
        """
        with _COUNTING:
            active = _ACTIVE.setdefault(self._adapter.blocks[0], {})
            if any(_apart(holder, self._holder) for holder in active.values()):
                raise AdapterError(
                    f"This {type(self._adapter.model).__name__} is being steered in another thread or task, and knobs "
                    "act on the whole model: each would act on the other's text. Take turns, steer one batch with a "
                    "setting per row, or use a copy of the model that was made outside of steer()."
                )
            self._level, self._active = max(active, default=-1) + 1, active
            active[self._level] = self._holder
        try:
            yield
        finally:
            self._ended = True
            self._hooks.close()
            with _COUNTING:
                del active[self._level]

    def _before(self, follower: Follower, call: CallInfo) -> None:
        """Work out, once per forward, which tokens each knob may touch."""
        self._match_rows(call.batch)
        masks = follower.masks(call)
        self._call, self._unmasked = (call.batch, call.tokens), masks is EVERY_TOKEN
        if self._unmasked:  # a decode step computes nothing that it need not
            self._masks, self._steps = masks, self._alone
        else:
            dtype = self._adapter.dtype
            self._masks = {where: None if mask is None else mask[..., None].to(dtype) for where, mask in masks.items()}
            self._steps = {}
        if self._streams:
            self._begin_streams(call, masks)

    def _begin_streams(self, call: CallInfo, masks: Masks) -> None:
        """Hand a call to the second streams that have to follow it."""
        # Past the prompt a knob that steers it is done with; others have to follow every token from the first on.
        gone = {knob for knob in self._streams if knob.where in ("prompt", "context") and knob.where not in masks}
        self._moving = {knob: stream for knob, stream in self._streams.items() if knob not in gone}
        for knob, stream in self._moving.items():
            if stream.leans_on_the_model and len(self._active) > 1:
                raise AdapterError(
                    f"Another steer() acts inside the one of the lookahead knob {knob.name!r}, whose scaled step is "
                    "compared with the model's own stream. Enter the other one first, or use backend='exact'."
                )
            stream.begin(call)

    def _after(self, follower: Follower, cache: object) -> None:
        follower.keep(cache)
        for stream in self._moving.values():
            stream.keep(cache)

    def _match_rows(self, batch: int) -> None:
        """Repeat the rows' addends if the model runs a multiple of them."""
        if self._lengths is not None and batch % len(self._lengths):
            raise OptionError(f"The model got {batch} rows, not a multiple of the {len(self._lengths)} prompt lengths.")
        if self._rows is None:
            return
        times, left = divmod(batch, self._rows)
        if left or not times:
            raise OptionError(f"The model got {batch} rows, not a multiple of the {self._rows} knob settings.")
        if times != self._expanded[0]:
            self._expand(times)

    def _expand(self, times: int) -> None:
        tables = self._tables
        self._steps = {}  # until the next call
        self._expanded = (times, {n: table.repeat(times) for n, table in tables.items()} if times > 1 else tables)
        self._alone = {
            layer: table.later
            for layer, table in self._expanded[1].items()
            if table.later is not None and table.adds_only
        }

    def _apply(self, layer: int, hidden: Tensor) -> Tensor:
        """Steer a block's output `[B, T, D]`; the hot path is the one addition of a decode step."""
        if not is_compiling() and hidden.shape[:2] != self._call:
            raise AdapterError(
                f"Layer {layer} holds {hidden.shape[0]} rows of {hidden.shape[1]} tokens in a call of "
                f"{self._call[0]} of {self._call[1]}, so that their positions are not known: this model adds tokens of "
                "its own, turns rows into columns, or goes on with its states wrongly."
            )
        if layer in self._steps:
            return hidden + self._steps[layer].to(hidden)
        table, steered = self._expanded[1][layer], hidden
        for ablation in table.ablations:
            if ablation.where in self._masks:
                steered = react(steered, ablation, steered, self._masks[ablation.where])
        for reaction in table.reactions:
            if reaction.where in self._masks:
                steered = react(steered, reaction, hidden, self._masks[reaction.where])
        if self._unmasked:
            steered = steered if table.later is None else steered + table.later.to(steered)
        else:
            for where, addend in table.adds.items():
                if where in self._masks:
                    steered = _add(steered, addend.to(steered), self._masks[where])
        for move in table.moves:
            if move.knob in self._moving and move.knob.where in self._masks:
                moved = move.alpha * self._moving[move.knob].displacement(layer, hidden)
                steered = _add(steered, moved.to(steered), self._masks[move.knob.where])
        return steered


def _add(hidden: Tensor, addend: Tensor, mask: Tensor | None) -> Tensor:
    return hidden + addend if mask is None else torch.addcmul(hidden, mask.to(hidden), addend)


_Holder = tuple[int, int]
"""A thread, and the task that it was at, 0 outside of an event loop; two tasks may take turns in one thread."""


def _holder() -> _Holder:
    loops = sys.modules.get("asyncio")
    try:
        task = None if loops is None else loops.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.get_ident(), 0 if task is None else id(task)


def _apart(one: _Holder, other: _Holder) -> bool:
    """Tell whether two take turns; tasks lie within what was entered before their loop began."""
    return one[0] != other[0] or (one[1] != other[1] and 0 not in (one[1], other[1]))


_ACTIVE: WeakKeyDictionary[nn.Module, dict[int, _Holder]] = WeakKeyDictionary()
"""Who steers a model, by level and by its first block, which wrappers of a model share.

Numbers and nothing else: notes on KV caches reach this, and a cache is copied and pickled without its model.
"""
_COUNTING = threading.Lock()


@contextmanager
def steer(
    model: nn.Module | Adapter,
    settings: Dose | Sequence[Dose],
    *,
    prompt_lengths: Sequence[int] | None = None,
    thinking: Markers | None = None,
    check_cache: bool = True,
) -> Generator[Steering]:
    """Steer `model` inside the context, with its ordinary API: `model.generate(...)`, `model(...)`.

    `settings` maps knobs to strengths, for all rows or (a sequence of mappings) row by row; the model may run a
    multiple of these rows, as beam search does. Strength 0 everywhere is bitwise the plain model. Pass an `Adapter` as
    `model` to name the layers of an unusual model, or to save the search for them.

    A knob's `where` counts from the prompt's end. The prompt is the first call with an empty KV cache; for calls
    without a cache, for prompts fed in pieces (with `use_cache=True`) and for assisted decoding (whose first call holds
    guesses as well), give the number of prompt tokens per row in `prompt_lengths`, padding not counted; what would need
    them is refused with `OptionError`. A call with one new token per row is taken to decode real tokens, whatever its
    mask says. `thinking` holds the token ids that open and those that close a model's thoughts, for `where` "thinking"
    and "answer".

    A KV cache that was made under other knobs, or under none, would silently mix them: it raises `CacheError` unless
    its tokens are the same under these knobs. `check_cache=False` accepts it. Rows that are moved within a cache by
    hand (`batch_select_indices`) are not seen.

    Contexts may be nested on one model: their knobs act together, the inner ones first. Two threads, or two tasks of an
    event loop, cannot steer one model (`AdapterError`), and whatever another one computes on a steered model is steered
    too. Gradients flow through knobs; with checkpointing of activations, call `backward` inside the context and before
    the next forward.

    Widths and layers have to fit; whether a knob was learned on this architecture and chat template is for `Knob.check`
    to say, as `trimtab.generate` does. Dropout is as the model has it: call `model.eval()` after training. A model
    compiled by `torch.compile` is compiled again when hooks come or go.

    Example: `with steer(model, {knob: 1.0}): model.generate(**inputs)`.
    """
    adapter = model if isinstance(model, Adapter) else Adapter(model)
    steering = Steering(adapter, prompt_lengths, thinking, check_cache)
    with steering.counted():
        steering.set(settings)
        yield steering


def batches_of(doses: Sequence[Dose]) -> list[list[int]]:
    """Group the numbers of rows that one batch can serve, at no cost to rows that other knobs steer.

    Dense weight knobs change the model for all rows, and lookahead knobs run a second stream beside all of them: rows
    share a batch where they turn the former alike and turn the same of the latter.
    """
    groups: dict[frozenset[tuple[AnyKnob, float]], list[int]] = {}
    for number, dose in enumerate(doses):
        dense = [(knob, s) for knob, s in turned_weights(dose).items() if not knob.low_rank]
        beside = [(knob, 1.0) for knob, s in dose.items() if isinstance(knob, LookaheadKnob) and knob.alpha(s)]
        groups.setdefault(frozenset([*dense, *beside]), []).append(number)
    return list(groups.values())


def _check_lengths(lengths: Sequence[int]) -> list[int]:
    whole = isinstance(lengths, Sequence) and all(type(length) is int for length in lengths)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not whole or not lengths or min(lengths) < 1:
        raise OptionError(f"Prompt lengths are a list of whole numbers, 1 or more, one per row; got {lengths!r}.")
    return list(lengths)


def _check_markers(markers: Markers, vocabulary: int | None) -> Markers:
    pair = isinstance(markers, Sequence) and len(markers) == 2  # pyright: ignore[reportUnnecessaryIsInstance]
    if not pair or not all(map(_are_ids, markers)):
        wanted = "the ids that open and those that close thoughts, as in ([5], [6])"
        raise OptionError(f"thinking holds {wanted}; got {brief(markers)}.")
    stray = next((i for ids in markers for i in ids if vocabulary is not None and not 0 <= i < vocabulary), None)
    if stray is not None:
        raise OptionError(f"thinking holds the token id {stray}; this model's vocabulary has {vocabulary} tokens.")
    return markers


def _are_ids(ids: object) -> bool:
    return isinstance(ids, Sequence) and len(ids) > 0 and all(type(i) is int for i in ids)
