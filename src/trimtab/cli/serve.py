"""Serve a model over HTTP as OpenAI's interface does, with knobs per request, and a playground for the browser.

A request turns knobs by a field of its body, as in "knobs": {"math": 0.8, "concise": -1}, or "knobs": "math=0.8"; knobs
that it does not name are off. A panel is asked for by "panel": "NAME", or as the model MODEL:NAME. GET /v1/knobs lists
the knobs, and / is the playground. With --engine vllm vLLM's own server answers (no panels, no playground), and
NAME=VALUE of --engine-option are its options, as in --engine-option max_model_len=4096.
"""

from __future__ import annotations

import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.cli import options
from trimtab.cli.offer import Offer, load_offer
from trimtab.cli.sources import load_knobs, named_file, open_model, vllm_options
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError, TrimtabError, TrimtabWarning

if TYPE_CHECKING:
    from trimtab.engines.admission import Admission

OWN: dict[str, tuple[str, ...]] = {
    "vllm": ("layers", "allow_loading", "engine_option"),
    "transformers": (
        "device",
        "requests",
        "queue",
        "cache_tokens",
        "timeout",
        "keys",
        "admin_keys",
        "open",
        "rate",
        "concurrency",
        "allow_host",
        "allow_origin",
        "drain",
    ),
}
"""Options that one engine only has."""


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    options.add_model(parser)
    parser.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a knob, or a panel (a .json file), whose knobs are loaded and which is offered by the file's name or "
        "NAME; may be repeated",
    )
    parser.add_argument("--no-strict", action="store_true", help="warn of a knob from another model, do not refuse it")
    parser.add_argument(
        "--dose",
        choices=("strict", "clamp", "free"),
        default="strict",
        help="what becomes of strengths outside what tuning found safe: refused, moved to the nearest safe one, or "
        "taken as they are, which knobs that were never tuned need (default strict)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1: this machine only)")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port; 0 is any free one, for transformers (default 8000)"
    )
    options.add_engine(parser, ("transformers", "vllm"))
    _add_transformers(parser)
    vllm = parser.add_argument_group("options of the engine vllm")
    vllm.add_argument(
        "--layers", type=options.layers, metavar="LAYERS", help="layers that knobs may act on (default all)"
    )
    vllm.add_argument("--allow-loading", action="store_true", help="let POST /v1/knobs load knob files of this machine")


def _add_transformers(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("options of the engine transformers")
    group.add_argument("--requests", type=int, metavar="N", help="answers that are made at once (default 64)")
    group.add_argument("--queue", type=int, metavar="N", help="answers that may wait; others get 429 (default 256)")
    group.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="tokens that the KV cache holds, which bounds the longest request too (default by memory)",
    )
    group.add_argument("--timeout", type=float, metavar="S", help="seconds for a request (default 600)")
    group.add_argument(
        "--keys", metavar="FILE", help="API keys, one per line; TRIMTAB_API_KEY is one too (default: nobody needs one)"
    )
    group.add_argument(
        "--admin-keys", metavar="FILE", help="keys that may load knobs; TRIMTAB_ADMIN_KEY is one too (default: nobody)"
    )
    group.add_argument("--open", action="store_true", help="listen beyond this machine although there are no keys")
    group.add_argument("--rate", type=float, metavar="N", help="requests per minute of a key, or of an address")
    group.add_argument("--concurrency", type=int, metavar="N", help="requests at a time, likewise")
    group.add_argument("--allow-host", action="append", metavar="NAME", help="a name that this server is asked for by")
    group.add_argument("--allow-origin", action="append", metavar="ORIGIN", help="let pages from there use the server")
    group.add_argument("--drain", type=float, metavar="S", help="seconds for running requests at the end (default 30)")


def run(args: Namespace, terminal: Terminal) -> int:
    """Serve until stopped."""
    if terminal.json:
        raise OptionError("A server prints its log, and no JSON. Leave --json out.")
    other = "vllm" if args.engine == "transformers" else "transformers"
    given = [name for name in OWN[other] if getattr(args, name) not in (None, False, [])]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise OptionError(
            f"{option} is an option of the engine {other}, and the engine is {args.engine}. Leave it out."
        )
    return _serve_transformers(args, terminal) if args.engine == "transformers" else _serve_vllm(args, terminal)


