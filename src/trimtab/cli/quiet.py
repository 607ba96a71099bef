"""Keep the remarks and the bars of libraries off the terminal, which shows itself that work goes on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def quiet_hub() -> Generator[None]:
    """Keep the remarks and the bars of the hub's client off the terminal, which shows that work goes on."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()


@contextmanager
def quiet_transformers(*, bars: bool = False) -> Generator[None]:
    """Keep the remarks of transformers and of the hub's client, and unless `bars` their bars, off the terminal."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    levels, had_bars = (logging.get_verbosity(), hub.get_verbosity()), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(levels[0])
        hub.set_verbosity(levels[1])
        if had_bars:
            logging.enable_progress_bar()
