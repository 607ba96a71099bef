"""The ways of the peers, repeng and steering-vectors, in their own environment (`.venv-peers`)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from repeng import ControlModel, ControlVector, DatasetEntry
from steering_vectors import SteeringVector, train_steering_vector
from torch import Tensor

from benchmarks import bare
from benchmarks.models import model_of, steered_layers, tokenizer, vectors
from benchmarks.ways import Way, directly


def capturing(options: dict[str, Any]) -> dict[str, Way]:
    """Read all layers of pairs, at the last token, with the peers' defaults."""
    model, pairs = model_of(options), bare.joined(bare.texts_of(options))
    entries = [DatasetEntry(*pair) for pair in pairs]

    def repeng() -> None:
        layers = range(model.config.num_hidden_layers)  # by itself it leaves out layer 0
        ControlVector.train(model, tokenizer(), entries, hidden_layers=layers)

    return {
        "bare": bare.reading(options),
        "repeng": directly(repeng),
        "steering-vectors": directly(lambda: train_steering_vector(model, tokenizer(), pairs)),
        "steering-vectors, batch 32": directly(
            lambda: train_steering_vector(model, tokenizer(), pairs, batch_size=32),
        ),
    }


@contextmanager
def controlled(model: Any, added: Mapping[int, Tensor]) -> Generator[Any]:
    """Wrap a model's blocks as repeng does, and unwrap them."""
    wrapped = ControlModel(model, [*added])
    try:
        wrapped.set_control(ControlVector("llama", {layer: vector.numpy() for layer, vector in added.items()}))
        yield wrapped
    finally:
        wrapped.unwrap()


@contextmanager
def patched(model: Any, added: Mapping[int, Tensor]) -> Generator[Any]:
    """Add vectors by steering-vectors' hooks."""
    own = {layer: vector.to(model.device, model.dtype) for layer, vector in added.items()}
    with SteeringVector(own).apply(model):
        yield model


STEERED = {"repeng": controlled, "steering-vectors": patched}


def steered(options: dict[str, Any], plain: Way, run: Callable[[Any], Tensor]) -> dict[str, Way]:
    """Run what is run plainly under each peer; turning the vector on and off counts."""
    model = model_of(options)
    added = vectors(steered_layers(model.config.num_hidden_layers), model.config.hidden_size)

    def under(peer: Callable[..., Any]) -> Way:
        def action() -> Tensor:
            with peer(model, added) as turned:
                return run(turned)

        return directly(action)

    return {"plain": plain, **{name: under(peer) for name, peer in STEERED.items()}}


def generating(options: dict[str, Any]) -> dict[str, Way]:
    """Generate with one vector at four layers."""
    ids = bare.ids_of(options)
    return steered(options, bare.generating(options), lambda model: bare.generate(model, ids, options["new"]))


def scoring(options: dict[str, Any]) -> dict[str, Way]:
    """Compute logits with one vector at four layers."""
    ids = bare.ids_of(options)
    return steered(options, bare.scoring(options), lambda model: bare.score(model, ids))


KINDS = {"capture": capturing, "generate": generating, "score": scoring}
