"""What the tests of FusePV share: a small regression, and looks into the state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fuse_ext import Adam, FusePV
from fuse_ext.optim.checkpoint.frozen import reclaim
from fuse_ext.optim.checkpoint.record import opened

BACKENDS = ("native", "reference")
# Counts of attempts, which a step that was not taken may raise.
ATTEMPTS = ("n_iter", "func_evals", "non_finite", "bad_starts", "fuse_pv")


class Fit:
    """A small network fitted to all of a small data set, with the optimizer under test."""

    def __init__(
        self,
        kind: type[torch.optim.Optimizer] = FusePV,
        dtype: torch.dtype = torch.float32,
        groups: list[dict[str, Any]] | None = None,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.inputs = normal(40, 3)
        self.targets = (self.inputs[:, :1] * self.inputs[:, 1:2]).sin()
        self.params = [normal(3, 8), 0.1 * normal(8), 0.3 * normal(8, 1), normal(1)]
        for param in self.params:
            param.requires_grad_()
        self.calls = 0
        self.sign = -1.0 if maximize else 1.0
        members: Any = self.params
        if groups is not None:  # first layer, second layer
            layers = (self.params[:2], self.params[2:])
            members = [{"params": p, **group} for p, group in zip(layers, groups, strict=True)]
        if maximize:
            options["maximize"] = True
        self.optimizer = kind(members, **options)

    def loss(self) -> Tensor:
        w1, b1, w2, b2 = self.params
        return self.sign * ((self.inputs @ w1 + b1).tanh() @ w2 + b2 - self.targets).square().mean()

    def closure(self) -> Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def step(self, count: int = 1) -> list[float]:
        return [self.optimizer.step(self.closure).item() for _ in range(count)]

    @property
    def flat(self) -> Tensor:
        return torch.cat([param.detach().reshape(-1) for param in self.params])

    def load(self, flat: Tensor) -> None:
        """Gives the parameters these values."""
        torch.nn.utils.vector_to_parameters(flat.clone(), self.params)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a state entry."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors(entry)


class Trace:
    """What Adam alone sees, step by step: the criteria judged from outside."""

    def __init__(self, steps: int = 300, maximize: bool = False, **options: Any) -> None:
        fit = Fit(Adam, maximize=maximize, **options)
        self.losses, self.norms, self.points = [], [], []
        for _ in range(steps):
            self.losses.append(fit.sign * fit.step()[0])
            grads = [p.grad for p in fit.params]
            self.norms.append(sum(g.double().square().sum().item() for g in grads))
            self.points.append(fit.flat)

    def first(self, holds: Callable[[int], bool]) -> int:
        """The first step (from 1) at which a condition holds."""
        return next(k for k in range(1, len(self.losses) + 1) if holds(k))


def bytes_in(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the memory that the state's tensors lie in, each counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for entry in optimizer.state.values()
        for t in tensors(entry)
    }
    return sum(storages.values())


def saved_state(optimizer: torch.optim.Optimizer) -> Any:
    """The state that ``state_dict`` saves, with counts and words under their own names."""
    saved = optimizer.state_dict()
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    return opened(reclaim(saved["state"], keys), keys)


def snapshot(optimizer: torch.optim.Optimizer, but: tuple[str, ...] = ()) -> Any:
    """A copy of state and options."""
    saved = optimizer.state_dict()
    state = {
        key: {name: copy.deepcopy(value) for name, value in entry.items() if name not in but}
        for key, entry in saved_state(optimizer).items()
    }
    return {"state": state, "param_groups": copy.deepcopy(saved["param_groups"])}


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal to the bit, all the way down."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours, theirs) or _same_with_nan(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert ours == theirs or ours != ours, f"{where}: {ours!r} != {theirs!r}"


def _same_with_nan(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def until_converged(optimizer: Any, closure: Callable[[], Tensor], steps: int) -> Any:
    """The report after so many steps, or where it says that there is nothing left to gain."""
    for _ in range(steps):
        optimizer.step(closure)
        if optimizer.report().converged:
            break
    return optimizer.report()
