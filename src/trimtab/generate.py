"""Generate text with knobs: many prompts in batches, one setting per row, streaming for a single prompt."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer

from trimtab.adapter import Adapter
from trimtab.artifact import AnyKnob, DeltaKnob, Rack
from trimtab.capture.activations import evaluating
from trimtab.errors import OptionError, TrimtabWarning, brief
from trimtab.ops import Batch
from trimtab.prompts import (
    AnySetting,
    Prompt,
    check_decoding,
    end_ids,
    names_of,
    read_prompts,
    settings_per_prompt,
)
from trimtab.render import Pieces, Renderer
from trimtab.runtime import Dose, batches_of, steer
from trimtab.seeds import seeded
from trimtab.types import (
    THOUGHTS,
    Markers,
    Message,
    Setting,
    Where,
    check_count,
    check_strength,
    check_where,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """One answer, with the prompt and the knobs that made it."""

    prompt: tuple[Message, ...]
    text: str
    """The answer without special tokens."""
    knobs: Mapping[str, float]
    """The setting by name, as it was given."""
    tokens: int
    """Number of new tokens, without the one that ends the turn."""
    finished: bool
    """True when the model ended its turn, False when it was cut at `max_new_tokens`, or at the model's context."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    rack: Rack | None = None,
    knobs: AnySetting | Sequence[AnySetting] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    where: Where | None = None,
    thinking: tuple[str, str] | None = None,
    strict: bool | None = True,
    on_text: Callable[[str], None] | None = None,
) -> list[Generation]:
    """Answer every prompt, in the order given; prompts of similar length share a batch.

    `knobs` is one setting for all prompts, or a sequence with one per prompt; a setting maps names on the `rack`, or
    knobs themselves, to strengths, or is text such as "math=0.8,concise=-1". `where` replaces the knobs' own.
    `thinking` are the texts that open and close thoughts, for `where` "thinking" and "answer"; None takes what the
    tokenizer has.
    Temperature 0 is greedy decoding; above it, the model's distribution is sampled, cut at `top_p` and nowhere else.
    The same `seed` gives the same answers for the same prompts in the same batches; the process's own random state is
    left as it was. Dropout is off, whatever mode the model is in. `on_text` gets the answer to a single prompt piece by
    piece; an error it raises ends the generation.

    Answers end with the model's context, with a `TrimtabWarning`. Inside `steer` its knobs act as well, which
    answers do not say.

    Raises `OptionError` for options out of range and for prompts that leave no room in the model's context,
    `UnknownName` for names that are not on the rack, and `KnobError` for a knob from another architecture or chat
    template, which `strict=False` turns into a warning; None compares nothing (who has called `Knob.check` already).
    """
    check_decoding(max_new_tokens, temperature, top_p, seed)
    check_count(batch_size, "batch_size")
    if where is not None:
        check_where(where)
    conversations = read_prompts(prompts)
    if rack is not None and not isinstance(rack, Rack):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"rack is a Rack of named knobs; got {type(rack).__name__}. Pass Rack(NAME=knob).")
    if on_text is not None and len(prompts) != 1:
        raise OptionError(f"on_text streams one prompt; got {len(prompts)}.")
    renderer, adapter = Renderer(tokenizer), Adapter(model)
    ids = [renderer.prompt_ids(messages) for messages in conversations]
    settings, doses = settings_per_prompt(knobs, len(ids)), _doses(knobs, len(ids), rack, where)
    check_context(adapter, ids, max_new_tokens)
    limit = adapter.context_length
    rooms = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(row)) for row in ids]
    for row in ids:
        adapter.check_ids(row)
    if strict is not None:
        for knob in {knob for dose in doses for knob in dose}:
            knob.check(model, tokenizer, strict=strict, hashes=False)
    markers = _markers(renderer, doses, thinking)
    ends, device = end_ids(model, tokenizer), adapter.input_device
    stream = None if on_text is None else _Stream(renderer, ends, on_text)
    results: dict[int, Generation] = {}
    with evaluating(model), seeded(seed, device):
        for chunk in _chunks(doses, rooms, [len(row) for row in ids], batch_size, adapter.has_position_table):
            tokens = max(rooms[i] for i in chunk)
            view = _view(model, _decoding(tokens, temperature, top_p, ends, renderer.pad_id))
            batch = renderer.pad([ids[i] for i in chunk], side="left")
            lengths = [len(ids[i]) for i in chunk]
            with steer(adapter, [doses[i] for i in chunk], prompt_lengths=lengths, thinking=markers):
                new = _new_tokens(view, batch, device, stream)
            for i, made in zip(chunk, new, strict=True):
                results[i] = finished_answer(renderer, conversations[i], made[: rooms[i]], ends, settings[i])
    return [results[i] for i in range(len(ids))]


def finished_answer(
    renderer: Renderer, prompt: tuple[Message, ...], tokens: list[int], ends: Sequence[int], setting: Setting | Dose
) -> Generation:
    """Return the answer that new tokens are, up to the first of `ends`."""
    length = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
    text = renderer.decode(tokens[:length])
    return Generation(prompt, text, names_of(setting), length, length < len(tokens))


