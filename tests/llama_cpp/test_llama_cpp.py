"""Exports in a llama.cpp that was really built: `make test-llama-cpp`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import load
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import pico
from trimtab.adapter import Adapter
from trimtab.artifact import Knob
from trimtab.errors import KnobError
from trimtab.exchange import export, import_knob
from trimtab.runtime import steer
from trimtab.types import Site

if TYPE_CHECKING:
    import llama_model

pytestmark = pytest.mark.llama_cpp
LAYERS, WIDTH = load.LAYERS, load.WIDTH
TOLERANCE = 1e-4
"""Of logits, in float32."""


@pytest.fixture(scope="module")
def own() -> PreTrainedModel:
    return load.model()


@pytest.fixture(scope="module")
def runner(own: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama_model.Runner]:
    import llama_model

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    llama_model.write_model(path, own)
    with llama_model.opened(path) as opened:
        yield opened


def wide_knob(layer: int, *, gain: float = 1.0, seed: int = 0) -> Knob:
    return pico.knob(layer, width=WIDTH, norm=12.0, gain=gain, seed=seed)


IDS = pico.prompts([9])[0]


@torch.no_grad()
def hooked(own: PreTrainedModel, knob: Knob | None = None, strength: float = 1.0) -> Tensor:
    with steer(own, {} if knob is None else {knob: strength}):
        return own(torch.tensor([IDS]), use_cache=False).logits[0]


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_the_file_is_the_model(own: PreTrainedModel, runner: llama_model.Runner) -> None:
    runner.steer({})
    assert gap(runner.logits(IDS), hooked(own)) < TOLERANCE


@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_direction_l_is_added_to_the_output_of_block_l_and_of_no_other(
    own: PreTrainedModel, runner: llama_model.Runner, layer: int, tmp_path: Path
) -> None:
    import llama_model

    knob = wide_knob(layer)
    export({knob: 0.7}, own, pico.tokenizer(), to="gguf", out=tmp_path / "v.gguf")
    runner.steer(llama_model.read_vector(tmp_path / "v.gguf"))
    got = runner.logits(IDS)
    assert gap(got, hooked(own, knob, 0.7)) < TOLERANCE
    vector = knob.vectors[knob.site]
    for other in set(range(LAYERS)) - {layer}:
        site = Site(other, "last")
        moved = Knob("other", "random", {site: vector}, {other: 12.0}, site, 1.0)
        assert gap(got, hooked(own, moved, 0.7)) > 100 * TOLERANCE


def test_layer_zero_cannot_be_steered_there(own: PreTrainedModel, runner: llama_model.Runner, tmp_path: Path) -> None:
    """Row 0 of llama.cpp's table is layer 1, and there is none before it."""
    with pytest.raises(KnobError, match="does not steer the output of layer 0"):
        export({wide_knob(0): 1.0}, own, pico.tokenizer(), to="gguf", out=tmp_path / "v.gguf")


def test_several_layers_and_knobs_are_one_control_vector(
    own: PreTrainedModel, runner: llama_model.Runner, tmp_path: Path
) -> None:
    import llama_model

    low, high = wide_knob(1, gain=0.5), wide_knob(3)
    dose: dict[Any, float] = {low: 1.0, high: -0.5, wide_knob(3, seed=1): 0.25}
    export(dose, own, pico.tokenizer(), to="gguf", out=tmp_path / "v.gguf")
    runner.steer(llama_model.read_vector(tmp_path / "v.gguf"))
    with torch.no_grad(), steer(own, dose):
        wanted = own(torch.tensor([IDS]), use_cache=False).logits[0]
    assert gap(runner.logits(IDS), wanted) < TOLERANCE
    back = import_knob(tmp_path / "v.gguf", own, pico.tokenizer(), source="llama.cpp")
    assert gap(hooked(own, back), wanted) < TOLERANCE


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_baked_checkpoint_is_the_steered_model_layer_zero_included(
    own: PreTrainedModel, layer: int, tmp_path: Path
) -> None:
    import llama_model

    from trimtab.render import load as load_model

    knob = wide_knob(layer)
    export({knob: 1.0}, own, pico.tokenizer(), to="checkpoint", out=tmp_path / "baked")
    llama_model.write_model(tmp_path / "baked.gguf", load_model(tmp_path / "baked").model)
    with llama_model.opened(tmp_path / "baked.gguf") as baked:
        assert gap(baked.logits(IDS), hooked(own, knob)) < TOLERANCE
        assert gap(baked.logits(IDS), hooked(own)) > 100 * TOLERANCE


def test_greedy_answers_are_those_of_hooks(own: PreTrainedModel, runner: llama_model.Runner, tmp_path: Path) -> None:
    import llama_model

    knob = wide_knob(2)
    export({knob: 1.0}, own, pico.tokenizer(), to="gguf", out=tmp_path / "v.gguf")
    runner.steer(llama_model.read_vector(tmp_path / "v.gguf"))
    assert Adapter(own).n_layers == runner.layers
    asked = [load.Request(ids, {"a": 1.0}) for ids in pico.prompts([5, 9, 14], seed=3)]
    from trimtab.artifact import Rack

    wanted = load.reference(own, Rack(a=knob), asked, 16)
    found = [load.Answer(*runner.greedy(request.ids, 16)) for request in asked]
    equal, largest = load.compare(found, wanted)
    assert equal == len(asked)
    assert largest < TOLERANCE
