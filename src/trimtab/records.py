"""A record in TRL's preference format to a pair: text or messages, the prompt apart or in the turns of the answers."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

from trimtab.errors import PairsError, brief
from trimtab.formats import FIELDS, kind
from trimtab.types import ROLES, Message, Pair

_OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "context"),
    "chosen": ("accepted", "preferred", "win", "winner", "response_j", "answer", "positive", "good", "chosen_response"),
    "rejected": ("dispreferred", "lose", "loser", "response_k", "negative", "bad", "rejected_response"),
}
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
_TOOL_ROLES = ("tool", "function", "ipython")


def read_pair(record: object, place: str) -> Pair:
    """Return the pair that a record describes; `place` names the record in the `PairsError` for one that does not.

    `prompt`, `chosen` and `rejected` are text or lists of messages; without a `prompt`, `chosen` and `rejected` are
    lists of messages that share all turns but the last. Other fields go to the pair's `meta`.
    """
    if not isinstance(record, Mapping):
        raise PairsError(f"{place} is {kind(record)}; a record is an object with prompt, chosen and rejected.")
    fields = cast(Mapping[str, object], record)
    for name in ("chosen", "rejected"):
        if name in fields and fields[name] is None:
            raise PairsError(f"{place}: {name} is null; it must be text or a list of messages.")
    missing = [name for name in ("chosen", "rejected") if name not in fields]
    if missing:
        names = [brief(str(name))[1:-1] for name in fields]
        shown = ", ".join([*names[:12], *(["..."] if len(names) > 12 else [])]) or "nothing"
        raise PairsError(f"{place} has no {' and no '.join(missing)}; it has {shown}.{_renaming(fields)}")
    chosen, chosen_context = _answer(fields["chosen"], f"{place}, chosen")
    rejected, rejected_context = _answer(fields["rejected"], f"{place}, rejected")
    if chosen_context != rejected_context:
        raise PairsError(f"{place}: chosen and rejected must share every turn before the answer; theirs differ.")
    prompt = chosen_context
    if fields.get("prompt") is not None:
        prompt = read_messages(fields["prompt"], f"{place}, prompt")
        if chosen_context and chosen_context != prompt:
            raise PairsError(
                f"{place}: the turns before the answer are not those of the prompt. Leave out the prompt, or those "
                "turns."
            )
    elif not prompt:
        hint = _renaming(fields)
        if not hint and "Human:" in chosen and "Assistant:" in chosen:
            hint = " They look like transcripts: split them into messages with role and content."
        raise PairsError(
            f"{place} has no prompt, and its answers do not hold one: give them as lists of messages.{hint}"
        )
    return Pair(prompt, chosen, rejected, {name: value for name, value in fields.items() if name not in FIELDS})


def check_roles(roles: Iterable[str], place: str) -> None:
    """Raise `PairsError` for a role that Trimtab does not know, and say what to do about it."""
    for role in roles:
        if role in ROLES:
            continue
        meant = _OTHER_ROLES.get(role.lower(), role.lower())
        hint = f" Rename it to {meant!r}." if meant in ROLES else ""
        if role in _TOOL_ROLES:
            hint = " Trimtab knows no tools: leave this one out."
        raise PairsError(f"{place}: role {brief(role)} is not one of {', '.join(ROLES)}.{hint}")


def _renaming(fields: Mapping[str, object]) -> str:
    """Say which fields seem to hold what is missing under its name; empty where none does."""
    free = {str(name).strip().lower(): str(name) for name in fields if name not in FIELDS}
    found: dict[str, str] = {}
    for name in FIELDS:
        if name not in fields:
            known = [name, *_OTHER_NAMES[name]]
            near = [other for other in known if other in free] or difflib.get_close_matches(name, free, 1, 0.8)
            found |= {free[other]: name for other in near[:1]}
    return f" Rename {' and '.join(f'{old!r} to {new!r}' for old, new in found.items())}." if found else ""


class _Answer(NamedTuple):
    text: str
    context: tuple[Message, ...]


def _answer(value: object, place: str) -> _Answer:
    if isinstance(value, str):
        return _Answer(value, ())
    turns = read_messages(value, place)
    if not turns or turns[-1].role != "assistant":
        last = f"it is of role {brief(turns[-1].role)}" if turns else "the list is empty"
        raise PairsError(f"{place}: the last message must be the assistant's; {last}.")
    return _Answer(turns[-1].content, turns[:-1])


def read_messages(value: object, place: str) -> tuple[Message, ...]:
    """Return the messages of a prompt, text or a list; `place` names it in the `PairsError` for anything else."""
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, list | tuple):
        raise PairsError(f"{place} is {kind(value)}; it must be text or a list of messages.")
    turns = cast(Sequence[object], value)
    return tuple(_message(turn, f"{place}: message {number}", place) for number, turn in enumerate(turns, 1))


def _message(turn: object, here: str, place: str) -> Message:
    fields = cast(Mapping[str, object], turn) if isinstance(turn, Mapping) else {}
    # Tables of messages give every message the keys of all; the empty ones say nothing.
    more = [str(key) for key, value in fields.items() if key not in ("role", "content") and value not in (None, "", [])]
    if {"from", "value"} <= set(more):
        raise PairsError(
            f"{here} has 'from' and 'value'. Rename them to 'role' and 'content', and human to user, gpt to assistant."
        )
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str) or (content is None and not more):
        raise PairsError(f'{place}: a message is {{"role": text, "content": text}}; got {reprlib.repr(turn)}.')
    check_roles([role], here)
    if more:
        raise PairsError(
            f"{here} has {', '.join(map(repr, more))} besides role and content, which would be lost. Remove that, or "
            "leave this one out."
        )
    return Message(role, _content(content, here))


def _content(content: object, here: str) -> str:
    """Return text, also where it comes in parts, as conversations with images have it."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise PairsError(f"{here} has {kind(content)} as its content; it must be text.")
    texts: list[str] = []
    for part in cast(Sequence[object], content):
        fields = cast(Mapping[str, object], part) if isinstance(part, Mapping) else {}
        text = fields.get("text")
        if fields.get("type") != "text" or not isinstance(text, str):
            got = f"type {fields['type']!r}" if fields.get("type") not in (None, "text") else reprlib.repr(part)
            raise PairsError(f'{here} has a part of {got}; every part must be {{"type": "text", "text": ...}}.')
        texts.append(text)
    return "".join(texts)
