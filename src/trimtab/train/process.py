"""The process as it was: what trainers set for the whole of it is kept to the time of a training."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch

THEIRS = r"trl|accelerate|transformers|torch|peft"
"""Packages whose remarks on each other's releases are not the user's to mend."""


@contextmanager
def undisturbed(seed: int) -> Generator[None]:
    """Keep what the trainers set for the whole process to the time within: random states, logging, bars, warnings."""
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging

    python, numpy_state, verbosity = random.getstate(), np.random.get_state(), logging.get_verbosity()
    theirs, bars = datasets_logging.get_verbosity(), datasets_logging.is_progress_bar_enabled()
    own_bars = logging.is_progress_bar_enabled()
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()
    datasets_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=THEIRS)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        logging.set_verbosity(verbosity)
        datasets_logging.set_verbosity(theirs)
        if own_bars:
            logging.enable_progress_bar()
        if bars:
            datasets_logging.enable_progress_bar()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
