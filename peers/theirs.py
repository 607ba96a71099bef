"""Compare Trimtab's vectors with those of repeng and steering-vectors, and write docs/parity.md.

    python peers/theirs.py build/peers

Runs in the peers' own environment, on what `ours.py` wrote; `make test-peers` runs both. Exits with 1 when a cosine is
not above the limit, or when a comparison that must fail does not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"  # before repeng imports tqdm

import torch
from repeng import ControlVector, DatasetEntry
from repeng.extract import read_representations
from report import LIMIT, PAGE, READING_LIMIT, Check, page, table
from safetensors.torch import load_file
from steering_vectors import extract_activations, mean_aggregator, pca_aggregator, train_steering_vector
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

FORMATS = ("question_response", "response_as_user")


class Source(NamedTuple):
    """What `ours.py` wrote of a model and pairs."""

    name: str
    folder: Path
    tensors: Mapping[str, Tensor]
    special: Mapping[str, str]
    texts: Mapping[str, list[str]]
    ids: Mapping[str, list[list[int]]]


class Method(NamedTuple):
    """A peer's method as a function `(chosen [N, S, D], rejected [N, S, D]) -> vectors [S, D]`, and ours."""

    peer: str
    name: str
    ours: str
    function: Callable[[Tensor, Tensor], Tensor]


# The peers


