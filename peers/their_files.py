"""Save vectors as the peers do, and steer with them there, for `read_back.py` to do the same with Trimtab.

    python peers/their_files.py build/peers

Runs in the peers' own environment, on the random model that `ours.py` wrote; `make test-peers` runs it.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # before repeng imports tqdm

import torch
from repeng import ControlModel, ControlVector
from safetensors.torch import save_file
from steering_vectors import SteeringVector
from torch import Tensor
from transformers import AutoModelForCausalLM

MULTIPLIERS = (1.0, -0.7)
PROMPT = 5
"""Tokens of the prompt, of twelve in all: CAA adds from the prompt's last token on."""


def main() -> None:
    """Write the files, and the logits `[T, V]` of every file at every multiplier."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    place, source = folder / "files", folder / "pico-concise"
    place.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    vectors = {layer: 2 * torch.randn(width, generator=generator) for layer in range(layers)}
    ids = torch.randint(6, 250, (1, 12), generator=generator)
    logits = {"ids": ids}
    for name, run in {**steering_vectors(place, vectors), **caa(place, vectors), **repeng(place, vectors)}.items():
        for multiplier in MULTIPLIERS:
            with torch.no_grad():
                logits[f"{name} {multiplier}"] = run(model, ids, multiplier)[0].contiguous()
    with torch.no_grad():
        logits["bare"] = model(ids, use_cache=False).logits[0].contiguous()
    save_file(logits, place / "logits.safetensors")


Run = Callable[[Any, Tensor, float], Tensor]
"""Model, ids and multiplier to logits `[1, T, V]`."""


def steering_vectors(place: Path, vectors: dict[int, Tensor]) -> dict[str, Run]:
    """Save an object of steering-vectors in three ways."""
    vector = SteeringVector(vectors)
    torch.save(vector, place / "object.pt")
    torch.save(vector.layer_activations, place / "layers.pt")
    with (place / "object.pkl").open("wb") as file:
        pickle.dump(vector, file)

    def run(model: Any, ids: Tensor, multiplier: float) -> Tensor:
        with vector.apply(model, multiplier=multiplier):
            return model(ids, use_cache=False).logits

    return dict.fromkeys(("object.pt", "layers.pt", "object.pkl"), run)


def caa(place: Path, vectors: dict[int, Tensor]) -> dict[str, Run]:
    """Save one layer's vector as CAA's code does, which is no package, and add it where that code does."""
    torch.save(vectors[1], place / "vec_layer_1_pico.pt")

    def run(model: Any, ids: Tensor, multiplier: float) -> Tensor:
        def add(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            moved = hidden + multiplier * vectors[1] * (torch.arange(hidden.shape[1]) >= PROMPT - 1)[:, None]
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = model.model.layers[1].register_forward_hook(add)
        try:
            return model(ids, use_cache=False).logits
        finally:
            handle.remove()

    return {"vec_layer_1_pico.pt": run}


def repeng(place: Path, vectors: dict[int, Tensor]) -> dict[str, Run]:
    """Export a control vector of all layers but the first, as repeng trains them."""
    vector = ControlVector("llama", {layer: vectors[layer].numpy() for layer in sorted(vectors, reverse=True) if layer})
    vector.export_gguf(place / "happy.gguf")

    def run(model: Any, ids: Tensor, multiplier: float) -> Tensor:
        controlled = ControlModel(model, [*vector.directions])
        try:
            controlled.set_control(vector, multiplier)
            return controlled(ids, use_cache=False).logits
        finally:
            controlled.unwrap()

    return {"happy.gguf": run}


if __name__ == "__main__":
    main()
