"""Write what Trimtab reads and learns, for `theirs.py` to compare in the peers' own environment.

    python peers/ours.py build/peers

One folder per source (a model and pairs): the model and its tokenizer, the texts, and a safetensors file of
activations and vectors. `make test-peers` runs this and then `theirs.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.capture import capture
from trimtab.methods import METHODS
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.render import Loaded, Renderer, load
from trimtab.texts import FORMATS

ROOT = Path(__file__).resolve().parent.parent
POSITIONS = {"question_response": "last", "response_as_user": "post_instruction"}
VECTORS = {"diffmean": ("diffmean", {}), "pca": ("pca", {}), "pca_center": ("pca", {"center": True})}


def sources() -> dict[str, tuple[Loaded, Pairs]]:
    """Return the models and pairs to compare on; the first model is random and knows single characters only."""
    sys.path.append(str(ROOT / "tests"))
    import pico

    bundled = load("prefworld")
    return {
        "pico, concise": (Loaded(pico.model("llama"), pico.tokenizer()), world.pairs("concise")),
        "prefworld, code": (bundled, world.pairs("code")),
        "prefworld, risk": (bundled, world.pairs("risk")),
    }


def evidence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Pairs) -> dict[str, Tensor]:
    """Return activations `[N, S, D]` and vectors `[S, D]` by "format.what"; sites are layers x positions.

    "normed" is the last layer of "question_response" after the model's final norm: what repeng reads there.
    """
    sides: dict[str, tuple[Tensor, Tensor]] = {}
    for form in FORMATS:
        read = capture(model, tokenizer, pairs, positions=[POSITIONS[form]], format=form)
        sides[form] = read.chosen, read.rejected
    norm = model.get_submodule("model.norm")
    with torch.no_grad():
        chosen, rejected = (norm(acts[:, -1:]) for acts in sides["question_response"])
    sides["normed"] = chosen, rejected
    tensors: dict[str, Tensor] = {}
    for form, (chosen, rejected) in sides.items():
        tensors |= {f"{form}.chosen": chosen, f"{form}.rejected": rejected}
        for name, (method, options) in VECTORS.items():
            tensors[f"{form}.{name}"] = METHODS[method].run(chosen, rejected, options)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def texts(tokenizer: PreTrainedTokenizerBase, pairs: Pairs) -> dict[str, list[dict[str, object]]]:
    """Return each side's rendered texts up to the answer's last token, with the ids that a tokenizer must find."""
    renderer = Renderer(tokenizer)
    found: dict[str, list[dict[str, object]]] = {"chosen": [], "rejected": []}
    for pair in pairs:
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            full = renderer.full(pair.prompt, answer)
            ids = full.ids[: full.response_end]
            found[side].append({"text": tokenizer.decode(ids), "ids": ids})
    return found


def main() -> None:
    """Write every source."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for name, ((model, tokenizer), pairs) in sources().items():
        place = folder / name.replace(", ", "-")
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        save_file(evidence(model, tokenizer, pairs), place / "evidence.safetensors")
        special = {key: getattr(tokenizer, key) for key in ("pad_token", "bos_token", "eos_token")}
        about = {"source": name, "special": special, "texts": texts(tokenizer, pairs)}
        (place / "about.json").write_text(json.dumps(about), encoding="utf-8")
    versions = {package: version(package) for package in ("trimtab", "torch", "transformers")}
    (folder / "versions.json").write_text(json.dumps(versions), encoding="utf-8")


if __name__ == "__main__":
    main()
