"""Make knobs of what other tools wrote: control vectors, pickled vectors, LoRA adapters."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.artifact import DeltaKnob, Knob, model_identity
from trimtab.artifact.checks import check_knob_name
from trimtab.artifact.parts import check_fit
from trimtab.capture import residual_norms
from trimtab.checkpoint import versions
from trimtab.errors import KnobError, OptionError, TrimtabWarning, brief, unknown_name
from trimtab.exchange.foreign import KINDS, Read, read_vectors
from trimtab.exchange.neutral import neutral_pairs
from trimtab.files import open_regular
from trimtab.pairs import Pairs
from trimtab.types import Site, Where
from trimtab.weights import difference
from trimtab.weights.source import ADAPTER, adapter_base, read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POSITION = "imported"
"""The position of sites whose vectors were read by another tool."""


class Source(NamedTuple):
    """A tool whose vectors are read."""

    paper: str
    together: bool
    """Whether its vectors act at all their layers at once; else they are candidates, one of which is taken."""
    where: Where = "all"
    """Tokens to which it adds them."""


SOURCES = {
    "gguf": Source("", together=True),  # a control vector that does not say who wrote it
    "repeng": Source("arXiv:2310.01405", together=True),
    "llama.cpp": Source("", together=True),
    "steering-vectors": Source("arXiv:2312.06681", together=True),
    "caa": Source("arXiv:2312.06681", together=False, where="completion"),
    "bipo": Source("arXiv:2406.00045", together=False),
    "persona-vectors": Source("arXiv:2507.21509", together=False, where="completion"),
    "peft": Source("", together=False),
}
"""Tools by name. All of them number layers as Trimtab does, except persona-vectors: see `import_knob`."""


def import_knob(
    path: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str | None = None,
    source: str | None = None,
    layer: int | None = None,
    pairs: Pairs | None = None,
    licence: str | None = None,
) -> Knob | DeltaKnob:
    """Make a knob of what another tool wrote; strength 1 is that tool's coefficient 1.

    - A GGUF control vector, of repeng or llama.cpp: `direction.L` is layer L, all layers act at once.
    - An object of steering-vectors, or its dictionary of layers, as `torch.save` or `pickle.dump` wrote it.
    - One vector `[D]` as `torch.save` wrote it, of CAA or BiPO; its layer is in the file's name, or is `layer`.
    - A stack `[n_layers + 1, D]` of persona vectors: row k is `hidden_states[k]` and so layer k - 1; the first row, of
      the embeddings, and the last, which was read after the final norm, are left out. `layer` says which one acts.
      CAA and persona vectors are added from the prompt's last token on: where is "completion". The others act on all.
    - A PEFT LoRA adapter, a folder: a weight knob.

    `source` is one of `SOURCES`, for what the file does not tell; another than the file tells is refused. With `layer`
    a knob of several layers acts at that one alone, and the others stay candidates, for `tune`. Norms, without which a
    vector has no alpha, are read over the answers of `pairs`, by default over neutral ones. Nothing is run: pickles
    that name anything but tensors are refused unopened. `provenance["imported"]` says where the knob comes from. Raises
    `KnobError` for what is not read, and for vectors of another model; `OptionError` for options that do not fit the
    file; `UnknownName` for another source.
    """
    path = Path(path)
    check_source(source)
    if layer is not None and type(layer) is not int:
        raise OptionError(f"layer is a number; got {brief(layer)}.")
    label = re.sub(r"[\s,=]+", "-", path.stem)[:100] if name is None else str(name)
    check_knob_name(label)
    if path.is_dir():
        if source not in (None, "peft") or layer is not None or pairs is not None:
            raise OptionError(f"{str(path)!r} is a folder, as a PEFT adapter is, which has no source, layer or pairs.")
        return _import_adapter(path, model, tokenizer, label, licence)
    return _import_vectors(path, model, tokenizer, label, source, layer, pairs, licence)


def _import_vectors(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    source: str | None,
    layer: int | None,
    pairs: Pairs | None,
    licence: str | None,
) -> Knob:
    adapter = Adapter(model)
    read = read_vectors(path, layer, adapter)
    found = source or read.source
    if found not in KINDS[read.source]:
        raise OptionError(
            f"{brief(str(path), 240)} is a file as {read.source} writes it, and not one of {found}. Leave source out."
        )
    norms = residual_norms(model, tokenizer, neutral_pairs() if pairs is None else pairs, sorted(read.vectors))
    vectors = {Site(number, POSITION): vector for number, vector in read.vectors.items()}
    lengths = {site: float(vector.double().norm()) / norms[site.layer] for site, vector in vectors.items()}
    main = max(lengths, key=lambda site: lengths[site]) if layer is None else _active(vectors, layer, adapter)
    if layer is None and not SOURCES[found].together and len(vectors) > 1:
        raise OptionError(
            f"{brief(str(path), 240)} holds a vector for each of {len(vectors)} layers, of which one is to act. Say "
            f"which: layer={min(vectors).layer} to {max(vectors).layer}."
        )
    if not lengths[main]:
        raise KnobError(f"The vector of layer {main.layer} is zero: nothing would change at any strength.")
    notes = _doubts(found, read, adapter)
    for note in notes:
        warnings.warn(note, TrimtabWarning, stacklevel=3)
    return Knob(
        name=name,
        method=found,
        vectors=vectors,
        norms=norms,
        site=main,
        gain=lengths[main],
        where=SOURCES[found].where,
        also=() if layer is not None else tuple(site for site in vectors if site != main),
        provenance={
            **_identity(model, tokenizer, found, licence),
            "imported": _origin(path, path.name, found, read.facts),
        },
        diagnostics={
            "raw_alphas": {str(site): length for site, length in lengths.items()},
            "norms_from": "neutral pairs" if pairs is None else f"{len(pairs)} pairs, sha256 {pairs.hash()}",
            "warnings": notes,
        },
    )


def check_source(source: str | None) -> None:
    """Raise `UnknownName` for a tool that is not known; None is for what the file tells."""
    if source is not None and source not in SOURCES:
        raise unknown_name("source", source, SOURCES)


# Vectors


def _active(vectors: Mapping[Site, Tensor], layer: int, adapter: Adapter) -> Site:
    site = Site(adapter.layer(layer), POSITION)
    if site not in vectors:
        known = ", ".join(str(site.layer) for site in vectors)
        raise OptionError(f"The file has no vector for layer {layer}; it has them for {known}.")
    return site


def _doubts(source: str, read: Read, adapter: Adapter) -> list[str]:
    """Say what about the file may not be as it seems."""
    notes: list[str] = []
    last, hint = adapter.n_layers - 1, read.facts.get("controlvector.model_hint")
    if source in ("gguf", "repeng") and last in read.vectors:
        told = "repeng" if source == "repeng" else "If repeng wrote it: that"
        notes.append(
            f"{told} reads layer {last}, the last one, after the final norm, and adds its vector before it, so that "
            "what was read there is not what is steered."
        )
    own = adapter.text_config.model_type
    if isinstance(hint, str) and hint and hint != own:
        notes.append(f"The file was made for a model of type {brief(hint)}; this one is {own}.")
    if "layer_in_name" in read.facts:
        notes.append(f"The file's name says layer {read.facts['layer_in_name']}, and it is taken for another one.")
    return notes


# Adapters


def _import_adapter(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, licence: str | None
) -> DeltaKnob:
    if not (folder / "adapter_config.json").is_file():
        raise KnobError(
            f"{brief(str(folder), 240)} is a folder without adapter_config.json, and so no PEFT adapter. A model "
            "becomes a knob by `trimtab learn --method alignment-vector --plus`."
        )
    if not (folder / ADAPTER).is_file():
        pickled = " Its weights are a pickle, which is never opened." if (folder / "adapter_model.bin").exists() else ""
        raise KnobError(
            f"{brief(str(folder), 240)} holds no {ADAPTER}.{pickled} Load it by PEFT and save it again, as safetensors."
        )
    check_fit(name, read_adapter(folder), model)  # before anything is multiplied
    knob = difference(folder, None, name=name, method="peft")
    if not knob.norm():
        raise KnobError(f"{brief(str(folder), 240)} is an adapter of zeros: nothing would change at any strength.")
    base, own = adapter_base(folder), str(model_identity(model, hashes=False)["model"])
    if base and Path(base).name != Path(own).name:
        warnings.warn(
            f"The adapter was trained on {brief(base)}; this model is {brief(own)}. Shapes fit; no more is known.",
            TrimtabWarning,
            stacklevel=3,
        )
    origin = _origin(folder / ADAPTER, folder.name, "peft", {"base_model": base} if base else None)
    told = {**_identity(model, tokenizer, "peft", licence), "imported": origin}
    return knob.with_(provenance=told)


# Provenance


def _identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, licence: str | None
) -> dict[str, Any]:
    return {
        "paper": SOURCES[source].paper or None,
        **model_identity(model, tokenizer),
        "tool": f"trimtab {versions()['trimtab']}",
        "licence": licence,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _origin(file: Path, name: str, source: str, facts: Mapping[str, object] | None = None) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open_regular(file) as (stream, _):
        for block in iter(lambda: stream.read(2**20), b""):
            digest.update(block)
    fields = {"fields": dict(facts)} if facts else {}
    return {"from": source, "file": name, "sha256": digest.hexdigest(), **fields}
