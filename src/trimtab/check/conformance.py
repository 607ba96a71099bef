"""The checks of one model: blocks, reading, writing, positions, padding, rows, and that nothing stays behind.

They run on random token ids, without a tokenizer, and compare the steered model with itself unsteered.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from trimtab import runtime
from trimtab.adapter import Adapter
from trimtab.artifact import Knob
from trimtab.capture import evaluating
from trimtab.check.bench import LENGTHS, NEW, Bench
from trimtab.check.trace import Broken, tracing, watching
from trimtab.check.ways import all_ways, mask_of, possible, span
from trimtab.errors import AdapterError, TrimtabError, brief
from trimtab.ops import Side
from trimtab.runtime import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Verdict = Literal["ok", "refused", "failed"]


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    verdict: Verdict
    said: str = ""
    """Figures, or why it was refused or failed."""


@dataclass(frozen=True)
class Report:
    """What `check` found of one model."""

    model: str
    architecture: str
    path: str = ""
    """Where the decoder blocks are, empty where they were not found."""
    layers: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """`failed` if any check failed, else `refused` if any was refused, else `ok`."""
        verdicts = {finding.verdict for finding in self.findings}
        return "failed" if "failed" in verdicts else "refused" if "refused" in verdicts else "ok"


class _Inside(Exception):
    """Raised inside `steer` to see what it leaves behind."""


def check(model: nn.Module, *, name: str = "", layers_path: str | None = None) -> Report:
    """Check that a model's residual stream is read and written where Trimtab thinks; takes seconds on a small model.

    `name` is what the report calls the model. `layers_path` names the decoder blocks of an unusual model. Each check is
    "ok", "refused" (Trimtab says that it will not, and why) or "failed" (it would be silently wrong: do not use it).
    The model is left as it was.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterError(f"check() takes a loaded model, such as trimtab.load(...).model; got {brief(model)}.")
    config: Any = getattr(model, "config", None)
    architecture = str(getattr(config, "model_type", type(model).__name__))
    name = name or type(model).__name__
    try:
        adapter = Adapter(model, layers_path=layers_path)
    except TrimtabError as error:
        return Report(name, architecture, findings=(Finding("blocks", "refused", str(error)),))
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", 100))
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(min(10, vocabulary - 1), vocabulary, (count,), generator=generator).tolist()

    rows, new = [draw(length) for length in LENGTHS], torch.tensor([draw(NEW) for _ in LENGTHS])
    bench = Bench(adapter, cast("PreTrainedModel", model), rows, new.to(adapter.input_device))
    findings = [Finding("blocks", "ok", f"{adapter.path} ({adapter.n_layers})")]
    with torch.no_grad(), evaluating(model):
        for label, function in CHECKS.items():
            findings.append(_run(label, function, bench))
            if (label, findings[-1].verdict) == ("read", "refused"):
                break  # nothing else can be said of it
    return Report(name, architecture, adapter.path, adapter.n_layers, tuple(findings))


def _run(name: str, function: Callable[[Bench], str], bench: Bench) -> Finding:
    try:
        return Finding(name, "ok", function(bench))
    except Broken as error:
        return Finding(name, "failed", str(error))
    except TrimtabError as error:
        return Finding(name, "refused", str(error))
    except Exception as error:  # noqa: BLE001  # whatever somebody's model raises
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(innermost).is_relative_to(Path(runtime.__file__).parent):
            return Finding(name, "failed", f"Trimtab itself: {said}")
        return Finding(name, "refused", f"the model itself: {said}")


# The checks: each returns a remark, raises Broken where it does not hold, or lets a refusal through


