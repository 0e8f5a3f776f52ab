"""Every op in plain PyTorch: the oracle of the kernels, and the fallback on other devices.

Signatures and effects are those of :class:`fuse_ext.kernels.ops.Ops`. Speed is no aim here: flat
vectors are really concatenated, and scalars are read one by one.
"""

from fuse_ext.kernels.reference.adam import adam_step
from fuse_ext.kernels.reference.dense import dense_direction
from fuse_ext.kernels.reference.gradient import grad_gather, grad_scatter, grad_stats
from fuse_ext.kernels.reference.lbfgs import (
    fuse_blend,
    lbfgs_decide,
    lbfgs_direction,
    lbfgs_move,
    lbfgs_set_out,
    lbfgs_two_loop,
    lbfgs_update,
)

__all__ = [
    "adam_step",
    "dense_direction",
    "fuse_blend",
    "grad_gather",
    "grad_scatter",
    "grad_stats",
    "lbfgs_decide",
    "lbfgs_direction",
    "lbfgs_move",
    "lbfgs_set_out",
    "lbfgs_two_loop",
    "lbfgs_update",
]
