"""Serve a model over HTTP as OpenAI's interface does, with knobs per request.

A request turns knobs by a field of its body, as in "knobs": {"math": 0.8, "concise": -1}, or "knobs": "math=0.8"; knobs
that it does not name are off. GET /v1/knobs lists them. The engine is vLLM, whose own server answers; NAME=VALUE of
--engine-option are its options, as in --engine-option max_model_len=4096 --engine-option nnodes=2.
"""

from __future__ import annotations

import socket
from argparse import ArgumentParser, Namespace
from pathlib import Path

from trimtab.cli import options
from trimtab.cli.sources import load_knobs, named_file, vllm_options
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("model", metavar="MODEL", help="prefworld (bundled), a local folder, or a hub name")
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default auto: as stored)")
    parser.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a knob, or a panel, whose strengths play no part; may be repeated",
    )
    parser.add_argument("--no-strict", action="store_true", help="warn of a knob from another model, do not refuse it")
    parser.add_argument(
        "--dose",
        choices=("strict", "clamp", "free"),
        default="strict",
        help="what becomes of strengths outside what tuning found safe: refused, moved to the nearest safe one, or "
        "taken as they are, which knobs that were never tuned need (default strict)",
    )
    parser.add_argument(
        "--layers", type=options.layers, metavar="LAYERS", help="layers that knobs may act on (default all)"
    )
    parser.add_argument(
        "--allow-loading", action="store_true", help="let POST /v1/knobs load knob files of this machine"
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port (default 8000)")
    options.add_engine(parser, ("vllm",))


def run(args: Namespace, terminal: Terminal) -> None:
    """Serve until stopped."""
    if not 0 < args.port < 2**16:
        raise OptionError(f"--port is a number from 1 to 65535; got {args.port}.")
    if terminal.json:
        raise OptionError("A server prints its log, and no JSON. Leave --json out.")
    if args.layers is not None and min(args.layers) < 0:
        raise OptionError("--layers counts from 0 here.")
    with terminal.working("Preparing"):
        rack = load_knobs(args.knob, None).rack
        model, own = vllm_options(args)
        if not own.get("headless"):
            _check_address(args.host, args.port)
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


def _check_address(host: str, port: int) -> None:
    """Raise `OptionError` where nothing can listen, before a model is loaded for it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise OptionError(f"Cannot listen on {host}:{port}: {error.strerror}.") from None


def _plain_file(entry: str) -> tuple[str, Path] | None:
    """Return the name and the place of a knob that lies in a file as it is; None for a panel."""
    from trimtab.artifact import load_knob

    name, path = named_file(entry)
    return None if path.suffix == ".json" else (name or load_knob(path).name, path)
