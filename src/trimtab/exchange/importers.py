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

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POSITION = "imported"
"""The position of sites whose vectors were read by another tool."""
MANY_LAYERS = 10_000


class Source(NamedTuple):
    """A tool whose vectors are read."""

    paper: str
    together: bool
    """Whether its vectors act at all their layers at once; else they are candidates, one of which is taken."""
    where: Where = "all"
    """Tokens to which it adds them."""


SOURCES = {
    "repeng": Source("arXiv:2310.01405", together=True),
    "llama.cpp": Source("", together=True),
    "steering-vectors": Source("arXiv:2312.06681", together=True),
    "caa": Source("arXiv:2312.06681", together=False, where="completion"),
    "bipo": Source("arXiv:2406.00045", together=False),
    "persona-vectors": Source("arXiv:2507.21509", together=False),
    "peft": Source("", together=False),
}
"""Tools by name. All of them number layers as Trimtab does, except persona-vectors: see `import_knob`."""


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
    - One vector `[D]` as `torch.save` wrote it, of CAA or BiPO; its layer is in the file's name, or is `layer`. CAA
      adds it from the instruction's last token on: where is "completion". Everything else acts on all tokens.
    - A stack `[n_layers + 1, D]` of persona vectors: row k is `hidden_states[k]` and so layer k - 1; the first row, of
      the embeddings, and the last, which was read after the final norm, are left out. `layer` says which one acts.
    - A PEFT LoRA adapter, a folder: a weight knob.

    `source` is one of `SOURCES`, for what the file does not tell. With `layer` a knob of several layers acts at that
    one alone, and the others stay candidates, for `tune`. Norms, without which a vector has no alpha, are read over the
    answers of `pairs`, by default over neutral ones. Nothing is run: pickles that name anything but tensors are refused
    unopened. `provenance["imported"]` says where the knob comes from. Raises `KnobError` for what is not read, and for
    vectors of another model.
    """
    path = Path(path)
    check_source(source)
    label = name or re.sub(r"[\s,=]+", "-", path.stem)[:100]
    check_knob_name(label)
    if path.is_dir():
        return _import_adapter(path, model, tokenizer, label, source, layer, licence)
    adapter = Adapter(model)
    read = _read_file(path, source, layer, adapter.n_layers)
    _check(read.vectors, adapter, path)
    found = source or read.source
    norms = residual_norms(model, tokenizer, neutral_pairs() if pairs is None else pairs, sorted(read.vectors))
    vectors = {Site(number, POSITION): vector for number, vector in read.vectors.items()}
    lengths = {site: float(vector.double().norm()) / norms[site.layer] for site, vector in vectors.items()}
    main = max(lengths, key=lambda site: lengths[site]) if layer is None else _active(vectors, layer, adapter)
    if layer is None and not SOURCES[found].together and len(vectors) > 1:
        raise OptionError(
            f"{brief(str(path), 240)} holds a vector for each of {len(vectors)} layers, of which one is to act. Say "
            f"which: layer={min(vectors).layer} to {max(vectors).layer}."
        )
    notes = _doubts(found, read.vectors, adapter)
    for note in notes:
        warnings.warn(note, TrimtabWarning, stacklevel=2)
    return Knob(
        name=label,
        method=found,
        vectors=vectors,
        norms=norms,
        site=main,
        gain=lengths[main],
        where=SOURCES[found].where,
        also=() if layer is not None else tuple(site for site in vectors if site != main),
        provenance={**_identity(model, tokenizer, found, licence), "imported": _origin(path, found, read.facts)},
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


def _read_file(path: Path, source: str | None, layer: int | None, n_layers: int) -> _Read:
    start = _start(path)
    if start[:4] == b"GGUF":
        read = read_control_vector(path)
        wrote = "llama.cpp" if source == "llama.cpp" else "repeng"
        return _Read(read.vectors, wrote, {key: value for key, value in read.fields.items() if len(str(value)) <= 200})
    if start[8:9] == b"{":
        raise KnobError(
            f"{brief(str(path), 240)} is a safetensors file: a knob is loaded as it is, and an adapter is imported by "
            "its folder, with adapter_config.json."
        )
    value = load_pickled(path)
    by_layer = tensors_by_layer(value)
    if by_layer is not None:
        return _Read(_by_layer(by_layer, path), "steering-vectors")
    if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == n_layers + 1 > 2:
        rows = {number - 1: _vector(value[number], path) for number in range(1, n_layers)}
        return _Read(rows, "persona-vectors", {"rows": n_layers + 1})
    if isinstance(value, Tensor):
        number = _layer_in(path) if layer is None else layer
        if number is None:
            raise OptionError(
                f"Neither {path.name!r} nor an option says which layer this vector is for. Pass layer=NUMBER."
            )
        vector = {number % n_layers if -n_layers <= number < 0 else number: _vector(value, path)}
        return _Read(vector, "bipo" if re.match(r"vec_ep\d", path.name) else "caa")
    raise KnobError(
        f"{brief(str(path), 240)} holds {brief(value)}; expected a tensor, tensors by layer, or an object of "
        "steering-vectors."
    )


def _start(path: Path) -> bytes:
    try:
        with open_regular(path) as (file, _):
            return file.read(16)
    except OSError as error:
        raise KnobError(f"Cannot read {brief(str(path), 240)}: {reason(error)}.") from None


def _by_layer(entries: Mapping[object, object], path: Path) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for key, value in entries.items():
        if not isinstance(key, int) or isinstance(key, bool) or not 0 <= key < MANY_LAYERS:
            raise KnobError(f"{brief(str(path), 240)} maps {brief(key)} to something; expected numbers of layers.")
        found[key] = _vector(value, path)
    if not found:
        raise KnobError(f"{brief(str(path), 240)} holds no vectors.")
    return dict(sorted(found.items()))


def _vector(value: object, path: Path) -> Tensor:
    """Return a vector `[D]` in float32; `[1, D]` is one too."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_sparse or value.is_quantized:
        raise KnobError(f"{brief(str(path), 240)} holds {type(value).__name__} where a vector of floats is expected.")
    if value.dim() > 2 or value.numel() != value.shape[-1] or not 0 < value.numel() < 2**24:
        raise KnobError(f"{brief(str(path), 240)} holds a tensor of shape {brief(list(value.shape))}; a vector is [D].")
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
        raise KnobError(
            f"{brief(str(path), 240)} holds vectors of width {width} up to layer {top}; this "
            f"{type(adapter.model).__name__} has hidden size {adapter.hidden_size} and layers 0 to "
            f"{adapter.n_layers - 1}. They are of another model."
        )
    if not any(bool(vector.any()) for vector in vectors.values()):
        raise KnobError(f"{brief(str(path), 240)} holds zeros only: nothing would change at any strength.")


