"""Make knobs of what other tools wrote: control vectors, pickled vectors, LoRA adapters."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.artifact import DeltaKnob, Knob, model_identity
from trimtab.artifact.checks import check_knob_name
from trimtab.capture import residual_norms
from trimtab.checkpoint import versions
from trimtab.errors import KnobError, OptionError, TrimtabWarning, brief, unknown_name
from trimtab.exchange.gguf import read_control_vector
from trimtab.exchange.neutral import neutral_pairs
from trimtab.exchange.pickles import load_pickled, tensors_by_layer
from trimtab.files import open_regular, reason
from trimtab.pairs import Pairs
from trimtab.types import Site, Where
from trimtab.weights import difference
from trimtab.weights.source import ADAPTER, adapter_base

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
KINDS = {
    "gguf": ("gguf", "repeng", "llama.cpp"),
    "steering-vectors": ("steering-vectors", "caa", "bipo"),
    "persona-vectors": ("persona-vectors",),
    **dict.fromkeys(("caa", "bipo"), ("caa", "bipo", "steering-vectors")),
}
"""Which sources a file may be said to be of, by the one it looks like."""


class _Read(NamedTuple):
    """What a file holds: vectors by layer, in Trimtab's numbering, and which tool is likely to have written it."""

    vectors: dict[int, Tensor]
    source: str
    facts: Mapping[str, object] = {}


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
    read = _read_file(path, layer, adapter)
    _check(read.vectors, adapter, path)
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


# Files


def _read_file(path: Path, layer: int | None, adapter: Adapter) -> _Read:
    start, count = _start(path), adapter.n_layers
    if start[:4] == b"GGUF" or path.suffix == ".gguf":
        read = read_control_vector(path)
        facts = {key: value for key, value in read.fields.items() if len(str(value)) <= 200}
        return _Read(read.vectors, "gguf", facts)
    if start[8:9] == b"{":
        raise KnobError(
            f"{brief(str(path), 240)} is a safetensors file: a knob is loaded as it is, and an adapter is imported by "
            "its folder, with adapter_config.json."
        )
    value = load_pickled(path)
    by_layer = tensors_by_layer(value)
    if by_layer is not None:
        return _Read(_by_layer(by_layer, path, adapter), "steering-vectors")
    if not isinstance(value, Tensor):
        raise KnobError(
            f"{brief(str(path), 240)} holds {brief(value)}; expected a tensor, tensors by layer, or an object of "
            "steering-vectors."
        )
    if value.dim() == 2 and value.shape[0] > 1:
        if value.shape[0] != count + 1:
            raise KnobError(
                f"{brief(str(path), 240)} holds {value.shape[0]} rows; a stack of hidden_states of this "
                f"{type(adapter.model).__name__} has {count + 1}, one more than it has layers."
            )
        rows = {number - 1: _vector(value[number], path, adapter) for number in range(1, count)}
        return _Read(rows, "persona-vectors", {"rows": count + 1})
    vector, told = _vector(value, path, adapter), _layer_in(path)
    number = told if layer is None else adapter.layer(layer)
    if number is None:
        raise OptionError(f"Neither {path.name!r} nor an option says which layer it is for. Pass layer=NUMBER.")
    facts = {} if told in (None, number) else {"layer_in_name": told}
    return _Read({adapter.layer(number): vector}, "bipo" if re.match(r"vec_ep\d", path.name) else "caa", facts)


def _start(path: Path) -> bytes:
    try:
        with open_regular(path) as (file, _):
            return file.read(16)
    except OSError as error:
        raise KnobError(f"Cannot read {brief(str(path), 240)}: {reason(error)}.") from None


def _by_layer(entries: Mapping[object, object], path: Path, adapter: Adapter) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for key, value in entries.items():
        key = int(key) if isinstance(key, str) and re.fullmatch(r"[0-9]{1,4}", key) else key
        if not isinstance(key, int) or isinstance(key, bool) or key < 0:
            raise KnobError(f"{brief(str(path), 240)} maps {brief(key)} to something; expected numbers of layers.")
        if key >= adapter.n_layers:
            raise _of_another(path, f"a vector for layer {key}", adapter)
        found[key] = _vector(value, path, adapter)
    if not found:
        raise KnobError(f"{brief(str(path), 240)} holds no vectors.")
    return dict(sorted(found.items()))


def _vector(value: object, path: Path, adapter: Adapter) -> Tensor:
    """Return a vector `[D]` of the model's width in float32; `[1, D]` is one too.

    Sizes are looked at first: a tensor may claim more than the file holds.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_sparse or value.is_quantized:
        raise KnobError(f"{brief(str(path), 240)} holds {type(value).__name__} where a vector of floats is expected.")
    if value.dim() not in (1, 2) or value.numel() != value.shape[-1]:
        raise KnobError(f"{brief(str(path), 240)} holds a tensor of shape {brief(list(value.shape))}; a vector is [D].")
    if value.numel() != adapter.hidden_size:
        raise _of_another(path, f"a vector of width {value.numel()}", adapter)
    vector = value.detach().reshape(-1).float().clone()
    if not bool(torch.isfinite(vector).all()):
        raise KnobError(f"{brief(str(path), 240)} holds values that are not finite.")
    return vector


def _layer_in(path: Path) -> int | None:
    """Return the layer that a file's name tells, as CAA (`vec_layer_13_...`) and BiPO (`vec_ep5_layer13`) write it."""
    found = re.search(r"layer_?(\d{1,4})(?!\d)", path.stem)
    return int(found[1]) if found else None


def _check(vectors: Mapping[int, Tensor], adapter: Adapter, path: Path) -> None:
    """Raise `KnobError` for vectors that are not this model's, or do nothing."""
    width, top = len(next(iter(vectors.values()))), max(vectors)
    if width != adapter.hidden_size or top >= adapter.n_layers:
        raise _of_another(path, f"vectors of width {width} up to layer {top}", adapter)
    if not any(bool(vector.any()) for vector in vectors.values()):
        raise KnobError(f"{brief(str(path), 240)} holds zeros only: nothing would change at any strength.")


def _of_another(path: Path, what: str, adapter: Adapter) -> KnobError:
    return KnobError(
        f"{brief(str(path), 240)} holds {what}; this {type(adapter.model).__name__} has hidden size "
        f"{adapter.hidden_size} and layers 0 to {adapter.n_layers - 1}. They are of another model."
    )


def _active(vectors: Mapping[Site, Tensor], layer: int, adapter: Adapter) -> Site:
    site = Site(adapter.layer(layer), POSITION)
    if site not in vectors:
        known = ", ".join(str(site.layer) for site in vectors)
        raise OptionError(f"The file has no vector for layer {layer}; it has them for {known}.")
    return site


def _doubts(source: str, read: _Read, adapter: Adapter) -> list[str]:
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
    knob = difference(folder, None, name=name, method="peft")
    knob.check_shapes(model)
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
