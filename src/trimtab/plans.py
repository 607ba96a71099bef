"""What learning reads, and how it chooses a site: what the caller left open, settled by method and template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from trimtab.adapter import Adapter
from trimtab.capture import GRADIENT_POSITIONS
from trimtab.errors import OptionError, brief, unknown_name
from trimtab.methods import ELSEWHERE, METHODS, TRAINED, Method
from trimtab.render import Renderer
from trimtab.selection import layers_between
from trimtab.texts import FORMATS, Format, expand_positions, read_positions
from trimtab.types import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Selection = Literal["eq3_cosine", "max_relative_norm", "probe_auc", "first_order", "fixed"]


@dataclass(frozen=True)
class Plan:
    """What is read, and how one site of it is chosen."""

    method: Method
    format: Format
    positions: tuple[str, ...]
    layers: tuple[int, ...]
    selection: str
    site: Site | None
    notes: tuple[str, ...]

    @property
    def gradients(self) -> bool:
        """Whether the evidence is gradients."""
        return self.method.evidence == "gradients"


def make_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    format: Format | None,
    positions: Sequence[str] | str | None,
    layers: Sequence[int] | None,
    first: float,
    last: float,
    selection: str | None,
    site: Site | str | None,
) -> Plan:
    """Settle everything the caller left open by the method, the template and the model; see `trimtab.learn`."""
    if not isinstance(method, str) or method not in METHODS:  # pyright: ignore[reportUnnecessaryIsInstance]
        method = method if isinstance(method, str) else brief(method)  # pyright: ignore[reportUnnecessaryIsInstance]
        if method in TRAINED:
            raise OptionError(f"{method} trains weights: use trimtab.learn_weights(..., method={method!r}).")
        if method in ELSEWHERE:
            raise OptionError(f"{method} takes gradient steps: use trimtab.{ELSEWHERE[method]}(...).")
        raise unknown_name("method", method, [*METHODS, *ELSEWHERE])
    adapter, renderer, entry = Adapter(model), Renderer(tokenizer), METHODS[method]
    fixed = _fixed_site(adapter, site)
    rule = _rule(entry, selection, fixed)
    asked = None if positions is None else read_positions(positions)
    if asked is None and fixed is not None:
        asked = (fixed.position,)
    notes: list[str] = []
    if entry.evidence == "gradients":
        if format not in (None, "question_response"):
            raise OptionError(f"Gradients are of answers after their questions; got format={format!r}. Leave it out.")
        format = "question_response"  # a gradient is one at an answer after its question
    if format is None:
        format = _format_for(asked) or entry.format
        if format == "response_as_user" and not renderer.has_template:
            format = "question_response"
            notes.append(
                "This tokenizer has no chat template, so answers are read after their prompts "
                "(format='question_response')."
            )
    if asked is None:
        asked = (entry.position or _default_position(renderer, format),)
    kept = layers_between(adapter.n_layers, first, last) if layers is None else adapter.layers(layers)
    if fixed is not None and layers is None:
        kept = [*kept, fixed.layer]
    names = _gradient_positions(asked) if entry.evidence == "gradients" else expand_positions(renderer, asked, format)
    if fixed is not None and (fixed.layer not in kept or fixed.position not in names):
        raise unknown_name(
            "site", str(fixed), (str(Site(layer, name)) for layer in sorted(set(kept)) for name in names)
        )
    return Plan(entry, format, names, tuple(sorted(set(kept))), rule, fixed, tuple(notes))


def _gradient_positions(asked: Sequence[str]) -> tuple[str, ...]:
    for name in asked:
        if name not in GRADIENT_POSITIONS:
            raise unknown_name("position of gradients", name, GRADIENT_POSITIONS)
    return tuple(dict.fromkeys(asked))


def _fixed_site(adapter: Adapter, site: Site | str | None) -> Site | None:
    if site is None:
        return None
    parsed = Site.parse(site) if isinstance(site, str) else site
    if not isinstance(parsed, Site):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"A site is a layer with a position, as in '4/last'; got {site!r}.")
    return Site(adapter.layer(parsed.layer), parsed.position)


def _rule(method: Method, selection: str | None, site: Site | None) -> str:
    rule = selection or (method.selection if site is None else "fixed")
    if rule == "validation":
        raise OptionError(
            "Choosing a site by validation needs data that learning has not seen: learn with another rule, then pass "
            "the knob and held-out pairs to trimtab.tune."
        )
    gradients = method.evidence == "gradients"
    known = ("first_order", "fixed") if gradients else [r for r in get_args(Selection) if r != "first_order"]
    if rule not in known:
        raise unknown_name("selection", rule, known)
    if (rule == "fixed") != (site is not None):
        got = f"selection={rule!r} and site={None if site is None else str(site)!r}"
        raise OptionError(f"A site goes with selection='fixed', and selection='fixed' needs a site; got {got}.")
    return rule


def _format_for(positions: Sequence[str] | None) -> Format | None:
    """Return the format in which the positions exist, if they exist in one only."""
    groups = {position.partition("[")[0] for position in positions or ()}
    if "post_instruction" in groups:
        return "response_as_user"
    return "question_response" if "response_end" in groups else None


def _default_position(renderer: Renderer, format: Format) -> str:
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if format == "response_as_user":
        return "post_instruction"
    return "response_end" if renderer.closing_count() else "last"
