"""The optimizer inside a trainer's wrapper, which hides what torch's optimizers do not have."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


def unwrap(optimizer: Any) -> Any:
    """The optimizer of this package inside a wrapper, or itself.

    Accelerate's ``AcceleratedOptimizer`` and Lightning's ``LightningOptimizer`` hold it as
    ``optimizer``; ``report()``, ``phase``, ``switch_now()`` and the like are the inner one's::

        optimizer = accelerator.prepare(FusePV(model.parameters()))
        print(fuse_ext.unwrap(optimizer).report())

    Raises:
        TypeError: There is none.
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer) or not hasattr(inner, "report"):
        raise TypeError(
            f"optimizer must be one of fuse_ext's with a report(), or a wrapper of one, "
            f"got {type(optimizer).__name__}"
        )
    return inner
