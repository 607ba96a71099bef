"""Where inside a block a constant can be added so that the block's output gets exactly that: the place for a bias."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter, block_alone
from trimtab.errors import KnobError
from trimtab.render import model_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OWN = ("model_type", "architectures", "attention_bias", "mlp_bias", "transformers_version")
"""Fields of a configuration that are not carried over to a Llama."""
SWITCHES = ("mlp_bias", "use_bias", "bias")
"""Fields of a configuration that give layers a bias, the one that touches the fewest layers first."""
SMALLEST = 1e-3
"""The least factor: by it the vector is divided to become a bias."""
PROBE_ROWS, PROBE_TOKENS = 2, 8
TOLERANCE = 1e-5
"""How much of what was added may come out otherwise, as a share of it, in float32: rounding is a hundredth of that, and
what goes through a norm, a gate or another layer is off by far more."""


class Place(NamedTuple):
    """A linear layer inside a block, whose bias comes out of the block times `factor`, at every token."""

    module: str
    factor: float


def probe_ids(adapter: Adapter, rows: int = PROBE_ROWS, tokens: int = PROBE_TOKENS) -> Tensor:
    """Return token ids `[rows, tokens]`, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(adapter.vocabulary or 256, (rows, tokens), generator=generator).to(adapter.input_device)


@torch.no_grad()
def find_place(adapter: Adapter, layer: int) -> Place:
    """Find where a constant goes into block `layer`, by trying: a layer gets it as bias, and the output is looked at.

    That is done on a copy of the block in float32, on what the model calls it with, so that nothing hides in rounding.
    Raises `KnobError` where nothing that is added inside comes out unchanged, as in blocks with a norm behind the MLP.
    """
    block = adapter.blocks[layer]
    prefix = next(name for name, module in adapter.model.named_modules() if module is block)
    alone = block_alone(adapter, layer, torch.float32, input_ids=probe_ids(adapter))
    plain = alone.run()
    generator = torch.Generator().manual_seed(1)
    added = torch.randn(adapter.hidden_size, generator=generator).to(plain)
    added *= plain.norm(dim=-1).mean() / added.norm()  # as long as what is there
    linear = [(name, module) for name, module in alone.block.named_modules() if _width(module) == adapter.hidden_size]
    for name, module in reversed(linear):
        before = cast(nn.Parameter | None, module.bias)
        module.bias = nn.Parameter(added if before is None else before + added, requires_grad=False)
        moved = alone.run() - plain
        setattr(module, "bias", before)  # noqa: B010  # None where there was none
        factor = float((moved @ added).mean() / (added @ added))
        if not math.isfinite(factor) or abs(factor) < SMALLEST:
            continue
        factor = 1.0 if abs(factor - 1) < TOLERANCE else factor
        if float((moved - factor * added).norm(dim=-1).max()) < TOLERANCE * abs(factor) * float(added.norm()):
            return Place(f"{prefix}.{name}", factor)
    raise KnobError(
        f"Nothing that is added inside block {layer} of this {type(adapter.model).__name__} comes out of it unchanged: "
        "there is a norm or a gate behind its last layer. So no bias can stand for the vector. Export a control vector "
        "for llama.cpp (from layer 1 on), or serve the knob by vLLM."
    )


def with_bias(config: PretrainedConfig, places: list[str]) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Return a configuration whose model has a bias at every place, and zeros for all parameters that come with it.

    The configuration is the given one where there are biases, else the same with a switch turned, else that of the
    Llama that computes the same. Raises `KnobError` where there is none of these.
    """
    present = _shapes(config)
    for other in (config, *_switched(config), *_as_llama(config)):
        shapes = present if other is config else _shapes(other)
        if all(f"{place}.bias" in shapes for place in places):
            return other, {name: torch.zeros(shape) for name, shape in shapes.items() if name not in present}
    missing = next(place for place in places if f"{place}.bias" not in present)
    raise KnobError(
        f"{missing!r} has no bias, and {config.get_text_config().model_type} has none to switch on, as Llama and "
        "Granite do (mlp_bias). Export an adapter, which brings its own, or a control vector for llama.cpp."
    )


def _switched(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    for switch in SWITCHES:
        if getattr(config.get_text_config(), switch, None) is False:
            other = copy.deepcopy(config)
            setattr(other.get_text_config(), switch, True)
            yield other


def _as_llama(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield the Llama that a Qwen2 or a Mistral is: the one with biases on queries, keys and values, the other without.

    Llama's biases are switched for the attention as a whole, so that the one on its output is there too, and zero.
    """
    from transformers import LlamaConfig

    windowed = set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}
    if config.model_type not in ("qwen2", "mistral") or windowed:
        return
    if config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None:
        return
    given = config.to_dict()
    shared = {name: given[name] for name in LlamaConfig().to_dict() if name in given and name not in OWN}
    yield LlamaConfig(**shared, attention_bias=config.model_type == "qwen2", mlp_bias=True)


def _shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}


def _width(module: nn.Module) -> int | None:
    """Return how many values a linear layer puts out; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return getattr(module, "nf", None) if type(module).__name__ == "Conv1D" else None
