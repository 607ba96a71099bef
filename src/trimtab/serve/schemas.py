"""What requests may hold: OpenAI's fields that this server knows, Trimtab's own, and no others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    Tag,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from trimtab.errors import brief, unknown_name
from trimtab.prompts import COLDEST
from trimtab.render import Renderer
from trimtab.types import Message

SEEDS = 2**63


def flaw(text: str, param: str | None = None) -> PydanticCustomError:
    """Build an error whose message a client reads as it is."""
    return PydanticCustomError("said", "{text}", {"text": text, "param": param})


@dataclass(frozen=True, eq=False)  # 0 and False are two values here
class Neutral:
    """Marks a field of OpenAI's that this server cannot do: it takes null and what means nothing, and no more."""

    value: object = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return how pydantic checks the field."""
        return core_schema.with_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return how the field is documented."""
        return {"enum": [None] if self.value is None else [None, self.value]}

    def _check(self, value: object, info: ValidationInfo) -> object:
        same = value == self.value and isinstance(value, bool) == isinstance(self.value, bool)
        if value is not None and not same:
            but = "" if self.value is None else f", or at {json.dumps(self.value)}"
            raise flaw(f"This server does not do {info.field_name}; leave the field out{but}.")
        return value


Label = Annotated[str, StringConstraints(max_length=512)]
"""What a client calls something."""


