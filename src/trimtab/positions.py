"""Which tokens of a forward call each `where` means, in absolute positions, from one call to the next.

What was computed so far lies in a KV cache. What must be known of it, the prompt's end and the knobs it was made
under, lies as a note on the cache itself, so that copies, several caches in turn and later contexts agree. Contexts
may be nested: each leaves its own note, under its level.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from trimtab.adapter import CallInfo, generating, read_note, write_note
from trimtab.errors import CacheError, OptionError
from trimtab.thoughts import Thoughts, start_thoughts
from trimtab.types import THOUGHTS, Markers, Where

Masks = dict[Where, Tensor | None]
"""Tokens of one call by `where`, `[B or 1, T]` bool, or None for all of them; one left out means no token."""

EVERY_TOKEN: Masks = {"all": None, "completion": None}
"""What `Follower.masks` returns, and no copy of it, where every token counts, as in a decode step after the prompt.

Callers compare by `is`; never change it.
"""


class RowDose(NamedTuple):
    """What is done to one row, told apart from anything else that could be."""

    digest: str = ""
    """Empty where nothing is done."""
    later: bool = True
    """Whether only tokens from the prompt's last one on are touched."""


@dataclass
class _Prompt:
    """The prompt being continued: where it ends, in columns of the KV cache (padding included)."""

    lengths: Tensor  # [B] or [1], tokens of each row's prompt
    pads: Tensor  # [B] or [1], padding so far
    end: int  # from this column on, every row is past its prompt
    given: bool  # by the caller, and not read off the first call

    def repeat(self, batch: int) -> _Prompt:
        """Give each row to its neighbours, as a cache of fewer rows does that was repeated."""

        def spread(values: Tensor) -> Tensor:
            return values.repeat_interleave(batch // len(values)) if 1 < len(values) < batch else values

        return _Prompt(spread(self.lengths), spread(self.pads), self.end, self.given)


@dataclass
class _History:
    """What is known of the tokens in a KV cache."""

    follower: Follower | None
    doses: Sequence[RowDose]
    columns: int = 0
    prompt: _Prompt | None = None
    thoughts: Thoughts | None = None


class Follower:
    """Follows sequences from call to call, for the knobs of one setting.

    `rows` holds what is done to each row, once for all rows where there is a single entry; `wheres` are the tokens
    meant by any of it; `lengths` are the rows' prompt lengths, None to read them off the first call; `markers` open and
    close thoughts; `check` refuses caches made under other knobs. `level` is the depth of this setting among those that
    steer the same model, `active` the levels in use at any time.
    """

    def __init__(
        self,
        rows: Sequence[RowDose],
        wheres: frozenset[Where],
        lengths: Sequence[int] | None,
        markers: Markers | None,
        check: bool,
        level: int,
        active: Collection[int],
    ) -> None:
        self._rows, self._lengths, self._check = rows, lengths, check
        self._level, self._active = level, active
        self._scoped = bool(wheres - {"all"})
        self._thinks = bool(wheres & THOUGHTS)
        if self._thinks and markers is None:
            raise OptionError(
                "where='thinking' and 'answer' need the tokens that open and close the thoughts: pass "
                "thinking=(opening ids, closing ids) to steer(). trimtab.generate finds those of the tokenizer itself."
            )
        self._markers = markers or ((), ())
        self._new: _History | None = None
        self._noted = 0  # the cache that has that note already, by `id`: holding it would keep it alive

    def masks(self, call: CallInfo) -> Masks:
        """Say which tokens of a call each `where` means; to be asked once per call, before it."""
        if not self._scoped and not self._check:
            real = None if call.tokens == 1 else call.real_tokens(call.past())
            return EVERY_TOKEN if real is None else {"all": real, "completion": real}
        notes = _notes(call.cache)
        history = notes.get(self._level)
        past = call.past(history.columns if history else self._unknown(call))
        if history is None or len(notes) > 1:  # not ours alone
            self._settle_old_levels(notes, past)
        if past and history is not None and past < history.columns:
            self._refuse_cropped(history)
        if past == 0:
            history = self._begin(call)
        elif (
            history is None
            or history.follower is not self
            or len(history.doses) != call.batch
            or past > history.columns
        ):
            history = self._take_over(history, call, past)
        masks = self._place(history, call, past)
        history.columns = past + call.tokens
        if call.cache is not None and notes.get(self._level) is not history:
            self._note(call.cache, {**notes, self._level: history})
        self._new, self._noted = history, id(call.cache)
        return masks

    def keep(self, cache: object) -> None:
        """Remember the latest call's tokens as those of a cache which that call has made."""
        new, self._new = self._new, None
        if new is None or id(cache) == self._noted:
            return
        notes = _notes(cache)
        if notes.get(self._level) is not new:
            self._note(cache, {**notes, self._level: new})

    def _note(self, cache: object, notes: dict[int, _History]) -> None:
        if not write_note(cache, notes) and self._scoped:
            raise CacheError(
                f"Cannot follow a KV cache of type {type(cache).__name__} from call to call, which a knob needs that "
                "steers a part of the tokens. Use where='all', or use_cache=False and prompt_lengths."
            )

    def _unknown(self, call: CallInfo) -> int | None:
        """Return the length to take for a cache that tells none and that we have not seen: it does not matter if 0."""
        return None if self._scoped or hasattr(call.cache, "get_seq_length") else 0

    def _refuse_cropped(self, history: _History) -> None:
        if history.thoughts is not None:
            raise CacheError(
                "Tokens were taken back from this KV cache, and with them what is known of thoughts (where='thinking' "
                "or 'answer'). Pass the whole prompt, without guesses."
            )
        if history.prompt is not None and not history.prompt.given:
            raise OptionError(
                "Tokens were taken back from this KV cache, so that the prompt may end elsewhere. Pass prompt_lengths "
                "to steer()."
            )

    def _doses(self, batch: int) -> list[RowDose]:
        return [row for row in self._rows for _ in range(batch // len(self._rows))]

    # Caches

    def _settle_old_levels(self, notes: dict[int, _History], past: int) -> None:
        """Refuse tokens made inside an inner context that is no more; forget such contexts where they did nothing."""
        if self._level != min(self._active):
            return
        for level in [level for level in notes if level not in self._active]:
            old = notes.pop(level)
            ends = _ends(old.prompt, len(old.doses))
            if past and self._check and not all(map(_untouched, old.doses, ends, [past] * len(ends))):
                raise CacheError(
                    f"This call continues a KV cache whose {past} tokens were computed under the knobs of another "
                    "steer() as well, nested in this one. Pass the whole prompt, or nest it again."
                )

    def _begin(self, call: CallInfo) -> _History:
        history = _History(self, self._doses(call.batch))
        if self._scoped:
            _refuse_guidance()
            if self._lengths is None:
                _refuse_what_hides_the_prompt(call)
            history.prompt = self._start_prompt(call, 0)
        if self._thinks:
            history.thoughts = start_thoughts(call, self._markers)
        return history

    def _take_over(self, old: _History | None, call: CallInfo, past: int) -> _History:
        """Go on with tokens that another setting, or none, has made; refuse where they would be others under ours."""
        history = _History(self, self._doses(call.batch), past)
        if old is not None and call.batch % len(old.doses):
            raise CacheError(
                f"This call continues a KV cache of {len(old.doses)} rows with {call.batch}. Pass the whole prompts."
            )
        if self._scoped:
            known = old.prompt if old is not None and self._lengths is None else None
            history.prompt = known.repeat(call.batch) if known else self._start_prompt(call, past)
        if self._check:
            theirs = old.doses if old is not None else [RowDose()]
            theirs = [dose for dose in theirs for _ in range(call.batch // len(theirs))]
            gap = old is not None and past > old.columns  # the cache has grown outside of that setting
            was = old.prompt.repeat(call.batch) if old is not None and old.prompt is not None else None
            now = history.prompt
            rows = zip(history.doses, theirs, *(_ends(p, call.batch) for p in (was, now)), strict=True)
            for row, (ours, other, then, end) in enumerate(rows):
                cached = past if now is None else past - int(now.pads[row % len(now.pads)])
                same_end = not gap and (then == end or min(then, end) > cached)
                alike = ours == other and (not ours.digest or same_end)
                if not alike and not (_untouched(ours, end, cached) and _untouched(other, then, cached)):
                    made = "under other knobs or strengths" if other.digest else "without knobs"
                    made = made if ours != other else "under the same knobs with another end of the prompt"
                    made = made if not gap else "in part outside of this steer()"
                    raise CacheError(
                        f"This call continues a KV cache whose {cached} tokens were computed {made} (row {row}): under "
                        "these knobs they would have been others. Pass the whole prompt, make the prefix under the "
                        "same knobs, or accept the mixture with steer(..., check_cache=False)."
                    )
        if self._thinks:
            if old is None or old.thoughts is None or len(old.thoughts.open) != call.batch or past > old.columns:
                raise CacheError(
                    "This call continues a KV cache, and whether its last tokens are thoughts is not known "
                    "(where='thinking' or 'answer'). Pass the whole prompt."
                )
            history.thoughts = old.thoughts
        return history

    # Prompts

    def _start_prompt(self, call: CallInfo, past: int) -> _Prompt:
        """Note where the prompt ends that begins with this call, or began before it."""
        if self._lengths is None and (past or not call.caching):
            why = "this call continues a KV cache made elsewhere" if past else "this call asks for no KV cache"
            raise OptionError(
                "A knob that steers a part of the tokens (where='prompt', 'context', 'completion', 'thinking' or "
                f"'answer') needs to know where the prompt ends, and {why}. "
                "Pass prompt_lengths to steer(), or use_cache=True to the model if the whole input is the prompt."
            )
        pads = torch.zeros(1, dtype=torch.long, device=call.device)
        if self._lengths is None:
            real = call.real_tokens(past)
            lengths = torch.full_like(pads, call.tokens) if real is None else real.sum(1)
            return _Prompt(lengths, pads, call.tokens, given=False)
        around = generating()
        whole = around is not None and not around.pieces  # guesses of assisted decoding come on top
        if not past and (whole or not call.caching):
            self._refuse_short_rows(call)
        mask, end = call.attention_mask, max(self._lengths)
        if past and mask is not None and mask.dim() != 2:
            raise OptionError(
                "This call continues a KV cache made elsewhere, with an attention mask that does not show the padding "
                "in it (static caches have such). Pass the whole prompt, or stay in the steer() that began it."
            )
        if past and mask is not None and mask.dim() == 2 and mask.shape[1] > past:
            pads = (mask[:, :past] == 0).sum(1)
            end += int(pads.max())
        lengths = torch.tensor(self._lengths, device=call.device).repeat_interleave(call.batch // len(self._lengths))
        return _Prompt(lengths, pads, end, given=True)

    def _refuse_short_rows(self, call: CallInfo) -> None:
        """Refuse rows that end before their prompt does, in a call that brings all of it."""
        assert self._lengths is not None
        real = call.real_tokens(0)
        counts = [call.tokens] * call.batch if real is None else real.sum(1).tolist()
        times = call.batch // len(self._lengths)
        for row, count in enumerate(counts):
            if count < self._lengths[row // times]:
                raise OptionError(
                    f"Row {row} has {count} tokens, and prompt_lengths says that its prompt has "
                    f"{self._lengths[row // times]}. Count real tokens, without padding; if the rest of the prompt "
                    "follows, pass use_cache=True to the model."
                )

    def _place(self, history: _History, call: CallInfo, past: int) -> Masks:
        prompt = history.prompt
        if prompt is None or past >= prompt.end:
            if prompt is not None and not prompt.given and call.tokens > 1:
                raise OptionError(
                    f"This call brings {call.tokens} more tokens after a prompt of {prompt.end}: the rest of a prompt "
                    "that comes in pieces, guesses, or a new turn? Pass prompt_lengths to steer(). A new turn begins "
                    "without the old KV cache, or with check_cache=False too, which keeps earlier turns as they are."
                )
            # a decode step has no padding: do not look
            real = None if call.tokens == 1 else call.real_tokens(past)
            if history.thoughts is None:
                return EVERY_TOKEN if real is None else {"all": real, "completion": real}
            thinking = history.thoughts.follow(call, self._markers)
            real = torch.ones_like(thinking) if real is None else real
            return {"all": real, "completion": real, "thinking": real & thinking, "answer": real & ~thinking}
        masks = _compare(prompt, past, call.tokens, call.real_tokens(past))
        if history.thoughts is not None:
            thinking, completion = history.thoughts.follow(call, self._markers), masks["completion"]
            assert completion is not None
            masks |= {"thinking": completion & thinking, "answer": completion & ~thinking}
        return masks


def _notes(cache: object) -> dict[int, _History]:
    """Return what is known of a KV cache, by the level of the context that made it."""
    note = read_note(cache)
    return cast(dict[int, _History], note) if isinstance(note, dict) else {}


def _refuse_guidance() -> None:
    """Refuse the second branch of classifier-free guidance, which sees another prompt and has a cache of its own."""
    around = generating()
    if around is not None and around.guided:
        raise OptionError(
            "guidance_scale runs a second prompt beside the first, and a knob that steers a part of the tokens cannot "
            "see where it ends. Use where='all', or no guidance."
        )


def _refuse_what_hides_the_prompt(call: CallInfo) -> None:
    """Refuse a first call that is not the prompt and nothing but the prompt."""
    around = generating() if call.caching else None
    if around is not None and (around.assisted or around.pieces):
        what = "Assisted decoding puts guesses behind the prompt" if around.assisted else "The prompt comes in pieces"
        raise OptionError(
            f"{what}, so that a knob that steers a part of the tokens cannot see where the prompt ends. "
            "Pass prompt_lengths to steer()."
        )


def _compare(prompt: _Prompt, past: int, tokens: int, real: Tensor | None) -> Masks:
    """Compare the absolute positions of the tokens in one call with the ends of the prompts, `[B or 1, T]` bool."""
    columns = torch.arange(past, past + tokens, device=prompt.pads.device)
    pads = prompt.pads[:, None]  # [B or 1, T or 1], padding before each column
    if real is not None:
        pads = pads + (~real).cumsum(1)
        prompt.pads = pads[:, -1]
        prompt.end = int((prompt.lengths + prompt.pads).max())
    positions, lengths = columns - pads, prompt.lengths[:, None]
    in_prompt, in_context, in_completion = positions < lengths, positions < lengths - 1, positions >= lengths - 1
    if real is None:
        return {"all": None, "prompt": in_prompt, "context": in_context, "completion": in_completion}
    return {"all": real, "prompt": in_prompt & real, "context": in_context & real, "completion": in_completion & real}


def _ends(prompt: _Prompt | None, batch: int) -> list[int]:
    """Return each row's prompt length; -1 where it is not known, or does not matter."""
    return [-1] * batch if prompt is None else [int(n) for n in prompt.lengths.expand(batch).tolist()]


def _untouched(dose: RowDose, prompt: int, tokens: int) -> bool:
    """Tell whether a dose touches none of the first tokens; the prompt's last token is the first of the completion."""
    return not dose.digest or (dose.later and prompt > tokens)
