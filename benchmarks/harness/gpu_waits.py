"""Where the host waits for a GPU: torch's debug mode for that, as long as it is wanted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _set(mode: str) -> None:
    with warnings.catch_warnings():
        # Said once in a process, after the mode is set; as an error it would leave it set.
        warnings.filterwarnings("ignore", message=".*prototype feature", category=UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def forbidden() -> Iterator[None]:
    """Makes every wait of the host for the device an error."""
    try:
        _set("error")
        yield
    finally:
        _set("default")


@contextmanager
def noted() -> Iterator[list[str]]:
    """Yields a list to which every wait of the host for the device adds, once this ends."""
    waits: list[str] = []
    try:
        _set("warn")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield waits
        texts = [str(warning.message) for warning in said]
        waits += [text for text in texts if "synchronizing" in text]
    finally:
        _set("default")