def _read(bench: Bench) -> str:
    """What is captured, and what a knob is given, is what every block itself returns; and the stream is causal."""
    adapter, row = bench.adapter, bench.rows[0]
    given: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], Tensor]:
        def function(hidden: Tensor) -> Tensor:
            given[layer] = hidden
            return hidden

        return function

    writing = adapter.write({layer: keep(layer) for layer in range(adapter.n_layers)})
    with watching(adapter.model, adapter.path) as returned, writing:
        with adapter.read(range(adapter.n_layers)) as reading:
            states = bench.model(**bench.pad([row]), output_hidden_states=True).hidden_states
        whole, kept, own = dict(reading.acts), dict(given), dict(returned)
        with adapter.read(range(adapter.n_layers)) as reading:
            bench.model(**bench.pad([row[:-2]]))
        part = dict(reading.acts)
    for layer in range(adapter.n_layers):
        if whole[layer].shape[1] != len(row):
            raise AdapterError(f"Layer {layer} holds {whole[layer].shape[1]} tokens in a call of {len(row)}.")
        bench.norms[layer] = float(whole[layer][0, 1:].float().norm(dim=-1).mean())
        later = _apart(whole[layer][:, : len(row) - 2], part[layer])
        if later > bench.tolerance:
            raise AdapterError(
                f"Not a causal model: later tokens change what layer {layer} holds for earlier ones, by {later:.1g}."
            )
        if not torch.equal(whole[layer], own[layer]):
            raise Broken(f"what is read at layer {layer} is not what the block returns")
        if not torch.equal(kept[layer], own[layer]):
            raise Broken(f"what a knob at layer {layer} is given is not what the block returns")
    if states is None or len(states) != adapter.n_layers + 1:
        return "no hidden_states to compare with"
    inner = range(adapter.n_layers - 1)  # the last entry is after the final norm
    for offset in (1, 0):  # with the embeddings in front; some models (Mamba) leave them out
        if all(torch.equal(whole[layer], states[layer + offset]) for layer in inner):
            return f"layer i is hidden_states[i{' + 1' if offset else ''}]"
    raise Broken("the layers are not the entries of hidden_states")


def _write(bench: Bench) -> str:
    """Steered minus base is the addend at every layer, nothing below it changes, and the logits do."""
    adapter, row = bench.adapter, bench.rows[0]
    worst = 0.0
    with adapter.read(range(adapter.n_layers)) as reading:
        base_logits = bench.logits([row])[0]
        base = dict(reading.acts)
        for layer in range(adapter.n_layers):
            turned = bench.knob(layer)
            with steer(adapter, {turned: 1.0}):
                logits = bench.logits([row])[0]
            added = (reading.acts[layer].float() - base[layer].float())[0]
            wanted = turned.addend(1.0).to(added)
            # a token of huge norm (a norm sink) is rounded by more than the addend is long
            rounding = torch.finfo(adapter.dtype).eps * base[layer][0].float().norm(dim=-1)
            off = ((added - wanted).norm(dim=-1) - 2 * rounding).clamp(min=0).max()
            worst = max(worst, float(off / wanted.norm()))
            if any(not torch.equal(reading.acts[below], base[below]) for below in range(layer)):
                raise Broken(f"a knob at layer {layer} changes a layer below it")
            if torch.equal(logits, base_logits):
                raise Broken(f"a knob at layer {layer} does not reach the logits")
    if worst > bench.tolerance:
        raise Broken(f"steered minus base is off by {worst:.1g} of the addend")
    return f"off by {worst:.0e}"


def _zero(bench: Bench) -> str:
    """Strength 0 is bitwise the base model, and so is the model after steering, and after an error inside."""
    base = bench.logits([bench.rows[0]])[0]
    hooks = _hooks(bench.model)
    turned = bench.knob(bench.middle)
    with steer(bench.adapter, {turned: 0.0}):
        if not torch.equal(bench.logits([bench.rows[0]])[0], base):
            raise Broken("strength 0 is not bitwise the base model")
    try:
        with steer(bench.adapter, {turned: 1.0}):
            bench.logits([bench.rows[0]])
            raise _Inside
    except _Inside:
        pass
    if _hooks(bench.model) != hooks or not torch.equal(bench.logits([bench.rows[0]])[0], base):
        raise Broken("something stays on the model after steering")
    return "bitwise"


def _positions(bench: Bench) -> str:
    """The same absolute positions are steered, however the tokens come: each of `all_ways`, for every `where`."""
    layer, count = bench.middle, 0
    ways = all_ways(bench)
    missing = [name for name, way in ways.items() if not possible(way)]
    for where, (name, way) in product(("all", "prompt", "context", "completion"), ways.items()):
        if name in missing:
            continue
        mask = mask_of([len(row) for row in way.rows], way.side)
        setting = {bench.knob(layer, where): 1.0}
        with steer(bench.adapter, setting, prompt_lengths=way.lengths), tracing(bench.adapter, layer, mask) as trace:
            way.run()
        expected = [span(where, length, total) for length, total in zip(way.lengths, way.totals, strict=True)]
        if trace.positions() != expected:
            raise Broken(f"where={where!r}, {name}: steered {trace.positions()}, not {expected}")
        count += 1
    return f"{count} ways" + (f"; the model itself cannot do: {', '.join(missing)}" if missing else "")


