"""The extension module; csrc/ops.cpp and csrc/bound_ops.cpp define it."""

from typing import Any

from torch import Tensor

def build_info() -> dict[str, str | None]:
    """What this binary was built for: version, torch, cuda, cuda_archs, cpu_level."""

def scalar_layout(slots: int) -> dict[str, Any]:
    """Where csrc/two_loop.h keeps each scalar (index) and array (offset, length)."""

def broyden_layout(slots: int) -> dict[str, Any]:
    """Where the named scalars and arrays of csrc/broyden_pairs.h lie."""

def matrix_layout(numel: int) -> dict[str, int]:
    """Where the scalars of csrc/broyden.h lie, and the sizes around them."""

def control_layout() -> dict[str, int]:
    """Where csrc/fixed_step.h keeps each number of a control."""

def advise_large_pages(address: int, bytes: int) -> bool:
    """Ask the system for large pages under a buffer; False where it takes no advice."""

def is_observed() -> bool:
    """Whether a profiler or anything else listens to torch's ranges and ops."""

class Layout:
    """The parameters in flat order, what each was when this was made, and the ops on them."""

    def __init__(self, groups: list[list[Tensor]], offsets: list[int]) -> None: ...
    @property
    def has_ops(self) -> bool:
        """Whether the methods below ``grads`` can be used: plain tensors, none complex."""

    def unchanged(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the groups hold the same tensors in the same formats; False: look closer."""

    def grads(self) -> list[Tensor] | None:
        """The gradients; None unless all are there, dense and real."""

    def places(self) -> bytes | None:
        """The parameters' versions and addresses; None unless they are plain tensors."""

    # As in fuse_ext.kernels.bound_ops.BoundOps, which says what they do.
    def adam_step(self, *arguments: Any) -> None: ...
    def grad_stats(self, *arguments: Any) -> list[float]: ...
    def lbfgs_update(self, *arguments: Any) -> None: ...
    def lbfgs_direction(self, *arguments: Any) -> list[float]: ...
    def lbfgs_update_direction(self, *arguments: Any) -> list[float]: ...
    def lbfgs_move(self, *arguments: Any) -> None: ...
