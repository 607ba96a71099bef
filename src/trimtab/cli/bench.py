"""Measure a running server under load: requests with mixed knobs, throughput, latencies and errors.

`trimtab bench serve URL` asks any OpenAI-compatible server. --concurrency keeps so many requests under way; with --rate
they come at random moments whether or not the server keeps up. Prompts are made up unless --input has some, whose lines
may bring a setting of their own, as for trimtab generate. The API key is read from the environment variable
TRIMTAB_API_KEY. The status is 1 where a request failed; what a full server asked to come back for is no failure.
"""

from __future__ import annotations

import asyncio
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from trimtab.cli.generate import read_lines
from trimtab.cli.options import given
from trimtab.cli.tables import columns, counted, facts
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError
from trimtab.types import format_setting, parse_setting

if TYPE_CHECKING:
    from trimtab.serve.figures import Figures, Spread
    from trimtab.serve.load import Load, Prompt

LOAD = (
    "requests",
    "concurrency",
    "rate",
    "deal",
    "endpoint",
    "model",
    "max_new_tokens",
    "temperature",
    "disconnect",
    "warmup",
    "timeout",
    "seed",
)
"""Options that go to `trimtab.serve.load.Load` under their own names."""
MADE_UP = 256
"""Prompts that are made up; more requests repeat them, in the same order."""
FAILED = 1


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("what", metavar="serve", choices=("serve",), help="what is measured: a server")
    parser.add_argument("url", metavar="URL", help="of the server, as in http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, metavar="N", help="that are counted (default 100)")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=int, metavar="N", help="requests under way at any time (default 8)")
    pace.add_argument("--rate", type=float, metavar="R", help="requests per second, at random moments, instead")
    parser.add_argument("--warmup", type=int, metavar="N", help="requests before, which are not counted (default 4)")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds for a request in all (default 120)")
    parser.add_argument("--disconnect", type=float, metavar="SHARE", help="of answers to leave before their end")
    parser.add_argument("--seed", type=int, metavar="N", help="of everything that is random here (default 0)")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--endpoint", metavar="NAME", help="chat or completions (default chat)")
    asked.add_argument("--model", metavar="NAME", help="as the server calls it (default: the first that it lists)")
    prompts = asked.add_mutually_exclusive_group()
    prompts.add_argument("--input", metavar="FILE", help="prompts, one per line, as text or as JSON objects")
    prompts.add_argument(
        "--words", type=int, metavar="N", help="make up prompts of so many plain words (default: PrefWorld's questions)"
    )
    asked.add_argument(
        "--set",
        action="append",
        metavar="SETTING",
        help='strengths of knobs, as in math=0.8,concise=-1; "" turns none; may be repeated, for requests to share out',
    )
    asked.add_argument("--deal", metavar="HOW", help="settings in turn or at random: turn, random (default turn)")
    asked.add_argument("--max-new-tokens", type=int, metavar="N", help="cut answers there (default 64)")
    asked.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default 0.0)")


def run(args: Namespace, terminal: Terminal) -> int:
    """Send the load and print what it came to; the status is 1 where a request failed."""
    with terminal.working("Preparing"):
        from trimtab.serve.load import Load, measure

    settings = [parse_setting(text) for text in args.set or ()]
    load = Load(url=args.url, prompts=_prompts(args), settings=settings, **given(args, *LOAD))
    with terminal.working(f"Asking {args.url}", counted=True) as progress:
        figures = asyncio.run(measure(load, progress=progress))
    record = {"load": _spec(load), **asdict(figures)}
    terminal.result(record, _text(load, figures))
    return FAILED if figures.errors else 0


def _prompts(args: Namespace) -> list[Prompt]:
    from trimtab.serve.load import Prompt, made_up

    if args.input is not None:
        return [Prompt(request.prompt, request.setting) for request in read_lines(args.input)]
    if args.words is not None and args.words < 1:
        raise OptionError(f"--words is 1 or more; got {args.words}.")
    return made_up(MADE_UP, seed=args.seed or 0, words=args.words)


def _spec(load: Load) -> dict[str, object]:
    """Return what was asked for, prompts as their number."""
    names = ("url", *LOAD)
    pace = "concurrency" if load.rate is not None else "rate"
    spec = {name: getattr(load, name) for name in names if name != pace}
    settings = [format_setting(setting) for setting in load.settings]
    return {**spec, "settings": settings, "prompts": len(load.prompts)}


def _text(load: Load, figures: Figures) -> str:
    pace = f"{load.concurrency} at a time" if load.rate is None else f"{load.rate:g} per second"
    settings = f"{counted(len(load.settings), 'setting')} of knobs" if load.settings else "no setting of knobs"
    head = f"{load.url}, {figures.model}: {counted(figures.requests, 'request')}, {pace}, {settings}"
    sources = {"usage": "as the server counts them", "pieces": "pieces of text, of a server that counts none"}
    source = sources.get(figures.tokens_from or "", "in part pieces of text")
    summary = facts(
        {
            "answered": figures.answered,
            "left": figures.disconnected if load.disconnect else None,
            "failed": sum(failure.count for failure in figures.errors.values()),
            "retries": f"{figures.retries} after 429" if figures.retries else None,
            "seconds": f"{figures.seconds:.2f}",
            "requests/s": f"{figures.requests_per_second:.2f}",
            "tokens/s": f"{figures.tokens_per_second:.1f} ({figures.tokens} tokens, {source})",
        }
    )
    parts = [head, summary]
    spreads = {
        "time to first token": figures.time_to_first_token,
        "inter-token latency": figures.inter_token_latency,
        "end-to-end latency": figures.end_to_end_latency,
    }
    rows = [[name, *_milliseconds(found)] for name, found in spreads.items() if found is not None]
    if rows:
        parts.append(columns(["milliseconds", "median", "p90", "p99"], rows))
    if figures.errors:
        errors = [[kind, failure.count, failure.first] for kind, failure in figures.errors.items()]
        parts.append(columns(["error", "requests", "what the first was told"], errors))
    return "\n\n".join(parts)


def _milliseconds(spread: Spread) -> list[str]:
    return [f"{1000 * seconds:.1f}" for seconds in (spread.median, spread.p90, spread.p99)]
