"""Preference pairs: load, validate, de-duplicate, split by prompt, hash."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Literal, NamedTuple, cast, overload

from trimtab.errors import OptionError, PairsError, brief
from trimtab.files import reason, write_atomically
from trimtab.formats import FIELDS, kind, read_file
from trimtab.records import check_roles, read_pair
from trimtab.types import Message, Pair, check_seed, check_strength, is_unicode

Duplicates = Literal["error", "drop", "keep"]
FLAGS = ("better", "safer")
"""Fields of `meta` that name one of the two answers, as "chosen" or "rejected"."""
OTHER = {"chosen": "rejected", "rejected": "chosen"}
MOST_HASHES = 100_000
"""Prompts that a knob remembers at most, so that its file stays within limits; of more, those that sort first."""


class Split(NamedTuple):
    """Pairs to learn from, and pairs to choose with."""

    train: Pairs
    validation: Pairs


class Pairs(Sequence[Pair]):
    """An immutable sequence of pairs; every operation returns a new one.

    >>> pairs = Pairs.from_records([{"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "5"}])
    >>> pairs[0].chosen
    'It is 4.'
    """

    def __init__(self, pairs: Iterable[Pair] = ()) -> None:
        if not isinstance(pairs, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PairsError(f"Pairs are made of several Pair; got {kind(pairs)}. Use Pairs.load for a file.")
        self._pairs = tuple(pairs)
        for number, pair in enumerate(self._pairs, 1):
            _check(pair, f"Pair {number}")

    @staticmethod
    def load(path: str | Path, *, duplicates: Duplicates = "error") -> Pairs:
        """Read pairs from a file: JSON lines (`.jsonl`, `.ndjson`), a JSON list, CSV, TSV or Parquet, by its suffix.

        Records are as in `from_records`; in CSV and TSV a cell may hold a JSON list of messages. Another suffix is an
        error, as is whatever a pair cannot be: `PairsError` names the line (or item, or row) that is wrong.
        """
        if not isinstance(path, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PairsError(f"A file of pairs is named by its path; got {kind(path)}.")
        placed = read_file(path)
        try:
            return _from_records([record for _, record in placed], [place for place, _ in placed], duplicates)
        except PairsError as error:
            raise PairsError(f"{path}: {error}") from None

    @staticmethod
    def from_records(records: Iterable[Mapping[str, object]], *, duplicates: Duplicates = "error") -> Pairs:
        """Read pairs from records in TRL's preference format.

        `prompt`, `chosen` and `rejected` are strings or lists of messages; without a `prompt`, `chosen` and `rejected`
        are lists of messages that share all turns but the last. Other keys go to the pair's `meta`. `duplicates` says
        what happens to a pair seen before and to a pair that contradicts one seen before (same answers, swapped):
        "error", "drop" (keep the first of equal pairs and neither of contradictory ones), or "keep".
        """
        if isinstance(records, str | Mapping) or not isinstance(records, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PairsError(f"Records are a list of objects; got {kind(records)}. Pass Pairs.load(...) a file.")
        items = list(records)
        return _from_records(items, [f"Record {number}" for number in range(1, len(items) + 1)], duplicates)

    def to_records(self) -> list[dict[str, object]]:
        """Return the pairs as records that `from_records` reads back: strings where a prompt is one user turn."""
        records: list[dict[str, object]] = []
        for pair in self._pairs:
            chosen: object = pair.chosen
            rejected: object = pair.rejected
            prompt: object = pair.prompt[0].content
            if len(pair.prompt) > 1:
                prompt = [{"role": m.role, "content": m.content} for m in pair.prompt]
                chosen = [{"role": "assistant", "content": pair.chosen}]
                rejected = [{"role": "assistant", "content": pair.rejected}]
            records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, **pair.meta})
        return records

    def save(self, path: str | Path) -> None:
        """Write the pairs to a `.jsonl` file (one record per line) or a `.json` file (a list), and to no other."""
        suffix = Path(path).suffix.lower()
        if suffix not in (".jsonl", ".json"):
            raise PairsError(f"Pairs are saved to a .jsonl or a .json file; got {str(path)!r}.")
        lines = [_dump(record, f"Pair {number}") for number, record in enumerate(self.to_records(), 1)]
        is_list = suffix == ".json"
        text = "[\n" + ",\n".join(lines) + "\n]\n" if is_list else "".join(line + "\n" for line in lines)
        try:
            write_atomically(path, text.encode())
        except OSError as error:
            raise PairsError(f"Cannot write {str(path)!r}: {reason(error)}. Nothing there was changed.") from None

    def deduplicate(self) -> Pairs:
        """Keep the first of equal pairs, and neither of two pairs that contradict each other."""
        keys = {_key(pair) for pair in self._pairs}
        first = {_key(pair): pair for pair in reversed(self._pairs)}
        kept = [pair for pair in self._pairs if first[_key(pair)] is pair and _key(swap(pair)) not in keys]
        return Pairs(kept)

    def split(self, validation: float = 0.3, *, seed: int = 0) -> Split:
        """Split into train and validation such that no prompt is on both sides.

        Prompts that differ only in their system lines count as one. `validation` is the share of prompts, in (0, 1).
        A prompt's side depends on the prompt and the seed, not on the order of the pairs.
        """
        validation = check_strength(validation, "validation share")
        if not 0 < validation < 1:
            raise OptionError(f"The validation share must lie between 0 and 1, both excluded; got {validation!r}.")
        drawn = str(check_seed(seed))
        prompts = {_question(pair.prompt): _digest([drawn, *_question(pair.prompt)]) for pair in self._pairs}
        if len(prompts) < 2:
            raise PairsError(f"A split needs at least 2 different prompts; these pairs have {len(prompts)}.")
        held = min(max(round(validation * len(prompts)), 1), len(prompts) - 1)
        aside = set(sorted(prompts, key=prompts.__getitem__)[:held])
        train = [pair for pair in self._pairs if _question(pair.prompt) not in aside]
        return Split(Pairs(train), Pairs(pair for pair in self._pairs if _question(pair.prompt) in aside))

    def take(self, n: int, *, seed: int = 0) -> Pairs:
        """Draw `n` pairs without replacement, in their original order."""
        if isinstance(n, bool) or not isinstance(n, Integral) or not 0 <= n <= len(self):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"Cannot take {brief(n)} pairs out of {len(self)}: take a whole number, from 0 to all.")
        return Pairs(self._pairs[i] for i in sorted(random.Random(check_seed(seed)).sample(range(len(self)), n)))

    def flip_balanced(self, *, seed: int = 0) -> Pairs:
        """Swap chosen and rejected in exactly half of the pairs (rounded down): a control without a preference.

        Flips drawn pair by pair would leave a surplus on one side, which still points along the truth.
        """
        flipped = set(random.Random(check_seed(seed)).sample(range(len(self)), len(self) // 2))
        return Pairs(swap(pair) if i in flipped else pair for i, pair in enumerate(self._pairs))

    def swapped(self) -> Pairs:
        """Return the pairs with chosen and rejected changed over, in every one, and what `meta` says of them."""
        return Pairs(map(swap, self._pairs))

    def hash(self) -> str:
        """Return the sha256 of prompts and answers in order; `meta` does not count."""
        return _digest([_digest(part for line in _key(pair) for part in line) for pair in self._pairs])

    def prompt_hashes(self) -> list[str]:
        """Return 12 hexadecimal digits for every prompt, sorted; prompts that differ in system lines only are one."""
        return sorted({prompt_hash(pair.prompt) for pair in self._pairs})

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Pair | Pairs:
        return Pairs(self._pairs[index]) if isinstance(index, slice) else self._pairs[index]

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(self._pairs + other._pairs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pairs) and self._pairs == other._pairs

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # meta may be mutable; `hash()` is the digest of the text

    def __repr__(self) -> str:
        return f"Pairs({len(self)} pairs, {len({_question(pair.prompt) for pair in self._pairs})} prompts)"


# One pair


def _key(pair: Pair) -> tuple[tuple[str, ...], ...]:
    return (*((m.role, m.content) for m in pair.prompt), (pair.chosen, pair.rejected))


def prompt_hash(prompt: Sequence[Message]) -> str:
    """Return 12 hexadecimal digits for a prompt; system lines do not count."""
    return _digest(_question(prompt))[:12]


def _question(prompt: Sequence[Message]) -> tuple[str, ...]:
    return tuple(text for m in prompt if m.role != "system" for text in (m.role, m.content))


def swap(pair: Pair) -> Pair:
    """Return a pair with its answers swapped, and what `meta` tells of them: `chosen_*`, `rejected_*`, `FLAGS`."""
    meta: dict[str, object] = {}
    for name, value in pair.meta.items():
        side, _, rest = name.partition("_")
        other = f"{OTHER[side]}_{rest}" if side in OTHER and rest else name
        meta[other] = OTHER.get(str(value), value) if name in FLAGS else value
    return Pair(pair.prompt, pair.rejected, pair.chosen, meta)


def _digest(parts: Iterable[str]) -> str:
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "big") + data)  # lengths, so that ["ab"] and ["a", "b"] differ
    return state.hexdigest()


def _check(pair: object, place: str) -> None:
    if not isinstance(pair, Pair):
        raise PairsError(f"{place} is {kind(pair)}, not a Pair. Use Pairs.from_records for records.")
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not isinstance(answer, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PairsError(f"{place}: the {name} answer is {kind(answer)}; it must be text.")
        if not answer.strip():
            raise PairsError(f"{place}: the {name} answer is empty.")
    check_prompt(pair.prompt, place)
    for text in (*(message.content for message in pair.prompt), pair.chosen, pair.rejected):
        if not is_unicode(text):
            raise PairsError(f"{place} holds half of a surrogate pair, which is no character: {brief(ascii(text))}.")
    if pair.chosen.strip() == pair.rejected.strip():
        raise PairsError(f"{place}: chosen and rejected are the same answer, {brief(pair.chosen)}.")
    taken = [name for name in FIELDS if name in pair.meta]
    if taken:
        raise PairsError(f"{place}: its meta has a field {taken[0]!r}, which is the pair's own. Rename it.")


def check_prompt(prompt: object, place: str) -> None:
    """Raise `PairsError` for turns that no answer could follow; `place` names them in it."""
    if not isinstance(prompt, tuple) or not all(isinstance(turn, Message) for turn in cast(tuple[object, ...], prompt)):
        raise PairsError(f"{place}: the prompt is {kind(prompt)}; it must be a tuple of Messages.")
    messages = cast(tuple[Message, ...], prompt)
    check_roles((message.role for message in messages), place)
    if not messages or messages[-1].role != "user":
        last = messages[-1].role if messages else "nothing"
        raise PairsError(f"{place}: the prompt must end with a user turn; it ends with {last}.")
    for message in messages:
        if not message.content.strip():
            raise PairsError(f"{place}: the {message.role} turn of the prompt is empty.")


# Records


def _from_records(records: Sequence[object], places: Sequence[str], duplicates: Duplicates) -> Pairs:
    if duplicates not in ("error", "drop", "keep"):
        raise OptionError(f"duplicates must be 'error', 'drop' or 'keep'; got {duplicates!r}.")
    pairs: list[Pair] = []
    seen: dict[object, str] = {}
    for record, place in zip(records, places, strict=True):
        pair = read_pair(record, place)
        _check(pair, place)
        if duplicates == "error":
            hint = 'Pass duplicates="drop" to leave it out.'
            if _key(pair) in seen:
                raise PairsError(f"{place} repeats {seen[_key(pair)].lower()}: {brief(pair.chosen)}. {hint}")
            if _key(swap(pair)) in seen:
                raise PairsError(
                    f"{place} contradicts {seen[_key(swap(pair))].lower()}: the same two answers to the same prompt, "
                    f"swapped. {hint}"
                )
            seen[_key(pair)] = place
        pairs.append(pair)
    if not pairs:
        raise PairsError("There are no pairs: the input holds no record.")
    kept = Pairs(pairs).deduplicate() if duplicates == "drop" else Pairs(pairs)
    if not kept:
        raise PairsError(f"There are no pairs left: all {len(pairs)} contradict each other, and were dropped.")
    return kept


def _dump(record: Mapping[str, object], place: str) -> str:
    """Write a record as JSON that every reader takes, which has no NaN."""
    for name, value in record.items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise PairsError(f"{place}: its field {name!r} cannot be written as JSON: {error}.") from None
    return json.dumps(record, ensure_ascii=False)
