"""Answer prompts with knobs turned, each prompt with a setting of its own if it brings one.

Prompts are arguments, or lines of --input or of stdin. A line that starts with { is JSON: `prompt` (text, or a list of
messages with role and content) and, optionally, `knobs` (a setting for this prompt); any other line is the prompt.
--json prints a line per prompt with `prompt`, `text` and `knobs`.
"""

from __future__ import annotations

import difflib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from trimtab.cli import options
from trimtab.cli.options import given, input_file, text_lines, unicode_text
from trimtab.cli.sources import check_knobs, load_knobs, open_model, open_vllm, setting_from, warn_outside
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError, PairsError, UnknownName, brief
from trimtab.files import parse_json
from trimtab.records import read_messages
from trimtab.types import check_strength, parse_setting

if TYPE_CHECKING:
    from trimtab.artifact import Rack
    from trimtab.generate import Generation
    from trimtab.render import Loaded

GENERATE = ("max_new_tokens", "temperature", "top_p", "batch_size", "thinking")
"""Options that go to `trimtab.generate` under their own names."""

ROUNDS = 4
"""Batches that are answered before results are printed; prompts of similar length share a batch."""

IN_FLIGHT = 4096
"""Prompts that vLLM is given at once."""

OPTIONS_OF_A_RUN = frozenset("strength knob panel temperature top_p max_new_tokens".split())
"""Fields of a prompt's line that say what the user wanted and no data set has; others are ignored."""

Turns = list[dict[str, str]]