def _serve_transformers(args: Namespace, terminal: Terminal) -> int:
    from trimtab.serve.guard import GuardSettings
    from trimtab.serve.keys import load_keys
    from trimtab.serve.run import bind, check_exposure, check_installed, serve

    check_installed()
    for name in ("rate", "concurrency"):
        limit: float | None = getattr(args, name)
        if limit is not None and not 0 < limit < float("inf"):
            raise OptionError(f"--{name} is a number above 0; got {limit:g}. Leave it out to have no such limit.")
    guard = GuardSettings(
        host=args.host,
        keys=load_keys(args.keys, args.admin_keys),
        allow_hosts=tuple(args.allow_host or ()),
        allow_origins=tuple(args.allow_origin or ()),
        rate=args.rate,
        concurrency=args.concurrency,
    )
    drain = options.given(args, "drain")
    if not 0 <= drain.get("drain", 0.0) < float("inf"):
        raise OptionError(f"--drain is a number of seconds, 0 or more; got {args.drain:g}.")
    check_exposure(guard, open=args.open)
    with bind(args.host, args.port) as bound:
        with terminal.working("Preparing"):
            offer = load_offer(args.knob)
            from trimtab.engines.continuous.engine import Engine
            from trimtab.serve.app import create_app
            from trimtab.serve.flight import Room

            room = Room(**options.given(args, "requests", "queue", "timeout"))
        with open_model(args, terminal) as loaded, terminal.working("Trying a batch of mixed requests"):
            sizes = options.given(args, "requests", "cache_tokens")
            engine = Engine(
                loaded.model, loaded.tokenizer, offer.rack, dose=args.dose, strict=not args.no_strict, **sizes
            )
        with engine:
            _warn_of_useless(engine.admission, offer)
            app = create_app(engine, model=args.model, panels=offer.panels, room=room)
            return serve(app, guard, bound, dead=lambda: not engine.alive, **drain)


def _warn_of_useless(admission: Admission, offer: Offer) -> None:
    """Say before anybody asks which knobs and panels the dose policy lets nobody turn."""
    untuned = [name for name, knob in offer.rack.items() if knob.safe_range is None]
    if untuned and admission.dose != "free":
        warnings.warn(
            f"Never tuned, so that --dose {admission.dose} lets nobody turn them: {', '.join(sorted(untuned))}. Tune "
            "them (trimtab tune), or pass --dose free.",
            TrimtabWarning,
            stacklevel=2,
        )
    for name, setting in offer.panels.items():
        try:
            admission.admit(setting)
        except TrimtabError as error:
            warnings.warn(f"Panel {name!r} will be refused as it stands: {error}", TrimtabWarning, stacklevel=2)


def _serve_vllm(args: Namespace, terminal: Terminal) -> int:
    from trimtab.serve.run import bind

    if not 0 < args.port < 2**16:
        raise OptionError(f"--port is a number from 1 to 65535 here; got {args.port}.")
    if args.layers is not None and min(args.layers) < 0:
        raise OptionError("--layers counts from 0 here.")
    with terminal.working("Preparing"):
        rack = load_knobs(args.knob, None).rack
        model, own = vllm_options(args)
        if not own.get("headless"):
            bind(args.host, args.port).close()  # before a model is loaded for it
        from trimtab.engines.vllm.launch import Files, engine_options, serve

    files = Files(rack, dict(filter(None, map(_plain_file, args.knob))))
    settings = {
        "knobs": files.paths,
        "strict": not args.no_strict,
        "dose": args.dose,
        "layers": args.layers,
        "allow_loading": args.allow_loading,
    }
    own = {"host": args.host, "port": args.port, "served_model_name": args.model, **own}
    try:
        serve(model, engine_options(rack, settings, own))
    finally:
        files.cleanup()
    return 0


def _plain_file(entry: str) -> tuple[str, Path] | None:
    """Return the name and the place of a knob that lies in a file as it is; None for a panel."""
    from trimtab.artifact import load_knob

    name, path = named_file(entry)
    return None if path.suffix == ".json" else (name or load_knob(path).name, path)
