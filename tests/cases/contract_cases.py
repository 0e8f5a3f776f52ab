"""Every optimizer in every kind of use, and a problem that never relies on torch's defaults."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fuse_ext import LBFGS, Adam, Fuse, FusePV

SEARCHES = (None, "armijo", "strong_wolfe", "approximate_wolfe")
CPU = torch.device("cpu")


class Problem:
    """A regression whose tensors all say where they are and of which dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator(device=CPU).manual_seed(3)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device=CPU)
            return drawn.to(dtype)

        self.inputs, self.targets = normal(30, 5), normal(30, 4)
        self.params = [normal(5, 4), normal(4), normal(3)]
        for param in self.params:
            param.requires_grad_()
        self.calls = 0

    def closure(self) -> Tensor:
        self.calls += 1
        for param in self.params:
            param.grad = None
        weight, bias, late = self.params
        loss = ((self.inputs @ weight + bias).tanh() - self.targets).square().mean()
        if not 3 < self.calls < 6:  # from then on one parameter's step count lags behind
            loss = loss + late.square().sum()
        loss.backward()
        return loss.detach()

    @property
    def flat(self) -> Tensor:
        return torch.cat([param.detach().reshape(-1) for param in self.params])


CASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p, **o: Adam(p, lr=0.01, **o),
    "adam amsgrad": lambda p, **o: Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1, **o),
    "adam bf16": lambda p, **o: Adam(p, lr=0.01, moment_dtype=torch.bfloat16, **o),
    "adam capturable": lambda p, **o: Adam(p, lr=0.01, capturable=True, **o),
    "lbfgs capturable": lambda p, **o: LBFGS(p, lr=0.5, max_iter=1, capturable=True, **o),
    "fuse": lambda p, **o: Fuse(p, 0.01, **o),
    "fuse search": lambda p, **o: Fuse(p, 0.01, line_search="strong_wolfe", **o),
    "minibatches": lambda p, **o: FusePV(p, 0.01, 5, deterministic=False, **o),
    "finds out": lambda p, **o: FusePV(p, 0.01, 5, **o),
    "deterministic": lambda p, **o: FusePV(p, 0.01, 5, deterministic=True, **o),
    "fixed step": lambda p, **o: FusePV(p, 0.01, 5, line_search=None, lbfgs_lr=0.1, **o),
    "capturable": lambda p, **o: FusePV(
        p, 0.01, 5, line_search=None, lbfgs_lr=0.1, capturable=True, **o
    ),
    "adam phase": lambda p, **o: FusePV(p, 0.01, 100, **o),
}
for _search in SEARCHES:
    CASES[f"lbfgs {_search}"] = lambda p, _s=_search, **o: LBFGS(
        p, lr=0.5, max_iter=3, line_search_fn=_s, **o
    )
