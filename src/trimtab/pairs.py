"""Preference pairs: load, validate, de-duplicate, split by prompt, hash."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast, overload

from trimtab.errors import OptionError, PairsError
from trimtab.types import ROLES, Message, Pair, is_unicode

Duplicates = Literal["error", "drop", "keep"]


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
        self._pairs = tuple(pairs)
        for number, pair in enumerate(self._pairs, 1):
            _check(pair, f"Pair {number}")

    @staticmethod
    def load(path: str | Path, *, duplicates: Duplicates = "error") -> Pairs:
        """Read pairs from a `.jsonl` file (one record per line) or a `.json` file (a list of records).

        Records are as in `from_records`. Raises `PairsError` that names the line (or item) that is wrong.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise PairsError(f"Cannot read pairs from {str(path)!r}: {error}.") from None
        try:
            return _from_text(text, file.suffix == ".json", duplicates)
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
        """Write one record per line (JSONL), whatever the suffix of `path` except `.json`, which gets a list."""
        lines = [json.dumps(record, ensure_ascii=False) for record in self.to_records()]
        is_list = Path(path).suffix == ".json"
        text = "[\n" + ",\n".join(lines) + "\n]\n" if is_list else "".join(line + "\n" for line in lines)
        Path(path).write_text(text, encoding="utf-8")

    def deduplicate(self) -> Pairs:
        """Keep the first of equal pairs, and neither of two pairs that contradict each other."""
        keys = {_key(pair) for pair in self._pairs}
        first = {_key(pair): pair for pair in reversed(self._pairs)}
        kept = [pair for pair in self._pairs if first[_key(pair)] is pair and _key(_swap(pair)) not in keys]
        return Pairs(kept)

    def split(self, validation: float = 0.3, *, seed: int = 0) -> Split:
        """Split into train and validation such that no prompt is on both sides.

        Prompts that differ only in their system lines count as one. `validation` is the share of prompts, in (0, 1).
        A prompt's side depends on the prompt and the seed, not on the order of the pairs.
        """
        if not 0 < validation < 1:
            raise OptionError(f"The validation share must lie between 0 and 1, both excluded; got {validation!r}.")
        prompts = {_question(pair): _digest([str(seed), *_question(pair)]) for pair in self._pairs}
        if len(prompts) < 2:
            raise PairsError(f"A split needs at least 2 different prompts; these pairs have {len(prompts)}.")
        held = min(max(round(validation * len(prompts)), 1), len(prompts) - 1)
        aside = set(sorted(prompts, key=prompts.__getitem__)[:held])
        train = [pair for pair in self._pairs if _question(pair) not in aside]
        return Split(Pairs(train), Pairs(pair for pair in self._pairs if _question(pair) in aside))

    def take(self, n: int, *, seed: int = 0) -> Pairs:
        """Draw `n` pairs without replacement, in their original order."""
        if not 0 <= n <= len(self):
            raise OptionError(f"Cannot take {n} pairs out of {len(self)}.")
        return Pairs(self._pairs[i] for i in sorted(random.Random(seed).sample(range(len(self)), n)))

    def flip_balanced(self, *, seed: int = 0) -> Pairs:
        """Swap chosen and rejected in exactly half of the pairs (rounded down): a control without a preference.

        Flips drawn pair by pair would leave a surplus on one side, which still points along the truth.
        """
        flipped = set(random.Random(seed).sample(range(len(self)), len(self) // 2))
        return Pairs(_swap(pair) if i in flipped else pair for i, pair in enumerate(self._pairs))

    def hash(self) -> str:
        """Return the sha256 of prompts and answers in order; `meta` does not count."""
        return _digest([_digest(part for line in _key(pair) for part in line) for pair in self._pairs])

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
        return f"Pairs({len(self)} pairs, {len({_question(pair) for pair in self._pairs})} prompts)"


# One pair


def _key(pair: Pair) -> tuple[tuple[str, ...], ...]:
    return (*((m.role, m.content) for m in pair.prompt), (pair.chosen, pair.rejected))


def _question(pair: Pair) -> tuple[str, ...]:
    return tuple(text for m in pair.prompt if m.role != "system" for text in (m.role, m.content))


def _swap(pair: Pair) -> Pair:
    return Pair(pair.prompt, pair.rejected, pair.chosen, pair.meta)


def _digest(parts: Iterable[str]) -> str:
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "big") + data)  # lengths, so that ["ab"] and ["a", "b"] differ
    return state.hexdigest()


