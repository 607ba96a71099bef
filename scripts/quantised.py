"""Steer a small random model under every kind of quantised weights that is installed, and print what came out.

    python scripts/quantised.py

Needs nothing but Trimtab; bitsandbytes, optimum-quanto and torchao are tried where they are installed, and said to be
missing where not. Columns: dtype of the weights in the blocks, dtype that Trimtab takes for the stream, largest
difference between what a knob added and what it should have added (in units of the stream's rounding), and whether
strength 0 gives the bits of the plain model. Ends with 1 if a kind that runs is steered wrongly.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers.utils import logging as transformers_logging

from trimtab.adapter import Adapter
from trimtab.artifact import Knob
from trimtab.check import default_config, twin
from trimtab.runtime import steer
from trimtab.types import Site

WIDTH = 64  # wide enough for the groups of every backend
IDS = torch.arange(10, 22)[None]
DTYPES = (torch.float32, torch.bfloat16)


def torchao(name: str, **options: Any) -> Callable[[torch.dtype], TorchAoConfig]:
    """A configuration of torchao by its name, imported when it is used."""

    def build(_: torch.dtype) -> TorchAoConfig:
        import torchao.quantization as quantization  # pyright: ignore[reportMissingImports]

        return TorchAoConfig(getattr(quantization, name)(**options))

    return build


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Four bits with the arithmetic in the model's dtype."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


KINDS: list[tuple[str, str, Callable[[torch.dtype], Any]]] = [
    ("bitsandbytes", "int8", lambda _: BitsAndBytesConfig(load_in_8bit=True)),
    ("bitsandbytes", "4 bits", four_bits),
    ("optimum-quanto", "int8", lambda _: QuantoConfig(weights="int8")),
    ("optimum-quanto", "int4", lambda _: QuantoConfig(weights="int4")),
    ("optimum-quanto", "float8", lambda _: QuantoConfig(weights="float8")),
    ("torchao", "int8", torchao("Int8WeightOnlyConfig")),
    ("torchao", "int8, activations too", torchao("Int8DynamicActivationInt8WeightConfig")),
    ("torchao", "int4", torchao("Int4WeightOnlyConfig", group_size=32)),
    ("torchao", "int4 in int8", torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4)),
]


def knob(layer: int) -> Knob:
    """A knob with a random direction, as long at strength 1 as a small stream."""
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(layer))
    site = Site(layer, "last")
    return Knob(name="any", method="random", vectors={site: vector}, norms={layer: 4.0}, site=site, gain=1.0)


@torch.no_grad()
def check(model: nn.Module) -> tuple[str, str, float, bool]:
    """Return what a line of the table says of a model: weights, stream, largest error, strength 0."""
    adapter, worst, plain = Adapter(model), 0.0, True
    base = model(IDS).logits
    for layer in range(adapter.n_layers):
        turned = knob(layer)
        with adapter.read([layer]) as before:
            model(IDS)
        with adapter.read([layer]) as after, steer(adapter, {turned: 1.0}):
            model(IDS)
        with steer(adapter, {turned: 0.0}):
            plain &= torch.equal(model(IDS).logits, base)
        new, old = after.acts[layer], before.acts[layer]
        rounding = float(new.abs().max()) * torch.finfo(new.dtype).eps
        worst = max(worst, float((new.float() - old.float() - turned.addend(1.0)).abs().max()) / rounding)
    weights = {str(p.dtype).removeprefix("torch.") for block in adapter.blocks for p in block.parameters()}
    kinds = {type(p).__name__ for block in adapter.blocks for p in block.parameters()} - {"Parameter"}
    return " ".join(sorted(weights | kinds)), str(adapter.dtype).removeprefix("torch."), worst, plain


def dynamic(dtype: torch.dtype) -> nn.Module:
    """Torch's own int8: weights and activations, linear layers only, float32 around them."""
    return torch.ao.quantization.quantize_dynamic(source().to(dtype), {nn.Linear}, dtype=torch.qint8)


def source() -> nn.Module:
    """The model that is quantised."""
    return twin(default_config("llama"), hidden_size=WIDTH, intermediate_size=2 * WIDTH, head_dim=WIDTH // 4)


def installed(package: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    """Print a line per kind and dtype; return 1 if one that runs is steered wrongly."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    transformers_logging.disable_progress_bar()
    print(*(f"{name} {installed(name)}" for name in ("torch", "transformers", "accelerate")), sep=", ")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        source().save_pretrained(folder)

        def load(config: Callable[[torch.dtype], Any], dtype: torch.dtype) -> nn.Module:
            options = {"quantization_config": config(dtype), "dtype": dtype, "device_map": "cpu"}
            return AutoModelForCausalLM.from_pretrained(folder, **options)

        print(f"{'backend':<22} {'kind':<22} {'weights':<42} {'stream':<9} {'error':>6}  strength 0")
        for package, kind, config in [("torch", "int8, dynamic", None), *KINDS]:
            found = installed(package)
            if found is None:
                print(f"{package:<22} {kind:<22} not installed")
                continue
            for dtype in DTYPES if config is not None else DTYPES[:1]:
                try:
                    model = (dynamic(dtype) if config is None else load(config, dtype)).eval()
                    model(IDS)
                except Exception as refusal:  # noqa: BLE001  # whatever a backend raises on this machine
                    short = f"{type(refusal).__name__}: {' '.join(str(refusal).split())[:80]}"
                    print(f"{f'{package} {found}':<22} {kind:<22} does not run here: {short}")
                    continue
                weights, stream, error, plain = check(model)
                wrong += error > 1 or not plain or stream != str(dtype).removeprefix("torch.")
                zero = "same bits" if plain else "OTHER BITS"
                print(f"{f'{package} {found}':<22} {kind:<22} {weights:<42} {stream:<9} {error:>6.2f}  {zero}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
