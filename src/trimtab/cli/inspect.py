"""Show what a knob is, where it comes from, and what learning and tuning measured; of a panel, which knobs it turns."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.options import input_file
from trimtab.cli.tables import columns, sites_text, tuning_text
from trimtab.cli.terminal import Terminal

if TYPE_CHECKING:
    from trimtab.artifact import AnyKnob


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("knob", metavar="FILE", help="a knob file, or a panel")


def run(args: Namespace, terminal: Terminal) -> None:
    """Print the knob's card and its tables."""
    path = input_file(args.knob, "a knob file")
    if path.suffix == ".json":
        _show_panel(path, terminal)
        return
    with terminal.working("Reading"):
        from trimtab.artifact import DeltaKnob, Knob, load_knob

        knob = load_knob(path)
    if isinstance(knob, Knob):
        tables = (sites_text(knob.diagnostics), tuning_text(knob.tuning, knob.site, knob.where, knob.gain))
        own = {
            "site": str(knob.site),
            "also": list(map(str, knob.also)),
            "width": knob.width,
            "sites": [str(site) for site in knob.vectors],
            "norms": {str(layer): norm for layer, norm in knob.norms.items()},
            "kernel": knob.kernel and {**knob.kernel.header(), "examples": knob.kernel.count},
        }
    elif isinstance(knob, DeltaKnob):
        tables = (tuning_text(knob.tuning, "weights", knob.where, knob.gain),)
        own = {"weights": knob.described()}
    else:
        tables = (tuning_text(knob.tuning, knob.site, knob.where, knob.gain),)
        own = {
            "layers": list(knob.layers),
            "backend": knob.backend,
            "step": knob.step,
            "per_token": knob.per_token,
            "norms": {str(layer): norm for layer, norm in knob.norms.items()},
            "scales": {str(layer): scale for layer, scale in knob.scales.items()},
            "gradient": knob.described(),
        }
    terminal.result(_record(knob) | own, "\n\n".join(filter(None, [knob.card(), *tables])))


def _show_panel(path: Path, terminal: Terminal) -> None:
    with terminal.working("Reading"):
        from trimtab.artifact import load_panel

        panel = load_panel(path)
    knobs = [
        {"name": name, "strength": panel.setting[name], "kind": knob.kind, "method": knob.method}
        for name, knob in panel.rack.items()
    ]
    heads = ("knob", "strength", "kind", "method")
    table = columns(heads, [[row["name"], f"{row['strength']:g}", row["kind"], row["method"]] for row in knobs])
    terminal.result({"panel": str(path), "knobs": knobs}, f"{path}, a panel\n\n{table}")


def _record(knob: AnyKnob) -> dict[str, Any]:
    return {
        "name": knob.name,
        "kind": knob.kind,
        "method": knob.method,
        "gain": knob.gain,
        "where": knob.where,
        "operation": knob.operation,
        "safe_range": knob.safe_range,
        "provenance": dict(knob.provenance),
        "diagnostics": dict(knob.diagnostics),
        "tuning": None if knob.tuning is None else dict(knob.tuning),
    }