def _check(pair: Pair, place: str) -> None:
    if not pair.prompt or pair.prompt[-1].role != "user":
        last = pair.prompt[-1].role if pair.prompt else "nothing"
        raise PairsError(f"{place}: the prompt must end with a user turn; it ends with {last}.")
    for message in pair.prompt:
        if message.role not in ROLES:
            raise PairsError(f"{place}: role {message.role!r} is not one of {', '.join(ROLES)}.")
        if not message.content.strip():
            raise PairsError(f"{place}: the {message.role} turn of the prompt is empty.")
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not answer.strip():
            raise PairsError(f"{place}: the {name} answer is empty.")
    for text in (*(message.content for message in pair.prompt), pair.chosen, pair.rejected):
        if not is_unicode(text):
            raise PairsError(f"{place} holds half of a surrogate pair, which is no character: {_short(ascii(text))}.")
    if pair.chosen.strip() == pair.rejected.strip():
        raise PairsError(f"{place}: chosen and rejected are the same answer, {_short(pair.chosen)}.")


# Records


def _from_text(text: str, is_list: bool, duplicates: Duplicates) -> Pairs:
    if is_list:
        records = _parse(text, "the file")
        if not isinstance(records, list):
            raise PairsError(f"The file holds {_kind(records)}; a .json file of pairs holds a list of records.")
        places = [f"Item {number}" for number in range(1, len(cast(list[object], records)) + 1)]
        return _from_records(cast(list[object], records), places, duplicates)
    lines = [(f"Line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return _from_records([_parse(line, place) for place, line in lines], [place for place, _ in lines], duplicates)


def _from_records(records: Sequence[object], places: Sequence[str], duplicates: Duplicates) -> Pairs:
    if duplicates not in ("error", "drop", "keep"):
        raise OptionError(f"duplicates must be 'error', 'drop' or 'keep'; got {duplicates!r}.")
    pairs: list[Pair] = []
    seen: dict[object, str] = {}
    for record, place in zip(records, places, strict=True):
        pair = _read(record, place)
        _check(pair, place)
        if duplicates == "error":
            hint = 'Pass duplicates="drop" to leave it out.'
            if _key(pair) in seen:
                raise PairsError(f"{place} repeats {seen[_key(pair)].lower()}: {_short(pair.chosen)}. {hint}")
            if _key(_swap(pair)) in seen:
                raise PairsError(
                    f"{place} contradicts {seen[_key(_swap(pair))].lower()}: the same two answers to the same prompt, "
                    f"swapped. {hint}"
                )
            seen[_key(pair)] = place
        pairs.append(pair)
    if not pairs:
        raise PairsError("There are no pairs: the input holds no record.")
    return Pairs(pairs).deduplicate() if duplicates == "drop" else Pairs(pairs)


def _read(record: object, place: str) -> Pair:
    if not isinstance(record, Mapping):
        raise PairsError(f"{place} is {_kind(record)}; a record is an object with prompt, chosen and rejected.")
    fields = cast(Mapping[str, object], record)
    for name in ("chosen", "rejected"):
        if name in fields and fields[name] is None:
            raise PairsError(f"{place}: {name} is null; it must be text or a list of messages.")
    missing = [name for name in ("chosen", "rejected") if name not in fields]
    if missing:
        raise PairsError(
            f"{place} has no {' and no '.join(missing)}; it has {', '.join(map(str, fields)) or 'nothing'}."
        )
    chosen, chosen_context = _answer(fields["chosen"], f"{place}, chosen")
    rejected, rejected_context = _answer(fields["rejected"], f"{place}, rejected")
    if chosen_context != rejected_context:
        raise PairsError(f"{place}: chosen and rejected must share every turn before the answer; theirs differ.")
    prompt = chosen_context
    if fields.get("prompt") is not None:
        prompt = _messages(fields["prompt"], f"{place}, prompt")
        if chosen_context and chosen_context != prompt:
            raise PairsError(f"{place}: the turns before the answer are not those of the prompt.")
    elif not prompt:
        raise PairsError(f"{place} has no prompt, and its answers do not hold one: give them as lists of messages.")
    meta = {name: value for name, value in fields.items() if name not in ("prompt", "chosen", "rejected")}
    return Pair(prompt, chosen, rejected, meta)


class _Answer(NamedTuple):
    text: str
    context: tuple[Message, ...]


def _answer(value: object, place: str) -> _Answer:
    if isinstance(value, str):
        return _Answer(value, ())
    turns = _messages(value, place)
    if not turns or turns[-1].role != "assistant":
        raise PairsError(f"{place}: the last message must be the assistant's.")
    return _Answer(turns[-1].content, turns[:-1])


def _messages(value: object, place: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, list | tuple):
        raise PairsError(f"{place} is {_kind(value)}; it must be text or a list of messages.")
    turns: list[Message] = []
    for turn in cast(Sequence[object], value):
        fields = cast(Mapping[str, object], turn) if isinstance(turn, Mapping) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise PairsError(f'{place}: a message is {{"role": text, "content": text}}; got {_short(repr(turn))}.')
        turns.append(Message(role, content))
    return tuple(turns)


def _parse(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PairsError(f"{place[0].upper() + place[1:]} is not JSON: {error}.") from None


def _kind(value: object) -> str:
    names = {
        "dict": "an object",
        "list": "a list",
        "str": "text",
        "int": "a number",
        "float": "a number",
        "NoneType": "null",
    }
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
