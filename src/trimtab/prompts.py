"""What is asked of a generation: prompts, settings and options of decoding, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from trimtab.addends import Dose
from trimtab.artifact import AnyKnob
from trimtab.errors import OptionError, brief
from trimtab.types import (
    ROLES,
    Message,
    Setting,
    check_count,
    check_seed,
    check_strength,
    is_unicode,
    parse_setting,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Sequence[Message | Mapping[str, str]]
"""A user's message, or a conversation: messages, or mappings with `role` and `content`."""


AnySetting = Setting | Dose | str
"""Strengths by name, strengths of knobs, or the text form of the former."""


def read_prompts(prompts: Sequence[Prompt]) -> list[tuple[Message, ...]]:
    """Read every prompt as messages; raises `OptionError` for a prompt that is not in a list."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"Prompts come as a list; got {prompts!r}. Pass [prompt].")
    return [read_prompt(prompt) for prompt in prompts]


def read_prompt(prompt: object) -> tuple[Message, ...]:
    """Read a prompt as messages; a string is what the user says. Raises `OptionError` for anything else."""
    if isinstance(prompt, str):
        return (_message(Message("user", prompt)),)
    if not isinstance(prompt, Sequence) or not prompt:
        raise OptionError(f"A prompt is a string, or a list of messages; got {prompt!r}.")
    return tuple(_message(entry) for entry in cast(Sequence[object], prompt))


def _message(entry: object) -> Message:
    if isinstance(entry, Message):
        if entry.role not in ROLES:
            raise OptionError(f"Role {entry.role!r} is not one of {', '.join(ROLES)}.")
        if not is_unicode(entry.content):
            raise OptionError(f"A message holds half of a surrogate pair, no character: {entry.content[:60]!a}.")
        return entry
    fields = cast(Mapping[str, object], entry) if isinstance(entry, Mapping) else {}
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise OptionError(f"A message has a role and a content, both text; got {entry!r}.")
    return _message(Message(role, content))


def settings_per_prompt(knobs: AnySetting | Sequence[AnySetting] | None, count: int) -> Sequence[Setting | Dose]:
    """Return one setting per prompt; raises `OptionError` where there are more or fewer."""
    if isinstance(knobs, str):
        knobs = parse_setting(knobs)
    if knobs is None or isinstance(knobs, Mapping):
        return [knobs or {}] * count
    if not isinstance(knobs, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f'A setting is written {{"math": 0.8}} or "math=0.8"; got {knobs!r}.')
    if len(knobs) != count:
        raise OptionError(
            f"Got a list of {len(knobs)} knob settings for {count} prompts; pass one per prompt, or a mapping for "
            "all of them."
        )
    settings = [parse_setting(one) if isinstance(one, str) else one for one in knobs]
    for one in settings:
        if not isinstance(one, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f'A setting is written {{"math": 0.8}} or "math=0.8"; got {brief(one)}.')
    return settings


def names_of(setting: Setting | Dose) -> dict[str, float]:
    """Return a setting by the names of its knobs."""
    return {key.name if isinstance(key, AnyKnob) else key: float(strength) for key, strength in setting.items()}


COLDEST = 1e-6


def _number(value: object, name: str) -> float:
    """Return a number that is one, and not text that could be read as one."""
    if isinstance(value, str):
        raise OptionError(f"The {name} must be a number; got {value!r}.")
    return check_strength(cast(float, value), name)


def check_decoding(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Raise `OptionError` for options of decoding that are out of range."""
    check_count(max_new_tokens, "max_new_tokens")
    check_seed(seed)
    if _number(temperature, "temperature") < 0:
        raise OptionError(f"The temperature is 0 (greedy) or more; got {temperature}.")
    if 0 < temperature < COLDEST:  # logits divided by it would not be finite
        raise OptionError(f"The temperature is 0 (greedy), or {COLDEST:g} or more; got {temperature}.")
    if not 0 < _number(top_p, "top_p") <= 1:
        raise OptionError(f"top_p is above 0 and at most 1; got {top_p}.")


# Contrasts


class Lines(NamedTuple):
    """The system lines of each contrast, on either side; None asks without one."""

    chosen: tuple[str | None, ...]
    rejected: tuple[str | None, ...]


def read_lines(
    chosen_system: Sequence[str] = (), rejected_system: Sequence[str] = (), *, two_models: bool = False
) -> Lines:
    """Return the system lines of every contrast; a side without lines gets None for each.

    Raises `OptionError` for lines that make no contrast; with `two_models` the models make one.
    """
    for name, given in (("chosen_system", chosen_system), ("rejected_system", rejected_system)):
        if isinstance(given, str) or not isinstance(given, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"{name} is a list of system lines; got {brief(given)}. Pass [line].")
        for line in given:
            if not isinstance(line, str) or not line.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptionError(f"{name} holds {brief(line)}, which says nothing. Leave it out, or write a line.")
            if not is_unicode(line):
                raise OptionError(f"{name} is not Unicode text: {line[:60]!a}.")
    count = max(len(chosen_system), len(rejected_system))
    if not count:
        if two_models:
            return Lines((None,), (None,))
        raise OptionError(
            "Without a system line both sides say the same. Pass chosen_system, rejected_system, or both: what the "
            "model is told before the answers that you prefer, and before those that you do not."
        )
    if chosen_system and rejected_system and len(chosen_system) != len(rejected_system):
        raise OptionError(
            f"A contrast is one line of each side; got {len(chosen_system)} of chosen_system and "
            f"{len(rejected_system)} of rejected_system. Pass as many of the one as of the other, or none of one."
        )
    lines = Lines(tuple(chosen_system) or (None,) * count, tuple(rejected_system) or (None,) * count)
    for one, other in zip(*lines, strict=True):
        if one == other and not two_models:
            raise OptionError(f"Both sides have the same system line, {brief(one)}: that is no contrast. Change one.")
    return lines


def check_sampling(samples: int, temperature: float) -> None:
    """Raise `OptionError` for a number of samples that is none, or that would all be the same."""
    if type(samples) is not int or samples < 1:
        raise OptionError(f"samples counts the answers to a prompt, and is a whole number, 1 or more; got {samples!r}.")
    if samples > 1 and temperature == 0:
        raise OptionError(
            f"samples counts the answers to a prompt, and at temperature 0 they are all the same; got {samples}. Let "
            "the temperature be above 0, such as 1."
        )


# Where answers end


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Collect the ids that end a turn, from the tokenizer and from the model's generation settings."""
    return end_tokens(tokenizer, model.generation_config.eos_token_id)


def end_tokens(tokenizer: PreTrainedTokenizerBase, own: object) -> list[int]:
    """Collect the ids that end a turn, from the tokenizer and what a model's settings say of them (`own`)."""
    known: list[object] = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in known if isinstance(token, int)})