def repeng_method(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return repeng's own computation, which is handed our activations in place of those it would read."""

    def vectors(chosen: Tensor, rejected: Tensor) -> Tensor:
        n, sites = chosen.shape[:2]
        rows = torch.stack([chosen, rejected], dim=1).flatten(0, 1)  # positive, negative, positive, ...
        hiddens = {site: rows[:, site].numpy().copy() for site in range(sites)}
        # All it asks of a model, once it need not run it, is the number of layers.
        model = SimpleNamespace(
            config=SimpleNamespace(num_hidden_layers=sites), model=SimpleNamespace(layers=range(sites))
        )
        with mock.patch("repeng.extract.batched_get_hiddens", return_value=hiddens):
            entries = [DatasetEntry("", "")] * n
            found = read_representations(model, None, entries, hidden_layers=list(range(sites)), method=name)
        return torch.stack([torch.from_numpy(found[site]) for site in range(sites)])

    return vectors


def aggregated(aggregator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return steering-vectors' aggregator over all sites."""
    return lambda chosen, rejected: torch.stack(
        [aggregator(plus, minus) for plus, minus in zip(chosen.unbind(1), rejected.unbind(1), strict=True)]
    )


METHODS = (
    Method("steering-vectors", "mean", "diffmean", aggregated(mean_aggregator())),
    Method("steering-vectors", "pca", "pca", aggregated(pca_aggregator())),
    Method("repeng", "pca_center", "pca", repeng_method("pca_center")),
    Method("repeng", "pca_diff", "pca_center", repeng_method("pca_diff")),
)


def along_mean(vectors: Tensor, differences: Tensor) -> Tensor:
    """Turn `vectors [S, D]` so that the mean of `differences [N, S, D]` has a positive component along each."""
    along = torch.einsum("sd,sd->s", vectors.double(), differences.double().mean(dim=0))
    return torch.where(along < 0, -1.0, 1.0)[:, None] * vectors


def cosines(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the cosine per site of two `[S, D]`."""
    return torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=-1)


def lengths(ours: Tensor, theirs: Tensor) -> float:
    """Return the smallest ratio of the lengths of two `[S, D]`, the shorter to the longer."""
    ratio = ours.norm(dim=-1).double() / theirs.norm(dim=-1).double()
    return float(torch.minimum(ratio, 1 / ratio).min())


# The same activations


def shared_checks(source: Source) -> Iterator[tuple[Check, int]]:
    """Yield a check per method, and how many vectors the two rules of sign turn differently."""
    layers = source.tensors["question_response.chosen"].shape[1]
    for method in METHODS:
        found: dict[str, list[Tensor]] = {}
        turned = 0
        for form in FORMATS:
            chosen, rejected, ours = (source.tensors[f"{form}.{what}"] for what in ("chosen", "rejected", method.ours))
            positions = chosen.shape[1] // layers
            shuffle = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
            seen = {
                "as read": rejected,
                "rejected shuffled": rejected[shuffle],
                "one layer up": rejected.roll(-positions, dims=1),
            }
            for name, minus in seen.items():
                theirs = method.function(chosen, minus)
                if method.peer == "repeng":
                    raw, theirs = theirs, along_mean(theirs, chosen - minus)
                    turned += int((raw != theirs).any(dim=-1).sum()) if name == "as read" else 0
                found.setdefault(name, []).append(cosines(ours, theirs))
                if name == "as read" and method.ours == "diffmean":
                    found.setdefault("length", []).append(torch.tensor([lengths(ours, theirs)]))
                if name == "as read" and method.ours != "diffmean":
                    other = "pca" if method.ours == "pca_center" else "pca_center"
                    found.setdefault("other centre", []).append(cosines(source.tensors[f"{form}.{other}"], theirs))
        smallest = {name: float(torch.cat(values).min()) for name, values in found.items()}
        right, sites = smallest.pop("as read"), sum(map(len, found["as read"]))
        high = ("length", "rejected shuffled") if method.ours == "diffmean" else ()
        also = {name: smallest.pop(name) for name in high}
        yield Check(method.peer, method.name, method.ours, source.name, str(sites), right, smallest, also), turned


# From model and texts


def load_model(source: Source) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the source's model, and its tokenizer from the one file that both versions of transformers read alike."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source.folder / "tokenizer.json"),
        model_input_names=["input_ids", "attention_mask"],
        **source.special,
    )
    for side, texts in source.texts.items():
        if tokenizer(texts)["input_ids"] != source.ids[side]:
            sys.exit(f"{source.name}: the tokenizer finds other ids here than in Trimtab's environment.")
    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval(), tokenizer


def pairs_of(source: Source) -> list[tuple[str, str]]:
    """Return the rendered texts, chosen and rejected."""
    return list(zip(source.texts["chosen"], source.texts["rejected"], strict=True))


def own_vectors(method: Method, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, source: Source) -> Tensor:
    """Let the peer read the texts itself and return its vectors `[L, D]`."""
    pairs = pairs_of(source)
    layers = list(range(model.config.num_hidden_layers))
    if method.peer == "repeng":
        entries = [DatasetEntry(*pair) for pair in pairs]
        trained = ControlVector.train(model, tokenizer, entries, hidden_layers=layers, method=method.name)
        return torch.stack([torch.from_numpy(trained.directions[layer]) for layer in layers])
    aggregator = mean_aggregator() if method.name == "mean" else pca_aggregator()
    vector = train_steering_vector(model, tokenizer, pairs, batch_size=16, aggregator=aggregator)
    return torch.stack([vector.layer_activations[layer] for layer in layers])


def read_by(peer: str, source: Source, what: str) -> Tensor:
    """Return ours at the sites that the peer reads, `[L, D]` or `[N, L, D]`: repeng's last is after the final norm."""
    ours = source.tensors[f"question_response.{what}"]
    below = ours.narrow(-2, 0, ours.shape[-2] - 1)
    return torch.cat([below, source.tensors[f"normed.{what}"]], dim=-2) if peer == "repeng" else ours


def own_checks(source: Source) -> Iterator[Check]:
    """Yield a check per method, the peer having read the model itself."""
    model, tokenizer = load_model(source)
    for method in METHODS:
        ours, theirs = read_by(method.peer, source, method.ours), own_vectors(method, model, tokenizer, source)
        last = len(ours) - 1
        sites = f"0-{last}"
        if method.peer == "repeng":
            sites = f"0-{last - 1}, {last} normed"
            chosen, rejected = (read_by(method.peer, source, side) for side in ("chosen", "rejected"))
            theirs = along_mean(theirs, chosen - rejected)
        wrong = {"one layer off": float(cosines(ours.roll(1, dims=0), theirs).min())}
        smallest = float(cosines(ours, theirs).min())
        also = {"length": lengths(ours, theirs)} if method.ours == "diffmean" else {}
        yield Check(method.peer, method.name, method.ours, source.name, sites, smallest, wrong, also)


def reading(source: Source) -> float:
    """Return the largest difference between steering-vectors' activations and ours, relative to the norm of ours."""
    model, tokenizer = load_model(source)
    read = extract_activations(model, tokenizer, pairs_of(source), batch_size=16)
    found: list[float] = []
    for side, layers in zip(("chosen", "rejected"), read, strict=True):
        theirs = torch.stack([torch.cat(layers[layer]) for layer in sorted(layers)], dim=1)  # [N, L, D]
        ours = source.tensors[f"question_response.{side}"]
        found.append(float(((theirs - ours).norm(dim=-1) / ours.norm(dim=-1)).max()))
    return max(found)


def load_source(folder: Path) -> Source:
    """Read a folder that `ours.py` wrote."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    texts = {side: [row["text"] for row in rows] for side, rows in about["texts"].items()}
    ids = {side: [row["ids"] for row in rows] for side, rows in about["texts"].items()}
    tensors = load_file(folder / "evidence.safetensors")
    return Source(about["source"], folder, tensors, about["special"], texts, ids)


def main() -> None:
    """Compare, print the tables, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    sources = [load_source(path.parent) for path in sorted(folder.glob("*/about.json"))]
    if not sources:
        sys.exit(f"{folder} holds nothing to compare. Run: make test-peers")
    counted = [row for source in sources for row in shared_checks(source)]
    shared = [check for check, _ in counted]
    own = [check for source in sources for check in own_checks(source)]
    difference = max(reading(source) for source in sources)
    tables = (
        table(shared, ("length", "rejected shuffled", "one layer up", "other centre")),
        table(own, ("length", "one layer off")),
    )
    print("The same activations\n", tables[0], "\nFrom model and texts\n", tables[1], "", sep="\n")
    failed = [check for check in (*shared, *own) if not check.holds]
    for check in failed:
        print(f"FAILED: {check}", file=sys.stderr)
    if not difference < READING_LIMIT:
        sys.exit(f"Activations differ by {difference:.1e} of their norm between Trimtab and steering-vectors.")
    if failed:
        sys.exit(f"{len(failed)} of {len(shared) + len(own)} comparisons are on the wrong side of {LIMIT}.")
    total = sum(int(check.sites) for check in shared if check.peer == "repeng")
    PAGE.write_text(page(folder, tables, sum(turned for _, turned in counted), total, difference), encoding="utf-8")
    print(f"All {len(shared) + len(own)} comparisons hold. Wrote docs/{PAGE.name}.")


if __name__ == "__main__":
    main()
