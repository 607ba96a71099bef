"""Set what every test process needs before torch is imported."""

from __future__ import annotations

import os
import sys

import pytest

# Two workers with a thread each are faster on two cores than two workers that fight for both.
assert "torch" not in sys.modules, "torch was imported before OMP_NUM_THREADS could be set"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"


def pytest_configure(config: pytest.Config) -> None:
    """Tell the hub's client to stay offline, here and in subprocesses, where blocked sockets do not reach."""
    if not config.getoption("--force-enable-socket"):
        os.environ["HF_HUB_OFFLINE"] = "1"
