"""A load for any OpenAI-compatible server: many requests with mixed knobs, so many at once or so many per second."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.parse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from trimtab.errors import MissingDependency, OptionError, TrimtabWarning, brief, unknown_name
from trimtab.prefworld.families import FAMILIES
from trimtab.prefworld.items import Draw
from trimtab.prefworld.words import OBJECTS, SORTABLE
from trimtab.serve.asking import ask, message, start_of
from trimtab.serve.figures import Figures, Outcome, figures
from trimtab.serve.keys import USER_VARIABLE
from trimtab.types import Setting, check_seed

if TYPE_CHECKING:
    from httpx import AsyncClient

INSTALL = 'Measuring a server needs httpx. Install it with: pip install "trimtab[serve]"'
STAY = 8
"""Pieces of text within which those who leave have left."""
EXAMPLE = "http://127.0.0.1:8000"

Deal = Literal["turn", "random"]
Endpoint = Literal["chat", "completions"]
Progress = Callable[[int, int], None]
PATHS: dict[Endpoint, str] = {"chat": "/chat/completions", "completions": "/completions"}


class Prompt(NamedTuple):
    """What is asked, as text or as messages, and the setting of knobs that it brings; None for one that is dealt."""

    content: str | Sequence[dict[str, str]]
    setting: Setting | None = None


@dataclass(frozen=True, kw_only=True)
class Load:
    """`requests` to the server at `url`, with `prompts` in turn.

    Without a `rate`, `concurrency` of them are under way at any time: as one is answered, the next is sent (a closed
    loop). With a rate they come at random moments, so many per second on average (Poisson), however many are under way:
    a server that is too slow shows as growing latency, where a closed loop would only ask less.

    Each request has one of `settings` of knobs, dealt in turn or at random; an empty one, and no settings, leave the
    field out, which any server understands. `disconnect` is the share of requests whose connection is closed before the
    first piece of the answer or after a few; answers that end sooner are whole. `warmup` requests go first and are not
    counted. `timeout` is for one request, waits after 429 included. `model` None is the first that the server lists.
    The API key is read from the environment variable TRIMTAB_API_KEY. One `seed` decides all that is random here.
    """

    url: str
    prompts: Sequence[Prompt]
    requests: int = 100
    concurrency: int = 8
    rate: float | None = None
    settings: Sequence[Setting] = ()
    deal: Deal = "turn"
    endpoint: Endpoint = "chat"
    model: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    disconnect: float = 0.0
    warmup: int = 4
    timeout: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_url(self.url)
        check_seed(self.seed)
        for name, value, low in (
            ("requests", self.requests, 1),
            ("concurrency", self.concurrency, 1),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("warmup", self.warmup, 0),
        ):
            if value < low:
                raise OptionError(f"{name} is {low} or more; got {value}.")
        for name, number in (("rate", self.rate), ("timeout", self.timeout)):
            if number is not None and not 0 < number < float("inf"):
                raise OptionError(f"{name} is above 0; got {number:g}.")
        if not 0 <= self.disconnect <= 1:
            raise OptionError(f"disconnect is a share from 0 to 1; got {self.disconnect:g}.")
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature is 0 or more; got {self.temperature:g}.")
        if self.endpoint not in PATHS:
            raise unknown_name("endpoint", self.endpoint, PATHS)
        if self.deal not in get_args(Deal):
            raise unknown_name("way to deal", self.deal, get_args(Deal))
        if not self.prompts:
            raise OptionError("There is no prompt to send.")
        if self.endpoint == "completions" and any(not isinstance(prompt.content, str) for prompt in self.prompts):
            raise OptionError("Prompts of completions are text; a list of messages goes to the endpoint chat.")

    @property
    def base(self) -> str:
        """The URL with its version, which may be left out."""
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else url + "/v1"


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or half of an IPv6 address
        raise OptionError(f"A server's URL is like {EXAMPLE}; got {brief(url)}.") from None
    if not fine:
        raise OptionError(f"A server's URL is like {EXAMPLE}; got {brief(url)}.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise OptionError(f"A server's URL holds no user, password or query. A key goes into {USER_VARIABLE}.")


def made_up(count: int, *, seed: int = 0, words: int | None = None) -> list[Prompt]:
    """Return varied prompts: questions of all families of PrefWorld, or so many plain words each."""
    rng = Random(f"prompts/{seed}")
    if words is not None:
        return [Prompt(" ".join(rng.choices([*SORTABLE, *OBJECTS], k=words))) for _ in range(count)]
    families = list(FAMILIES.values())
    return [Prompt(families[number % len(families)](Draw(rng)).prompt) for number in range(count)]


async def measure(load: Load, *, progress: Progress = lambda done, total: None) -> Figures:
    """Send the requests of a load, and return what came of them.

    Raises `OptionError` where nothing of the kind answers at the URL, or no request of the warm-up is answered, and
    `MissingDependency` without httpx. Requests that fail later are counted, and do not stop the others.
    """
    if find_spec("httpx") is None:
        raise MissingDependency(INSTALL)
    import httpx

    headers = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "trimtab", **_key(load)}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # Neither proxies nor redirects: what is measured is this server, and the key goes nowhere else.
    async with httpx.AsyncClient(timeout=None, limits=limits, headers=headers, trust_env=False) as client:
        model = await _model(client, load)
        warmups, counted = planned(load, model)
        if warmups:
            _refuse_hopeless(await _send(client, load, warmups, rate=None, progress=lambda done, total: None), load)
        clock = asyncio.get_running_loop().time
        start = clock()
        outcomes = await _send(client, load, counted, rate=load.rate, progress=progress)
        return figures(model, outcomes, clock() - start)


# The plan


@dataclass(frozen=True)
class Planned:
    """A request as it will be sent: its body, when (in seconds from the start), and where its answer is cut."""

    body: bytes
    due: float
    cut: int | None


def planned(load: Load, model: str) -> tuple[list[Planned], list[Planned]]:
    """Return the requests to warm up with and those that are counted; the same load gives the same bytes."""
    settings, cuts, times = (Random(f"{what}/{load.seed}") for what in ("settings", "cuts", "times"))
    numbers = range(-load.warmup, load.requests)
    gaps = (times.expovariate(load.rate) if load.rate else 0.0 for _ in range(load.requests))
    due = [0.0] * load.warmup + list(accumulate(gaps))
    made: list[Planned] = []
    for number, when in zip(numbers, due, strict=True):
        prompt = load.prompts[number % len(load.prompts)]
        place = settings.randrange(len(load.settings) or 1) if load.deal == "random" else number
        dealt = load.settings[place % len(load.settings)] if load.settings else {}
        leaves = number >= 0 and cuts.random() < load.disconnect
        body = _body(load, model, prompt, dealt if prompt.setting is None else prompt.setting)
        made.append(Planned(body, when, cuts.randrange(STAY) if leaves else None))
    return made[: load.warmup], made[load.warmup :]


def _body(load: Load, model: str, prompt: Prompt, setting: Setting) -> bytes:
    body: dict[str, Any] = {"model": model, "max_tokens": load.max_new_tokens, "temperature": load.temperature}
    if load.endpoint == "completions":
        body["prompt"] = prompt.content
    else:
        text = isinstance(prompt.content, str)
        body["messages"] = [{"role": "user", "content": prompt.content}] if text else prompt.content
    if setting:
        body["knobs"] = dict(setting)
    return json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()


# Sending it


async def _send(
    client: AsyncClient, load: Load, requests: Sequence[Planned], *, rate: float | None, progress: Progress
) -> list[Outcome]:
    """Send requests when they are due, or without a rate as soon as one of `load.concurrency` places is free."""
    clock, outcomes = asyncio.get_running_loop().time, list[Outcome]()
    start, url, waiting = clock(), load.base + PATHS[load.endpoint], iter(requests)

    async def one(request: Planned, begun: float) -> None:
        outcomes.append(await ask(client, url, request.body, begun=begun, timeout=load.timeout, cut=request.cut))
        progress(len(outcomes), len(requests))

    async def place() -> None:
        for request in waiting:  # all places take from one iterator
            await one(request, clock())

    async with asyncio.TaskGroup() as group:
        if rate is None:
            for _ in range(min(load.concurrency, len(requests))):
                group.create_task(place())
        else:
            for request in waiting:
                await asyncio.sleep(max(0.0, start + request.due - clock()))
                group.create_task(one(request, start + request.due))
    return outcomes


def _refuse_hopeless(warmups: Sequence[Outcome], load: Load) -> None:
    """Raise `OptionError` where every request of the warm-up failed, as all others would."""
    if all(outcome.error is not None for outcome in warmups):
        first = warmups[0]
        raise OptionError(
            f"{load.url} answers none of the {len(warmups)} requests of the warm-up ({first.error}: {first.said}). "
            "Nothing else was sent."
        )


def _key(load: Load) -> dict[str, str]:
    key, parts = os.environ.get(USER_VARIABLE, "").strip(), urllib.parse.urlsplit(load.url)
    if not key:
        return {}
    if not key.isascii() or not key.isprintable():
        raise OptionError(f"{USER_VARIABLE} holds no API key: it has characters that no key has.")
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        warnings.warn(
            f"The key in {USER_VARIABLE} goes to {parts.hostname} by plain HTTP, where others can read it. Use https, "
            "or unset the variable.",
            TrimtabWarning,
            stacklevel=3,
        )
    return {"authorization": f"Bearer {key}"}


async def _model(client: AsyncClient, load: Load) -> str:
    """Return the model to ask, after a look at the server's list; raises `OptionError` where none answers with one."""
    import httpx

    url = f"{load.base}/models"
    try:
        async with asyncio.timeout(load.timeout), client.stream("GET", url) as response:
            data, status = await start_of(response), response.status_code
    except TimeoutError:
        raise OptionError(
            f"{url} says nothing for {load.timeout:g} s. Is the server still loading its model?"
        ) from None
    except httpx.TransportError as error:
        why = brief(str(error) or type(error).__name__, 200)
        raise OptionError(
            f"Nothing answers at {load.url} ({why}). Pass the URL of a running server, as in {EXAMPLE}."
        ) from None
    if status in (401, 403):
        have = "refuses the key in" if "authorization" in client.headers else "wants a key, and there is none in"
        raise OptionError(f"{url} {have} the environment variable {USER_VARIABLE} ({status}).")
    if status != 200:
        raise OptionError(
            f"{url} answers {status} ({message(client, data)}). Pass the base URL of an OpenAI-compatible server, as "
            f"in {EXAMPLE}."
        )
    try:
        body: Any = json.loads(data)
        names = [str(model["id"]) for model in body["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise OptionError(f"{url} answers with something that is no list of models: {message(client, data)}") from None
    if not names and load.model is None:
        raise OptionError(f"{url} lists no model. Name the one to ask.")
    return names[0] if load.model is None else load.model
