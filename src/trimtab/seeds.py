"""Random numbers from a seed, drawn without touching those that the process draws otherwise."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None]:
    """Seed torch's random numbers on the processor and on `device`; afterwards both go on as if nothing had been drawn.

    `torch.manual_seed` would seed every accelerator there is, those of a training beside this one among them.
    """
    others: Any = None if device.type == "cpu" else getattr(torch, device.type, None)
    if not hasattr(others, "get_rng_state"):  # a device whose numbers, if it has any, are not torch's to seed
        others = None
    own = others.device(device) if hasattr(others, "device") else nullcontext()
    with torch.random.fork_rng(devices=[]), own:
        torch.default_generator.manual_seed(seed)
        if others is None:
            yield
            return
        state = others.get_rng_state()
        others.manual_seed(seed)
        try:
            yield
        finally:
            others.set_rng_state(state)
