"""Which model a knob was learned on, and whether the model at hand is that one."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.adapter import Adapter
from trimtab.errors import KnobError, TrimtabWarning, printable
from trimtab.render import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IDENTITY = {
    "model": "model",
    "revision": "revision of the model",
    "architecture": "architecture",
    "hidden_size": "hidden size",
    "n_layers": "number of layers",
    "config_hash": "configuration",
    "template_hash": "chat template",
    "tokenizer_hash": "vocabulary",
}
"""What `model_identity` returns, and what messages call it."""

_REFUSED = ("architecture", "template_hash")
_WARNED = ("revision", "n_layers", "config_hash", "tokenizer_hash")
# Settings that vary without changing what the model computes.
_VOLATILE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def model_identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, hashes: bool = True
) -> dict[str, Any]:
    """Return what a knob remembers of its model: id, revision, architecture, sizes and hashes.

    A model loaded from a folder is known by the folder's name, so that files name no path of the machine.
    `template_hash` is None where the tokenizer has no template, or none was given; without `hashes` the two that take
    time, of configuration and vocabulary, are None as well.
    """
    adapter = Adapter(model)
    config = model.config.get_text_config()
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in _VOLATILE}
    name = str(model.config.name_or_path)
    renderer = Renderer(tokenizer) if tokenizer is not None else None
    return {
        "model": (Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name) or type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": str(config.model_type),
        "hidden_size": adapter.hidden_size,
        "n_layers": adapter.n_layers,
        "config_hash": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        if hashes
        else None,
        "template_hash": renderer.template_hash() if renderer else None,
        "tokenizer_hash": renderer.tokenizer_hash() if renderer and hashes else None,
    }


def check_identity(
    knob: str,
    width: int,
    top_layer: int,
    learned: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    strict: bool,
    hashes: bool,
) -> None:
    """Compare the identity a knob remembers, in part or whole, with a model; see `Knob.check`."""
    here = model_identity(model, tokenizer, hashes=hashes)
    if width != here["hidden_size"] or top_layer >= here["n_layers"]:
        raise KnobError(
            f"Knob {knob!r} was learned on {_describe(learned)}; it has width {width} and reaches layer {top_layer}. "
            f"This model is {_describe(here)}. Learn the knob on this model."
        )
    _compare(knob, learned, here, tokenizer, strict=strict)


def compare_identity(
    knob: str,
    learned: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    strict: bool,
    hashes: bool,
) -> None:
    """Compare the identity a weight knob remembers with a model; its shapes are compared elsewhere."""
    _compare(knob, learned, model_identity(model, tokenizer, hashes=hashes), tokenizer, strict=strict)


def _compare(
    knob: str,
    learned: Mapping[str, Any],
    here: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    strict: bool,
) -> None:
    # A tokenizer without a template differs from the one with which the knob was learned; no tokenizer says nothing.
    unknown = {"template_hash", "tokenizer_hash"} if tokenizer is None else set[str]()
    for key in (*_REFUSED, *_WARNED):
        ours, theirs = learned.get(key), here[key]
        silent = ours is None if key != "template_hash" else key not in learned
        if key in unknown or silent or ours == theirs or (theirs is None and key != "template_hash"):
            continue
        if key == "architecture":
            unknown |= {"n_layers", "config_hash"}  # another architecture has another configuration; said once
        if key == "n_layers":
            unknown |= {"config_hash"}
        message = (
            f"Knob {knob!r} was learned with another {IDENTITY[key]}: {said(ours)}; this model has {said(theirs)}."
        )
        if key in _REFUSED and strict:
            raise KnobError(f"{message} Learn it again here, or pass strict=False to use it all the same.")
        warnings.warn(message, TrimtabWarning, stacklevel=4)


def said(value: object) -> str:
    """Write a value of an identity as it may stand in a message; it may come from a file of others."""
    text = printable(str(value))
    return text[:12] if len(text) == 64 else text if len(text) <= 60 else f"{text[:57]}..."  # 64: a sha256


def _describe(identity: Mapping[str, Any]) -> str:
    name, architecture = identity.get("model") or "an unnamed model", identity.get("architecture") or "unknown"
    sizes = f"hidden size {said(identity.get('hidden_size'))}, {said(identity.get('n_layers'))} layers"
    return f"{said(name)} ({said(architecture)}, {sizes})"
