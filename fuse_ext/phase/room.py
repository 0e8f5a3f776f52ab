"""Making what may not fit in memory: all of it on all ranks, or nothing, as if not tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fuse_ext.vector.measures import Measures

# Where there was no memory for another phase, the one at hand takes so many steps before the next
# attempt.
STAY = 100
ADVICE = "fuse_ext.estimate_memory tells what a phase needs"
ELSEWHERE = "on another rank"
Made = TypeVar("Made")


def attempt(
    state: dict[Any, Any], measures: Measures, make: Callable[[], Made]
) -> tuple[Made | None, RuntimeError | MemoryError | None]:
    """What ``make`` returns; nothing, and the error, where memory ends on any rank.

    Unless it is made the state is as it was, down to the entries themselves.

    Args:
        state: ``Optimizer.state``, which ``make`` may change.
        measures: Of the ranks that step together, who all call this.
        make: Makes it.
    """
    held = dict(state)
    within = [(entry, dict(entry)) for entry in held.values() if isinstance(entry, dict)]

    def take_back() -> None:
        for entry, content in within:
            entry.clear()
            entry.update(content)
        state.clear()
        state.update(held)

    made: Made | None = None
    error: RuntimeError | MemoryError | None = None
    try:
        made = make()
    except (RuntimeError, MemoryError) as raised:
        if not _is_out_of_memory(raised):
            take_back()
            raise
        error = raised.with_traceback(None)  # whose frames hold what was made
    if not measures.any(error is not None)[0]:  # ranks go on together
        return made, None
    take_back()
    return None, error or torch.OutOfMemoryError(ELSEWHERE)


def in_words(error: BaseException) -> str:
    """Its first line."""
    return str(error).partition("\n")[0] or "out of memory"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error)  # a plain RuntimeError on a CPU
