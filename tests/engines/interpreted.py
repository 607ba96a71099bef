"""Lets Triton believe in a CPU, so that vLLM's second model runner can be interpreted without a GPU: for tests only."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends import Backend, backends
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    """Claims a device that nothing is compiled for."""

    def is_active(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> Any:
        return GPUTarget("cpu", 0, 0)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        return lambda call, **_: call()


Driver.is_active = staticmethod(lambda: True)  # Triton asks the class
backends["cpu"] = Backend(compiler=BaseBackend, driver=Driver)