def _active(vectors: Mapping[Site, Tensor], layer: int, adapter: Adapter) -> Site:
    site = Site(adapter.layer(layer), POSITION)
    if site not in vectors:
        known = ", ".join(str(site.layer) for site in vectors)
        raise OptionError(f"The file has no vector for layer {layer}; it has them for {known}.")
    return site


def _doubts(source: str, vectors: Mapping[int, Tensor], adapter: Adapter) -> list[str]:
    last = adapter.n_layers - 1
    if source == "repeng" and last in vectors:
        return [
            f"repeng reads layer {last}, the last one, after the final norm, and adds its vector before it: what is "
            "read there is not what is steered."
        ]
    return []


# Adapters


def _import_adapter(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    source: str | None,
    layer: int | None,
    licence: str | None,
) -> DeltaKnob:
    if source not in (None, "peft") or layer is not None:
        raise OptionError(f"{str(folder)!r} is a folder, as a PEFT adapter is, which has neither source nor layer.")
    if not (folder / "adapter_config.json").is_file():
        raise KnobError(
            f"{brief(str(folder), 240)} is a folder without adapter_config.json, and so no PEFT adapter. A model "
            "becomes a knob by `trimtab learn --method alignment-vector --plus`."
        )
    told = {**_identity(model, tokenizer, "peft", licence), "imported": _origin(folder, "peft", {})}
    knob = difference(folder, None, name=name, method="peft", provenance=told)
    knob.check_shapes(model)
    return knob


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


def _origin(path: Path, source: str, facts: Mapping[str, object]) -> dict[str, Any]:
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(2**20), b""):
            digest.update(block)
    return {
        "from": source,
        "file": path.name,
        "sha256": digest.hexdigest(),
        **({"fields": dict(facts)} if facts else {}),
    }
