"""Chat template to token ids, response spans and read positions.

Text is rendered once and tokenised so that the ids of a prompt are always a prefix of the ids of prompt and answer:
what is learned, evaluated and generated agrees token for token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from jinja2 import TemplateError

from trimtab.errors import OptionError, RenderError, brief
from trimtab.ops import Batch, Side, pad_rows
from trimtab.types import Markers, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek-R1 and many after them
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # GPT-OSS
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
)
"""What opens and closes the thoughts of models that think before they answer."""


class Rendered(NamedTuple):
    """Token ids, and the half-open span of the response in them, without the tokens that close the turn."""

    ids: list[int]
    response_start: int
    response_end: int


class _Around(NamedTuple):
    strips: bool  # the template trims answers
    gap: str  # white space it puts before one
    closing: str  # what it puts after one


class Renderer:
    """Turns messages into token ids by the tokenizer's chat template, or by plain concatenation where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not hasattr(tokenizer, "apply_chat_template"):
            raise RenderError(
                f"A tokenizer is one of transformers', such as trimtab.load(...).tokenizer; got {brief(tokenizer)}."
            )
        self.tokenizer = tokenizer
        self._token_texts: dict[int, str] = {}
        self._latest: tuple[tuple[Message, ...], str, list[int]] | None = None

    @property
    def has_template(self) -> bool:
        """True when the tokenizer brings a chat template."""
        return self.tokenizer.chat_template is not None

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the conversation so far, up to where the assistant starts to answer."""
        return self._prompt(messages)[1]

    def full(self, messages: Sequence[Message], response: str) -> Rendered:
        """Render the conversation with `response` as the assistant's turn, closing tokens included.

        Without a template there are no closing tokens, and the response follows the prompt without a separator.
        """
        head, ids = self._prompt(messages)
        start = len(ids)
        around = self._around_answer
        shown = around.gap + (response.strip() if around.strips else response)
        ids = self._extend(ids, head, shown)
        end = len(ids)
        if end == start:
            raise RenderError(f"The response {response!r} has no tokens.")
        return Rendered(self._extend(ids, head + shown, around.closing), start, end)

    def plain(self, text: str) -> Rendered:
        """Render text that stands by itself, as no turn of anybody: the response, after what the tokenizer opens with.

        Without an opening (BOS) the response starts at token 0, which nothing predicts.
        """
        ids = [*self._opening, *self._plain(text)]
        return Rendered(ids, len(self._opening), len(ids))

    def response_length(self, messages: Sequence[Message], response: str) -> int:
        """Count the tokens of `response` after its prompt, without those that close the turn."""
        rendered = self.full(messages, response)
        return rendered.response_end - rendered.response_start

    def as_user(self, response: str) -> Rendered:
        """Render `response` in the user's slot, generation prompt included: the reading of PaLRS (arXiv:2509.23982)."""
        tail = self.post_instruction_count()
        ids = self.prompt_ids([Message("user", response)])
        end = len(ids) - tail
        start = min(_common(ids, other) for other in self._slot_samples)
        if end <= start:
            raise RenderError(f"The response {response!r} has no tokens.")
        return Rendered(ids, start, end)

    def demonstrated(self, messages: Sequence[Message], response: str, question: str) -> list[int]:
        """Return the ids of one turn that shows `response`, then a fresh question, generation prompt included."""
        self._need_template("demonstrated")
        shown = [*messages, Message("assistant", response), Message("user", question)]
        return self.prompt_ids(shown)

    def post_instruction_count(self) -> int:
        """Count the template's tokens after the user's slot, generation prompt included."""
        self._need_template("post_instruction")
        first, *others = self._slot_samples
        return min(_common(first[::-1], other[::-1]) for other in others)

    def closing_count(self) -> int:
        """Count the template's tokens after the assistant's answer; 0 without a template."""
        rendered = self.full([Message("user", "a")], "a")
        return len(rendered.ids) - rendered.response_end

    def template_hash(self) -> str | None:
        """Return the sha256 of the chat template; None without one."""
        template: object = self.tokenizer.chat_template
        if template is None:
            return None
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def tokenizer_hash(self) -> str:
        """Return the sha256 of the vocabulary."""
        vocabulary: Mapping[str, int] = self.tokenizer.get_vocab()
        return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """Return the text that a token stands for inside an answer, special tokens by their names.

        A token that is a part of a character has a replacement character in its text.
        """
        if token not in self._token_texts:
            # Decoders of SentencePiece's kind drop the space that a text begins with, hence a letter before it.
            before = self._plain("a")
            start, whole = (str(self.tokenizer.decode(ids)) for ids in (before, [*before, token]))
            self._token_texts[token] = whole.removeprefix(start)
        return self._token_texts[token]

    def pad(self, rows: Sequence[Sequence[int]], *, side: Side = "left") -> Batch:
        """Stack rows of ids `[B, T]`, padded on one side."""
        if side not in ("left", "right"):
            raise OptionError(f"The padding side is 'left' or 'right'; got {side!r}.")
        if not rows or not all(rows):
            raise RenderError("A batch needs at least one row, and every row at least one token.")
        return pad_rows(rows, side=side, value=self.pad_id)

    @property
    def pad_id(self) -> int:
        """The id put where the mask is 0; any id would do, and 0 does where the tokenizer names none."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if isinstance(pad, int) else eos if isinstance(eos, int) else 0

    # Text

    def _prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """Return the text and the ids of a prompt; the latest is kept, since a pair renders its own twice."""
        turns = tuple(messages)
        if self._latest is None or self._latest[0] != turns:
            text = self._prompt_text(turns)
            ids = self._encode(text)
            if not ids:
                raise RenderError(f"The prompt has no tokens; its turns are {_roles(turns)}.")
            self._latest = turns, text, ids
        return self._latest[1], list(self._latest[2])

    def _prompt_text(self, messages: Sequence[Message]) -> str:
        if not messages:
            raise RenderError("There is no message to render.")
        if self.has_template:
            return self._apply(messages, generation_prompt=True)
        return "\n".join(message.content for message in messages)

    def _apply(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = str(
                self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
            )
        except (TemplateError, ValueError) as error:
            raise RenderError(f"The chat template refuses the turns {_roles(messages)}: {error}. {_ADVICE}") from None
        lost = [m for m in messages if m.role != "assistant" and m.content.strip() not in text]
        if lost:
            raise RenderError(f"The chat template drops the {lost[0].role} turn of {_roles(messages)}. {_ADVICE}")
        return text

    @cached_property
    def _around_answer(self) -> _Around:
        # A sentinel in the answer's place shows what the template does to an answer and puts around it.
        if not self.has_template:
            return _Around(False, "", "")
        asked = [Message("user", "a")]
        text = self._apply([*asked, Message("assistant", f"  {_SENTINEL}  ")], generation_prompt=False)
        before, found, closing = text.rpartition(_SENTINEL)
        if not found:
            raise RenderError("The chat template does not show the assistant's answer, so answers cannot be rendered.")
        strips = not closing.startswith("  ")
        prompt = self._apply(asked, generation_prompt=True)
        # A space between prompt and answer is the answer's first; anything else there (an empty block of thought) is
        # not what a model is asked to continue, and left out.
        gap = before[len(prompt) :] if before.startswith(prompt) else ""
        gap = gap if strips else gap[:-2]
        return _Around(strips, "" if gap.strip() else gap, closing if strips else closing[2:])

    @cached_property
    def _slot_samples(self) -> list[list[int]]:
        # Contents that end in different ways: whatever follows all of them alike is the template's.
        return [self.prompt_ids([Message("user", text)]) for text in ("a", "Is it 7?", "b c.", "(x)", "\u00e9 9")]

    def _need_template(self, what: str) -> None:
        if not self.has_template:
            raise RenderError(
                f"{what} needs a chat template, and this tokenizer has none. "
                "Use format='question_response' with position 'last' or 'response_mean'."
            )

    def thinking(self, markers: tuple[str, str] | None = None) -> Markers | None:
        """Return the ids that open and those that close a model's thoughts; None where the tokenizer knows none.

        `markers` replaces the known ones of `THINKING`. A marker must begin and end with an added token, or the text
        beside it could melt into its ids: `RenderError` otherwise.
        """
        if markers is not None and [type(text) for text in cast(Any, _sequence(markers))] != [str, str]:
            raise RenderError(
                f"Thinking markers are two texts, what opens thoughts and what closes them; got {markers!r}."
            )
        added = set(cast(Any, self.tokenizer).get_added_vocab().values())
        for pair in THINKING if markers is None else (markers,):
            ids = [self._plain(marker) for marker in pair]
            if all(found and found[0] in added and found[-1] in added for found in ids):
                return ids[0], ids[1]
        if markers is not None:
            raise RenderError(f"Thinking markers begin and end with added tokens of the tokenizer; got {markers!r}.")
        return None

    # Ids

    def _encode(self, text: str) -> list[int]:
        ids = self._plain(text)
        return ids if self.has_template else self._opening + ids

    def _plain(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    @cached_property
    def _opening(self) -> list[int]:
        # What the tokenizer puts before a text (BOS); what it may put after one (EOS) would end the prompt.
        body = self._plain("a")
        whole = [int(i) for i in self.tokenizer.encode("a", add_special_tokens=True)]
        starts = [i for i in range(len(whole) - len(body) + 1) if whole[i : i + len(body)] == body]
        return whole[: starts[0]] if starts else []

    def _extend(self, ids: list[int], text: str, more: str) -> list[int]:
        if not more:
            return ids
        # Tokenised together where that leaves `ids` alone, so that word pieces at the seam are the usual ones.
        joint = self._encode(text + more)
        return joint if joint[: len(ids)] == ids else ids + self._inside(more)

    def _inside(self, text: str) -> list[int]:
        # Tokenizers of SentencePiece's kind put a space before whatever they are given; inside a text there is none.
        before, joint = self._plain("\n"), self._plain("\n" + text)
        return joint[len(before) :] if joint[: len(before)] == before else self._plain(text)


_SENTINEL = "TrimtabSentinel7"
_ADVICE = "Change the turns, e.g. put a system line into the user's turn, or use a tokenizer with another template."


def _sequence(value: object) -> Sequence[object]:
    return cast(Sequence[object], value) if isinstance(value, list | tuple) else ()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message.role for message in messages)