def _new_tokens(
    view: PreTrainedModel, batch: Batch, device: torch.device, stream: BaseStreamer | None
) -> list[list[int]]:
    """Run a batch of prompts; raises `OptionError` where nothing can be sampled."""
    run = cast(Callable[..., Tensor], view.generate)  # which PreTrainedModel does not declare
    inputs, mask = (tensor.to(device) for tensor in (batch.input_ids, batch.attention_mask))
    try:
        out = run(input_ids=inputs, attention_mask=mask, streamer=stream)
    except RuntimeError as error:  # torch's words for logits that are NaN or infinite
        if "probability tensor" not in str(error):
            raise
        raise OptionError(
            "The model's probabilities are not finite numbers, so no token can be sampled: a strength or "
            "1 / temperature is too large for it."
        ) from None
    return out[:, batch.input_ids.shape[1] :].tolist()


def _markers(renderer: Renderer, doses: Sequence[Dose], texts: tuple[str, str] | None) -> Markers | None:
    found = renderer.thinking(texts)
    scoped = next((knob for dose in doses for knob in dose if knob.where in THOUGHTS), None)
    if scoped is not None and found is None:
        raise OptionError(
            f"Knob {scoped.name!r} steers {scoped.where!r} tokens, and this tokenizer has none of the known tokens "
            "that open and close thoughts. Pass thinking=(opening, closing), or another where."
        )
    return found if scoped is not None else None


def _chunks(
    doses: Sequence[Dose], rooms: Sequence[int], lengths: Sequence[int], batch_size: int, strict: bool
) -> Iterator[list[int]]:
    """Yield the numbers of the prompts that share a batch, longest first.

    Where the model cannot go on beyond its context (`strict`) a batch ends with the context of its longest prompt, so
    that prompts whose answers reach it share one only with prompts as long. Dense weight knobs change the model for all
    rows alike, so that prompts share a batch only with those that turn them alike.
    """

    def end(i: int) -> int:
        return rooms[i] if strict else 0

    for group in batches_of(doses):
        for _, alike in groupby(sorted(group, key=lambda i: -lengths[i]), end):
            order = list(alike)
            for start in range(0, len(order), batch_size):
                yield order[start : start + batch_size]


def check_context(adapter: Adapter, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse a prompt after which the model cannot say a single token, and warn of answers that will be cut."""
    limit, longest = adapter.context_length, max(range(len(ids)), key=lambda i: len(ids[i]), default=None)
    if limit is not None and longest is not None and len(ids[longest]) >= limit:
        raise OptionError(
            f"Prompt {longest + 1} is {len(ids[longest])} tokens long when rendered; this model's context holds "
            f"{limit}, the answer included. Shorten it."
        )
    if limit is not None and longest is not None and len(ids[longest]) + max_new_tokens > limit:
        warnings.warn(
            f"This model's context holds {limit} tokens, and prompt {longest + 1} has {len(ids[longest])} of them: its "
            f"answer ends there, and may be shorter than max_new_tokens={max_new_tokens}.",
            TrimtabWarning,
            stacklevel=3,
        )


def _doses(
    knobs: AnySetting | Sequence[AnySetting] | None, count: int, rack: Rack | None, where: Where | None
) -> list[dict[AnyKnob, float]]:
    """Look up every prompt's knobs, and move them to `where`; a knob in several rows stays one knob."""
    moved: dict[AnyKnob, AnyKnob] = {}
    doses: list[dict[AnyKnob, float]] = []
    for setting in settings_per_prompt(knobs, count):
        dose: dict[AnyKnob, float] = {}
        for key, strength in setting.items():
            if isinstance(key, AnyKnob):
                found = {key: check_strength(strength, f"strength of {key.name!r}")}
            elif not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptionError(f"Knobs are set by their names, or themselves; got {brief(key)}.")
            elif rack is not None:
                found = rack.resolve({key: strength})
            else:
                raise OptionError(f"Knob {key!r} is set by name, and there is no rack. Pass rack=Rack({key}=...).")
            for knob, number in found.items():
                if where is not None and not isinstance(knob, DeltaKnob):
                    knob = moved.setdefault(knob, knob.with_(where=where))
                dose[knob] = dose.get(knob, 0.0) + number
        doses.append(dose)
    return doses


def _decoding(max_new_tokens: int, temperature: float, top_p: float, ends: list[int], pad_id: int) -> GenerationConfig:
    config = GenerationConfig(max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad_id)
    config.eos_token_id = ends or None
    if temperature > 0:
        config.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    return config


def _view(model: nn.Module, decoding: GenerationConfig) -> PreTrainedModel:
    """Return a copy of the model's shell with decoding settings of its own; its modules and weights are the model's.

    Settings passed to `generate` would be mixed with the model's preferences. What wraps a model (PEFT,
    `torch.compile`) generates with the settings of the model inside, which gets a view as well.
    """
    view = copy.copy(model)
    if not isinstance(model, GenerationMixin):
        inside = {name: _view(m, decoding) if hasattr(m, "generate") else m for name, m in model.named_children()}
        view.__dict__["_modules"] = {**model.__dict__["_modules"], **inside}
    view.generation_config = decoding  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return cast("PreTrainedModel", view)


class _Stream(BaseStreamer):
    """Hands on the text of one answer as soon as its characters are complete."""

    def __init__(self, renderer: Renderer, ends: list[int], on_text: Callable[[str], None]) -> None:
        self._pieces, self._ends, self._on_text = Pieces(renderer.decode), ends, on_text
        self._answering = False  # the prompt comes first

    def put(self, value: Tensor) -> None:
        if self._answering:
            self._say(self._pieces.add([token for token in value.flatten().tolist() if token not in self._ends]))
        self._answering = True

    def end(self) -> None:
        self._say(self._pieces.end())

    def _say(self, text: str) -> None:
        if text:
            self._on_text(text)