class Strict(BaseModel):
    """A part of a body: fields of the types that they are said to have, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: object) -> object:
        if isinstance(data, Mapping):
            given = cast(Mapping[str, object], data)
            stranger = next((name for name in given if name not in cls.model_fields), None)
            if stranger is not None:
                known = [name for name, field in cls.model_fields.items() if not _is_neutral(field.metadata)]
                raise flaw(str(unknown_name("field", stranger[:100], known)), stranger[:100])
        return data


def _is_neutral(metadata: list[Any]) -> bool:
    return any(isinstance(mark, Neutral) for mark in metadata)


def _one_or_many(value: object) -> str | None:
    return "~one" if isinstance(value, str) else "~many" if isinstance(value, list) else None


def _kind_of_prompt(value: object) -> str | None:
    if isinstance(value, list) and value:
        first = cast(list[object], value)[0]
        return "~ids" if isinstance(first, int) else "~rows" if isinstance(first, list) else "~texts"
    return "~text" if isinstance(value, str) else None


def _kind_of_knobs(value: object) -> str | None:
    return "~text" if isinstance(value, str) else "~strengths" if isinstance(value, dict) else None


def choice(which: Any, said: str) -> Discriminator:
    """Tell the types of a field apart by the value, so that what is wrong is said of one type and not of all."""
    return Discriminator(which, custom_error_type="choice", custom_error_message=said)


Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=2**20)]
Stops = Annotated[
    Annotated[Stop, Tag("~one")] | Annotated[list[Stop], Field(max_length=4), Tag("~many")],
    choice(_one_or_many, "expected a text, or a list of texts"),
]
Strengths = Annotated[
    Annotated[dict[str, float], Field(max_length=1000), Tag("~strengths")]
    | Annotated[str, StringConstraints(max_length=2**14), Tag("~text")],
    choice(_kind_of_knobs, 'expected strengths such as {"math": 0.8}, or text such as "math=0.8"'),
]


class StreamOptions(Strict):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Neutral(False)] = None


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, data: object) -> object:
        kind = cast(Mapping[str, object], data).get("type", "text") if isinstance(data, Mapping) else "text"
        if kind != "text":
            raise flaw(f"This server does not do parts of type {brief(kind)}; it takes text.")
        return data


Content = Annotated[
    Annotated[str, Tag("~one")] | Annotated[list[TextPart], Field(min_length=1, max_length=1000), Tag("~many")],
    choice(_one_or_many, "expected a text, or a list of parts of type text"),
]


class ChatMessage(Strict):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    """Text; parts are put together with a line break between them."""
    name: Annotated[Any, Neutral()] = None
    refusal: Annotated[Any, Neutral()] = None
    audio: Annotated[Any, Neutral()] = None
    annotations: Annotated[Any, Neutral([])] = None
    tool_calls: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral()] = None

    def read(self) -> Message:
        """Return the turn as the renderer takes it; a developer's line is a system line."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class Common(Strict):
    """What both kinds of completion take."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=400)]
    """The model's name, or MODEL:PANEL for a panel's setting."""
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """1 unless set; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    """The same seed gives the same answer; the second of `n` answers takes the next seed, and so on."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    user: Label | None = None
    """Not used; nor are the three that follow, by which clients label their requests."""
    metadata: Annotated[dict[str, Annotated[str, StringConstraints(max_length=512)]], Field(max_length=16)] | None = (
        None
    )
    safety_identifier: Annotated[str, StringConstraints(max_length=512)] | None = None
    prompt_cache_key: Label | None = None
    knobs: Strengths | None = None
    """Strengths of knobs by name; knobs that are not named are off."""
    panel: Annotated[str, StringConstraints(min_length=1, max_length=400)] | None = None
    """A panel, whose strengths `knobs` overrides one by one."""
    projections: bool | None = None
    """Whether every token comes with its components along the knobs' directions."""
    logit_bias: Annotated[Any, Neutral({})] = None
    presence_penalty: Annotated[Any, Neutral(0)] = None
    frequency_penalty: Annotated[Any, Neutral(0)] = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise flaw("stream_options goes with stream: true.", "stream_options")
        return self

    @property
    def each(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def heat(self) -> float:
        """The temperature; one so low that logits divided by it would not be finite is 0, which is the same."""
        heat = 1.0 if self.temperature is None else self.temperature
        return heat if heat >= COLDEST else 0.0

    def seed_of(self, answer: int) -> int | None:
        """Return the seed of one of a prompt's answers, from 0 on."""
        return None if self.seed is None else (self.seed + answer) % SEEDS


class ChatRequest(Common):
    """The body of `POST /v1/chat/completions`."""

    PROMPT: ClassVar[str] = "messages"
    USUAL: ClassVar[int | None] = None
    """The most tokens of an answer where nothing is set, as OpenAI has it; None is as many as the context holds."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """The most tokens of an answer; without it an answer may fill the model's context."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[Any, Neutral([])] = None
    tool_choice: Annotated[Any, Neutral("none")] = None
    parallel_tool_calls: Annotated[Any, Neutral(True)] = None
    functions: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral("none")] = None
    response_format: Annotated[Any, Neutral({"type": "text"})] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    audio: Annotated[Any, Neutral()] = None
    prediction: Annotated[Any, Neutral()] = None
    reasoning_effort: Annotated[Any, Neutral("none")] = None
    verbosity: Annotated[Any, Neutral()] = None
    web_search_options: Annotated[Any, Neutral()] = None
    store: Annotated[Any, Neutral(False)] = None
    service_tier: Annotated[Any, Neutral("auto")] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise flaw("top_logprobs goes with logprobs: true.", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise flaw("max_tokens is the old name of max_completion_tokens; the two differ.", "max_tokens")
        return self

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return 1

    def rows(self, renderer: Renderer) -> list[list[int]]:
        """Return the ids of every prompt; raises `RenderError` where the chat template refuses the turns."""
        return [renderer.prompt_ids([message.read() for message in self.messages])]

    @property
    def longest(self) -> int | None:
        """The most tokens of an answer, if that was set."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens are told beside the one that was drawn; None tells of neither."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextRequest(Common):
    """The body of `POST /v1/completions`."""

    PROMPT: ClassVar[str] = "prompt"
    USUAL: ClassVar[int | None] = 16

    prompt: Annotated[
        Annotated[str, Tag("~text")]
        | Annotated[list[str], Field(min_length=1, max_length=2048), Tag("~texts")]
        | Annotated[Ids, Tag("~ids")]
        | Annotated[list[Ids], Field(min_length=1, max_length=2048), Tag("~rows")],
        choice(_kind_of_prompt, "expected a text, a list of texts, token ids, or a list of lists of token ids"),
    ]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """How many likely tokens are told beside the one that was drawn."""
    echo: Annotated[Any, Neutral(False)] = None
    suffix: Annotated[Any, Neutral("")] = None
    best_of: Annotated[Any, Neutral(1)] = None

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(self._prompts)

    @property
    def _prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            return cast(list[str | list[int]], self.prompt)
        return [cast(str | list[int], self.prompt)]

    def rows(self, renderer: Renderer) -> list[list[int]]:
        """Return the ids of every prompt; a text begins as the tokenizer begins a text."""
        return [renderer.plain(given).ids if isinstance(given, str) else given for given in self._prompts]

    @property
    def longest(self) -> int | None:
        """The most tokens of an answer, if that was set."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens are told beside the one that was drawn; None tells of neither."""
        return self.logprobs
