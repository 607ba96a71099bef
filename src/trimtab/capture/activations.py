"""Pairs through a model to activations: what the residual stream holds at the candidate sites, per pair."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.capture.batches import CUTS, Group, group, make_batches, worth_calls
from trimtab.capture.gathered import Gathered, spread
from trimtab.capture.running import Read, Runner
from trimtab.checkpoint import Checkpoint, describe_model, fingerprint
from trimtab.errors import PairsError
from trimtab.ops import Side
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.team import ALONE, Team
from trimtab.texts import Format, check_context, expand_positions, render_pairs
from trimtab.types import Site, check_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the model's residual stream holds for the two answers of every pair, in the order of the pairs."""

    sites: tuple[Site, ...]
    """S sites, layers in order, positions of a layer together."""
    chosen: Tensor
    """`[N, S, D]` float32."""
    rejected: Tensor
    """`[N, S, D]` float32."""
    norms: dict[int, float]
    """Mean residual norm per layer over the answers' tokens as the assistant's turn, a sequence's first left out."""
    lengths: Tensor
    """Tokens of the chosen and the rejected answer, of all pairs: `[pairs, 2]` int64."""
    format: Format
    norm_tokens: int
    """Number of tokens behind each of `norms`."""
    means: Tensor
    """`[2, S, D]` float64 of the chosen and the rejected answers, over all pairs."""
    parts: Tensor
    """The same of 16 equal parts of all pairs, drawn at random (of as many as there are pairs, if fewer): `[2, parts,
    S, D]` float64."""
    kept: Tensor
    """Numbers of the pairs whose activations are in `chosen` and `rejected`, in order, `[N]` int64."""
    shared: bool
    """Whether what answers have in common was run once."""


def capture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    positions: Sequence[str] | str,
    layers: Sequence[int] | None = None,
    format: Format,
    token_budget: int = 8192,
    padding: Side = "right",
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    team: Team = ALONE,
    share: bool = True,
    keep: int | None = None,
) -> Evidence:
    """Read the residual stream of every pair's answers at every candidate site, layers x positions.

    A position is a token of the rendered answer: `post_instruction[-k]` (the template's tokens after the user's slot,
    format "response_as_user"), `response_end[-k]` (the tokens that close the answer, format "question_response"),
    `last` (the answer's last token), `response_mean` (the mean over the answer's tokens), and `demonstrated` (last
    prompt token of another pair's question after one turn that shows the answer; the format does not matter). A name
    without an index stands for all its tokens. `layers` None means all; negative ones count from the end.

    Batches hold at most `token_budget` tokens, padding included, and are halved when memory runs out. Blocks above the
    highest layer and the LM head are not run. No gradients; dropout is off; the model is left as it was. `progress` is
    called with the number of texts that are done and that of all.

    Where it saves something, tokens that answers have in common, their prompt above all, are run once, and each answer
    goes on from a copy of their KV cache (`padding` is then left of prompts and right of answers). Models whose cache
    is of another kind, whose positions depend on a call's length, or which do not read a few tokens behind a cache as
    they read them whole, run every text whole, as `share=False` does; the two agree up to rounding. So do accelerators
    where a few pairs would save less than launching the calls for their prompts costs.

    `keep`: at most so many pairs, spread evenly, are in `chosen` and `rejected`, so that the activations in memory do
    not grow with the number of pairs; `means`, `parts`, `norms` and `lengths` are of all. None keeps all.

    `checkpoint` is a folder that keeps finished batches: the same call takes them from there after it was stopped or
    killed, bit for bit, so the result is that of a run in one go. It is left in place; see `trimtab.checkpoint`.

    `team`: several processes, each with the model, make the same call and share its batches out; all of them return
    the whole evidence, whose norms and means differ in their last bits from those of one process. They share the
    checkpoint.
    """
    if not isinstance(pairs, Pairs):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PairsError(f"pairs must be Pairs; got {type(pairs).__name__}. Pass Pairs.from_records(...).")
    if not len(pairs):
        raise PairsError("There are no pairs to read.")
    adapter, renderer = Adapter(model), Renderer(tokenizer)
    adapter.check_plain("learning")
    wanted = adapter.layers(range(adapter.n_layers) if layers is None else layers)
    check_count(token_budget, "token_budget")
    names = expand_positions(renderer, positions, format)
    texts = render_pairs(renderer, pairs, names, format)
    for text in texts:
        adapter.check_ids(text.ids)
    check_context(adapter.context_length, texts)
    if keep is not None:
        check_count(keep, "keep")
    runner = Runner(adapter, renderer, wanted, padding)

    def job() -> dict[str, object]:
        return {
            "work": "reading pairs",
            "pairs": pairs.hash(),
            "format": format,
            "positions": names,
            "layers": wanted,
            "token budget": token_budget,
            "padding": padding,
            "sharing": [share, *CUTS],
            "tokens": fingerprint(texts),
            **describe_model(model, tokenizer),
        }

    steps = team.first(lambda: Checkpoint(checkpoint, job))
    kept = spread(len(pairs), keep)
    evidence, done = Gathered(kept, len(pairs), len(wanted), len(names), adapter.hidden_size), 0
    with torch.no_grad(), evaluating(model):
        groups = group(texts) if share else []
        worth = adapter.input_device.type == "cpu" or worth_calls(groups, token_budget)
        # Decided once, whoever goes on from the checkpoint, and alike by all of a team, which cuts its batches alike.
        shared = steps.step("shared", lambda: share and worth and runner.can_share(groups))
        shared = all(team.collect(shared))
        groups = groups if shared else [Group(0, [text]) for text in texts]
        for number, batch in enumerate(make_batches(groups, token_budget)):
            own = [text for one in batch for text in one.texts]
            if team.takes(number):
                evidence.add(own, Read(**steps.tensors(f"batch {number}", partial(_read, runner, batch, token_budget))))
            done += len(own)
            progress(done, len(texts))
    evidence.meet(team)
    answers = {(text.side, text.pair): text.norms.stop - text.norms.start for text in texts if text.norms.stop}
    return Evidence(
        sites=tuple(Site(layer, name) for layer in wanted for name in names),
        chosen=evidence.store[0].flatten(1, 2),
        rejected=evidence.store[1].flatten(1, 2),
        norms=dict(zip(wanted, evidence.norms.mean.tolist(), strict=True)),
        lengths=torch.tensor([[answers[side, n] for side in (0, 1)] for n in range(len(pairs))]),
        format=format,
        norm_tokens=evidence.norms.count,
        means=evidence.means().flatten(1, 2),
        parts=evidence.parts().flatten(2, 3),
        kept=kept,
        shared=shared,
    )


def _read(runner: Runner, batch: list[Group], budget: int) -> dict[str, Tensor]:
    return runner.run(batch, budget)._asdict()


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Switch dropout and the like off; afterwards every module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