class Request(NamedTuple):
    """A prompt, with the setting that it brings (None: the common one) and the place it comes from."""

    prompt: str | Turns
    setting: dict[str, float] | None
    place: str


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    options.add_model(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what the user says")
    parser.add_argument("--input", metavar="FILE", help="prompts, one per line, as text or as JSON objects; - is stdin")
    options.add_knobs(parser)
    options.add_decoding(parser)
    parser.add_argument("--batch-size", type=int, metavar="N", help="prompts answered at once (default 64)")
    options.add_engine(parser, ("transformers", "vllm"))


def run(args: Namespace, terminal: Terminal) -> None:
    """Answer every prompt, in order; results are printed as they come."""
    requests = read_requests(args)
    if args.batch_size is not None and args.batch_size < 1:
        raise OptionError(f"--batch-size is 1 or more; got {args.batch_size}.")
    if args.engine == "transformers" and args.engine_option:
        raise OptionError("--engine-option is for --engine vllm.")
    with terminal.working("Preparing"):
        panel = load_knobs(args.knob, args.where)
    common = setting_from(args, panel)
    settings = [_checked(request, common, panel.rack) for request in requests]
    if args.engine == "vllm":
        _answer_in_vllm(args, terminal, panel.rack, requests, settings)
        return
    with open_model(args, terminal) as loaded:
        check_knobs(panel.rack, loaded, strict=not args.no_strict)
        for setting in settings:
            warn_outside(panel.rack, setting)
        if len(requests) == 1 and not terminal.json:
            _stream(args, terminal, loaded, panel.rack, requests[0].prompt, settings[0])
        else:
            _answer(args, terminal, loaded, panel.rack, requests, settings)


def _stream(
    args: Namespace, terminal: Terminal, loaded: Loaded, rack: Rack, prompt: str | Turns, setting: dict[str, float]
) -> None:
    """Print one answer while it is made."""
    from trimtab.generate import generate

    options = given(args, *GENERATE)
    options |= {"seed": args.seed, "strict": None, "on_text": terminal.stream}
    generate(*loaded, [prompt], rack=rack, knobs=setting, **options)
    terminal.stream("\n")


def _answer(
    args: Namespace,
    terminal: Terminal,
    loaded: Loaded,
    rack: Rack,
    requests: list[Request],
    settings: list[dict[str, float]],
) -> None:
    from trimtab.generate import generate

    size = ROUNDS * (args.batch_size or 64)
    with terminal.working("Generating", counted=True, printing=True) as progress:
        for start in range(0, len(requests), size):
            part = slice(start, start + size)
            prompts = [request.prompt for request in requests[part]]
            seed, options = args.seed + start, given(args, *GENERATE)
            made = generate(*loaded, prompts, rack=rack, knobs=settings[part], seed=seed, strict=None, **options)
            _print(terminal, prompts, made)
            progress(start + len(prompts), len(requests))


def _answer_in_vllm(
    args: Namespace, terminal: Terminal, rack: Rack, requests: list[Request], settings: list[dict[str, float]]
) -> None:
    for name in ("batch_size", "thinking", "device"):
        if getattr(args, name) is not None:
            raise OptionError(f"--{name.replace('_', '-')} is not for --engine vllm, which has options of its own.")
    for setting in settings:
        warn_outside(rack, setting)
    with open_vllm(args, terminal, rack) as engine, terminal.working("Generating", counted=True, printing=True) as tell:
        options = given(args, "max_new_tokens", "temperature", "top_p")
        for start in range(0, len(requests), IN_FLIGHT):
            part = slice(start, start + IN_FLIGHT)
            prompts = [request.prompt for request in requests[part]]
            made = engine.generate(prompts, knobs=settings[part], seed=args.seed + start, **options)
            _print(terminal, prompts, made)
            tell(start + len(prompts), len(requests))


def _print(terminal: Terminal, prompts: Sequence[str | Turns], made: Sequence[Generation]) -> None:
    for prompt, answer in zip(prompts, made, strict=True):
        record = {"prompt": prompt, "text": answer.text, "knobs": dict(answer.knobs)}
        terminal.result(record, f"> {_shown(prompt)}\n{answer.text}\n")


def _shown(prompt: str | Turns) -> str:
    return (prompt if isinstance(prompt, str) else prompt[-1]["content"]).replace("\n", "\n> ")


def _checked(request: Request, common: dict[str, float], rack: Rack) -> dict[str, float]:
    """Return a prompt's setting, after a look at its names."""
    if request.setting is None:
        return common
    try:
        rack.resolve(request.setting)
    except UnknownName as error:
        raise UnknownName(f"{request.place}: {error}") from None
    return request.setting


# Prompts


def read_requests(args: Namespace) -> list[Request]:
    """Return the prompts of the arguments, of --input or of stdin, each with its setting and its place."""
    if args.prompts and args.input is not None:
        raise OptionError("Pass prompts as arguments or with --input, not both.")
    if args.prompts:
        numbered = enumerate(cast(list[str], args.prompts), 1)
        return [Request(unicode_text(text, f"Prompt {n}"), None, f"Prompt {n}") for n, text in numbered]
    if args.input is None and sys.stdin.isatty():
        raise OptionError("There is no prompt. Pass one as an argument, a file with --input, or lines on stdin.")
    return read_lines("-" if args.input is None else args.input)


def read_lines(source: str) -> list[Request]:
    """Return the prompts that stand in a file, or on stdin where it is called `-`; none is an error."""
    name = "stdin" if source == "-" else source
    if source == "-":
        found = list(_read(sys.stdin, name))
    else:
        with input_file(source, "a text or JSONL file of prompts").open(encoding="utf-8-sig") as file:
            found = list(_read(file, name))
    if not found:
        raise OptionError(f"There is no prompt: {name} holds no line with text. Pass one as an argument or in a file.")
    return found


def _read(lines: Iterable[str], source: str) -> Iterator[Request]:
    for number, line in enumerate(text_lines(lines, source), 1):
        text, place = line.strip(), f"{source}, line {number}"
        if text.startswith("{") or (text and source.endswith(".jsonl")):
            yield _record(text, place)
        elif text:
            yield Request(unicode_text(text, place), None, place)


def _record(text: str, place: str) -> Request:
    try:
        record: object = parse_json(text)
    except ValueError as error:
        raise OptionError(
            f"{place} is not JSON: {error}. A prompt that starts with {{ is written "
            '{"prompt": "..."}, so that it is not read as a record.'
        ) from None
    fields = cast(Mapping[str, object], record) if isinstance(record, Mapping) else {}
    if "prompt" not in fields:
        raise OptionError(f"{place} has no prompt; it has {', '.join(fields) or 'no fields'}.")
    near = difflib.get_close_matches("knobs", [key for key in fields if key != "knobs"], n=1, cutoff=0.8)
    if near and "knobs" not in fields:
        raise OptionError(f"{place} has a field {near[0]!r}; the setting of a prompt is called 'knobs'.")
    ignored = sorted(fields.keys() & OPTIONS_OF_A_RUN)
    if ignored:
        raise OptionError(
            f"{place} has a field {ignored[0]!r}, which a line cannot set. A prompt brings `knobs`, as in "
            '{"prompt": "...", "knobs": {"math": 0.8}}; everything else is an option of the command.'
        )
    setting = fields.get("knobs")
    return Request(
        _prompt(fields["prompt"], place), None if setting is None else _setting(setting, f"{place}, knobs"), place
    )


def _prompt(value: object, place: str) -> str | Turns:
    if isinstance(value, str):
        return unicode_text(value, place)
    try:
        turns = read_messages(value, place)
    except PairsError as error:
        raise OptionError(str(error)) from None
    if not turns:
        raise OptionError(f"{place}: a prompt is text or a list of messages; got {brief(value)}.")
    return [{"role": turn.role, "content": unicode_text(turn.content, place)} for turn in turns]


def _setting(value: object, place: str) -> dict[str, float]:
    """Read a setting in its text form or as a JSON object."""
    try:
        if isinstance(value, str):
            return parse_setting(value)
        if isinstance(value, Mapping):
            entries = cast(Mapping[str, Any], value).items()
            return {name: check_strength(number, f"strength of {name!r}") for name, number in entries}
    except OptionError as error:
        raise OptionError(f"{place}: {error}") from None
    raise OptionError(f'{place}: a setting is written {{"math": 0.8}} or "math=0.8"; got {value!r}.')
