"""What answers look like: OpenAI's forms, with the strengths as applied, and projections where they were asked for."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

Finish = Literal["stop", "length"]


class Reply(BaseModel):
    """A part of an answer; fields with a default are left out where nothing was set."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def reply(content: Reply) -> Response:
    """Return an answer as a response."""
    return Response(written(content), media_type="application/json")


def written(content: Reply) -> str:
    """Write an answer as JSON; numbers that are not finite are null."""
    return content.model_dump_json(exclude_unset=True)


class Usage(Reply):
    """Counts of tokens; a prompt with several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Projections(Reply):
    """How far the stream lay along the knobs' directions when each token was predicted."""

    tokens: list[str]
    """What each token brought to the text."""
    knobs: dict[str, list[float | None]]
    """By knob, one number per token: the component in multiples of the mean residual norm at the knob's layer."""


class Likely(Reply):
    """A token with its log-probability; `bytes` is null for a token that is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class LikelyToken(Likely):
    """A token of an answer, and the likeliest ones in its place."""

    top_logprobs: list[Likely]


class ChatLogprobs(Reply):
    """Log-probabilities of an answer's tokens."""

    content: list[LikelyToken]


class TextLogprobs(Reply):
    """Log-probabilities of an answer's tokens, in the older form."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AnswerMessage(Reply):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    projections: Projections | None = None


class TextChoice(Reply):
    """One answer, or a piece of one, which ends with a reason."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish | None
    projections: Projections | None = None


class Delta(Reply):
    """A piece of the assistant's turn."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Reply):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    projections: Projections | None = None


class Head(Reply):
    """What all answers begin with."""

    id: str
    created: int
    model: str
    knobs: dict[str, float]
    """The strengths as applied."""


class ChatCompletion(Head):
    """The answer to `POST /v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Head):
    """An event of a streamed chat completion."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextCompletion(Head):
    """The answer to `POST /v1/completions`, or an event of it."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelEntry(Reply):
    """A name that requests may ask for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["trimtab"]
    max_model_len: int
    panel: str | None


class ModelList(Reply):
    """The answer to `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelEntry]


class KnobEntry(Reply):
    """What a client needs to know of a knob in order to turn it."""

    id: str
    object: Literal["knob"]
    kind: str
    method: str
    where: str
    layer: int | None
    layers: list[int] | None
    gain: float
    safe_range: tuple[float, float] | None
    projects: bool
    """Whether there is a direction to project on."""


class KnobList(Reply):
    """The answer to `GET /v1/knobs`."""

    object: Literal["list"]
    dose: Literal["strict", "clamp", "free"]
    data: list[KnobEntry]


class DoseResponse(Reply):
    """What tuning measured, lowest strength first; all but `kl` are shares from 0 to 1, null where not measured."""

    strengths: list[float]
    score: list[float | None]
    guardrails: dict[str, list[float | None]]
    broken: list[float | None]
    kl: list[float | None]


class KnobCard(KnobEntry):
    """The answer to `GET /v1/knobs/{id}`."""

    card: str
    dose_response: DoseResponse | None


class Put(KnobCard):
    """The answer to `PUT /v1/knobs/{id}`: the knob, and whether another had the name."""

    replaced: bool


class Deleted(Reply):
    """The answer to `DELETE /v1/knobs/{id}`."""

    id: str
    object: Literal["knob"]
    deleted: Literal[True]


class PanelEntry(Reply):
    """A panel's setting."""

    id: str
    object: Literal["panel"]
    knobs: dict[str, float]


class PanelList(Reply):
    """The answer to `GET /v1/panels`."""

    object: Literal["list"]
    data: list[PanelEntry]


class Health(Reply):
    """The answer to `GET /health`."""

    status: Literal["ok"]
