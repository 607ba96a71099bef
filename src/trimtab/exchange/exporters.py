"""Write knobs at their strengths for other tools: GGUF, PEFT, a plain checkpoint; each product is read again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file

from trimtab.adapter import Adapter
from trimtab.addends import check_dose
from trimtab.artifact import AnyKnob, Knob, model_identity
from trimtab.artifact.identity import compare_identity
from trimtab.artifact.parts import LowRank
from trimtab.errors import KnobError, unknown_name
from trimtab.exchange.checkpoint import Compared, check_dtype, compare, write_checkpoint
from trimtab.exchange.constant import Constant, constant, new_folder, write_record
from trimtab.exchange.gguf import write_control_vector
from trimtab.exchange.lora import bias_parts, low_rank_sum, write_adapter
from trimtab.runtime import Dose
from trimtab.weights.source import ADAPTER, read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Exported(NamedTuple):
    """What was written, and how it compares with what was meant."""

    path: Path
    format: str
    facts: Mapping[str, Any]


def export(
    dose: Dose,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    to: str,
    out: str | Path,
    strict: bool = True,
) -> Exported:
    """Write a setting, as `{knob: 1.0}`, in the form of another tool, where that does exactly the same.

    `to` is one of `EXPORTS`:

    - "gguf": a control vector for llama.cpp and repeng, one vector per layer from 1 on; `out` is a file.
    - "peft": a LoRA adapter, of weight knobs of low rank, and of vectors as biases of its own (PEFT's `lora_bias`);
      `out` is a new folder. With weights in the model and PEFT installed, PEFT loads it, and logits are compared.
    - "checkpoint": a model folder like any other, vectors as biases of the blocks' last layers, differences of weights
      added; `out` is a new folder. A vector needs an architecture whose blocks end in a layer that has, or can be
      given, a bias. The model is loaded again and its logits are compared.

    All of them act on every token, and several knobs become their sum. For "gguf", and for weight knobs in "peft", the
    model may be without weights (torch's device "meta"). In 16 bits a knob may do less than rounding does, which brings
    a `TrimtabWarning`. Raises `KnobError` with the reason where a knob cannot be had in that form, and for a knob of
    another model (`strict=False` warns of another template or architecture, see `Knob.check`); `OptionError` where
    nothing is turned, and for a folder that holds something; `UnknownName` for another form; `MissingDependency`
    without the package `gguf`.
    """
    if to not in EXPORTS:
        raise unknown_name("form of export", to, EXPORTS)
    dose = check_dose(dose)
    Adapter(model).check_plain("exporting")
    for knob in dose:
        _check(knob, model, tokenizer, strict=strict)
    found = constant(dose)
    return Exported(Path(out), to, EXPORTS[to](Path(out), found, dose, model, tokenizer))


def _check(knob: AnyKnob, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, strict: bool) -> None:
    """Compare a knob with the model, as `Knob.check` does; the model may be without weights."""
    if isinstance(knob, Knob):
        knob.check(model, tokenizer, strict=strict, hashes=False)
    else:
        knob.check_shapes(model, loaded=False)
        compare_identity(knob.name, knob.provenance, model, tokenizer, strict=strict, hashes=False)


def _gguf(
    path: Path, found: Constant, dose: Dose, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    for knob in found.weights:
        raise KnobError(
            f"A control vector holds one vector per layer; knob {knob.name!r} is a difference of weights. Export it "
            "with to='peft', or as a checkpoint."
        )
    write_control_vector(path, found.addends, architecture=str(model.config.get_text_config().model_type))
    return {"layers": sorted(found.addends), "lengths": {i: float(v.norm()) for i, v in found.addends.items()}}


def _peft(
    folder: Path, found: Constant, dose: Dose, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    parts = low_rank_sum(found.weights, model)
    empty = next(model.parameters()).is_meta
    if not empty:
        check_dtype(model)
    biases = bias_parts(found.addends, Adapter(model)) if found.addends else {}
    known = next((knob.provenance.get("model") for knob in dose), None)
    base = str(known or model_identity(model, hashes=False)["model"])
    with new_folder(folder) as made:
        stored = write_adapter(made, parts, biases, model, base)
        write_record(made, dose, base)
        back = load_file(made / ADAPTER)
        if back.keys() != stored.keys() or not all(torch.equal(back[name], tensor) for name, tensor in stored.items()):
            raise KnobError(f"{str(folder)!r} holds another adapter than was written. The file system may be at fault.")
        if not biases:
            _check_adapter(made, parts)
        compared = None if empty or find_spec("peft") is None else _in_peft(made, dose, model)
    ranks = [part.rank for part in parts.values()]
    facts = {"weights": len(parts), "rank": max(ranks, default=0), "layers": sorted(found.addends)}
    return facts if compared is None else {**facts, **compared._asdict()}


def _check_adapter(folder: Path, parts: Mapping[str, LowRank]) -> None:
    """Raise `KnobError` where an adapter, with its scale, is another difference than was meant."""
    back = read_adapter(folder)
    if back.keys() != parts.keys() or not all(
        torch.allclose(back[name].dense(), part.dense(), rtol=1e-6, atol=0) for name, part in parts.items()
    ):
        raise KnobError(f"{str(folder)!r} holds another difference than was meant, by its own configuration.")


def _in_peft(folder: Path, dose: Dose, model: PreTrainedModel) -> Compared:
    """Load an adapter by PEFT on a copy of the model, which PEFT changes, and compare."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what cannot be merged later on
        try:
            adapted = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
            said = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
            raise KnobError(f"PEFT does not take an adapter at this place: {said}. Export a checkpoint.") from None
    return compare(model, dose, adapted)


def _checkpoint(
    folder: Path, found: Constant, dose: Dose, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    compared = write_checkpoint(folder, found, dose, model, tokenizer)
    return {
        "layers": sorted(found.addends),
        "weights": len({n for k in found.weights for n in k.parts}),
        **compared._asdict(),
    }


EXPORTS: dict[str, Callable[[Path, Constant, Dose, Any, Any], dict[str, Any]]] = {
    "gguf": _gguf,
    "peft": _peft,
    "checkpoint": _checkpoint,
}