def _cache(bench: Bench) -> str:
    """Steered decoding with a KV cache gives the logits of the steered forward without one."""

    def off(setting: dict[Knob, float], given: list[int] | None) -> float:
        worst = 0.0
        for i, row in enumerate(bench.rows):
            forced = row + bench.new[i].tolist()
            with steer(bench.adapter, setting, prompt_lengths=[given[i]] if given else None):
                whole = bench.logits([forced])[0][len(row) - 1 :]
                steps: list[Tensor] = []
                out = bench.model(**bench.pad([row]), use_cache=True)
                for column in range(NEW + 1):
                    steps.append(out.logits[0, -1].float())
                    if column < NEW:
                        out = bench.model(
                            **bench.next(out, bench.new[i : i + 1, column : column + 1], len(row) + column)
                        )
            worst = max(worst, _apart(torch.stack(steps), whole))
        return worst

    base = off({}, None)
    found = max(off({bench.knob(bench.middle, where): 1.0}, list(LENGTHS)) for where in ("all", "prompt", "completion"))
    return _verdict(found, base, bench, "with a KV cache")


def _padding(bench: Bench) -> str:
    """Steered rows in a padded batch give the logits they give alone, on either side."""

    def off(setting: dict[Knob, float], side: Side) -> float:
        lengths = list(LENGTHS)
        with steer(bench.adapter, setting, prompt_lengths=lengths):
            together = bench.logits(bench.rows, side)
        alone: list[Tensor] = []
        for row in bench.rows:
            with steer(bench.adapter, setting, prompt_lengths=[len(row)]):
                alone += bench.logits([row])
        return max(_apart(a, b) for a, b in zip(together, alone, strict=True))

    said: list[str] = []
    for side in get_args(Side):
        turned = {bench.knob(0): 1.0, bench.knob(bench.middle, "completion", seed=1): 1.0}
        said.append(f"{side} {_verdict(off(turned, side), off({}, side), bench, f'padded on the {side}')}")
    return ", ".join(said)


def _rows(bench: Bench) -> str:
    """Rows of a batch keep their own knobs: each gives what the batch gives when all rows have its knobs."""
    one, two = bench.knob(0), bench.knob(bench.middle, "completion", seed=1)
    settings: list[dict[Knob, float]] = [{one: 1.0}, {}, {two: -1.0, one: 0.5}]
    row = bench.rows[0]
    rows, lengths = [row] * 3, [len(row)] * 3
    with steer(bench.adapter, settings, prompt_lengths=lengths):
        mixed = bench.logits(rows)
    worst = 0.0
    for i, setting in enumerate(settings):
        with steer(bench.adapter, setting, prompt_lengths=lengths):
            worst = max(worst, _apart(mixed[i], bench.logits(rows)[i]))
    if worst > bench.tolerance:
        raise Broken(f"a row's logits are off by {worst:.1g} when others in the batch have other knobs")
    return f"off by {worst:.0e}"


CHECKS: dict[str, Callable[[Bench], str]] = {
    "read": _read,
    "write": _write,
    "zero": _zero,
    "positions": _positions,
    "cache": _cache,
    "padding": _padding,
    "rows": _rows,
}
"""Every check by its name, in the order in which they run; `blocks`, which finds the decoder blocks, comes first."""


# Small helpers


def _apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference as a share of the spread of `b`."""
    a, b = a.float(), b.float()
    return float((a - b).abs().max() / b.std().clamp(min=1e-9))


def _verdict(found: float, base: float, bench: Bench, how: str) -> str:
    """Trial a difference of steered runs by rounding, or by that of the unsteered model where it is larger."""
    if base > bench.tolerance and found < 3 * base:
        return f"no worse than the base model, whose own logits differ by {base:.1g} {how}"
    if found > bench.tolerance:
        raise Broken(f"steered logits differ by {found:.1g} {how}, the base model's by {base:.1g}")
    return f"off by {found:.0e}"


def _hooks(model: nn.Module) -> int:
    return sum(len(vars(m)["_forward_hooks"]) + len(vars(m)["_forward_pre_hooks"]) for m in model.modules())
