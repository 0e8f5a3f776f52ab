"""The collective calls of a stretch of code: which, how large, and how long they took."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NAMESPACES = ("c10d", "_c10d_functional")
# What waits for a call, or wraps its result, is no call of its own.
_NO_CALL = ("wait_tensor", "_wrap_tensor_autograd")


class Heard(NamedTuple):
    """A collective call, or a ``mark`` of the listener's.

    Attributes:
        name: Of the op, such as "allreduce_".
        nbytes: That this rank puts in.
    """

    name: str
    nbytes: int


class Calls(TorchDispatchMode):
    """Counts collective calls while it is entered and listens.

    Attributes:
        listens: Set False around what is not to be counted.
        heard: The calls, in order.
        ops: All other ops that torch's dispatcher has seen, but for views.
        seconds: Spent in collective calls; each is waited for at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listens = True
        self.heard: list[Heard] = []
        self.ops, self.seconds = 0, 0.0

    def mark(self, name: str) -> None:
        """Notes something of no bytes among the calls."""
        self.heard.append(Heard(name, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "device_mesh") for kind in types):
            return NotImplemented  # a DTensor's op is made of others, which come by
        if not self.listens:
            return func(*args, **(kwargs or {}))
        if func.namespace not in _NAMESPACES:
            self.ops += not func.is_view
            return func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name not in _NO_CALL:
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.heard.append(Heard(name, sum(t.nbytes for t in tensors if isinstance(t, Tensor))))
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and isinstance(result, tuple):
            result[-1].wait()
        self.seconds += time.perf_counter() - start
        return result
