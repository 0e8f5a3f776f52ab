"""What the tests of capturable=True share: proof that a step reads nothing, and a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fuse_ext.kernels import ops

NEVER = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
READERS = ("tolist", "numpy", "item", "cpu", "__float__", "__int__", "__bool__", "__index__")


class NothingRead(TorchDispatchMode):
    """Fails where the host reads a tensor, or a tensor of ``limit`` elements is made."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.ops: list[str] = []

    def __enter__(self) -> NothingRead:
        self._patch = pytest.MonkeyPatch()
        for name in READERS:
            self._patch.setattr(Tensor, name, self._refuse(name))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    @staticmethod
    def _refuse(name: str) -> Callable[..., Any]:
        def refuse(*_: Any) -> Any:
            raise AssertionError(f"the host reads a tensor: Tensor.{name}")

        return refuse

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        self.ops.append(func.name())
        for made in _tensors(result):
            if made.untyped_storage()._cdata not in known:
                assert made.numel() < self.limit, f"{func.name()} makes {tuple(made.shape)}"
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor)]


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch, capturing: bool = False) -> Iterator[Any]:
    """Tensors on a CUDA device that is not there: whoever reads one gets an error.

    ``capturing``: torch says that a graph is being captured; set ``.capturing`` to change that.
    """

    class State:
        pass

    state: Any = State()
    state.capturing = capturing
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(ops, "has_kernels", lambda device_type: True)
    with FakeTensorMode():
        yield state


class Bowl:
    """f = sum h x^2 / 2 + x^4 / 40 over several tensors; gradients go into memory that stays."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        shapes: tuple[tuple[int, ...], ...] = ((20,), (5, 6), (3,)),
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        self.params = [torch.randn(s, dtype=dtype).to(device).requires_grad_() for s in shapes]
        self.curvatures = [
            torch.linspace(1, 20, p.numel(), dtype=dtype).view(p.shape).to(device)
            for p in self.params
        ]
        self.sign = 1.0
        self.calls = 0
        self.bad_calls: set[int] = set()
        self.bad_losses: set[int] = set()

    def closure(self) -> Tensor:
        """Gradients and loss; not finite at the calls named so."""
        with torch.no_grad():
            terms = []
            for p, h in zip(self.params, self.curvatures, strict=True):
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad.copy_(self.sign * (h * p + 0.1 * p**3))
                terms.append((h * p * p / 2 + p**4 / 40).sum())
            if self.calls in self.bad_calls:
                self.params[0].grad.view(-1)[-1] = torch.inf
            loss = self.sign * torch.stack(terms).sum()
            if self.calls in self.bad_losses:
                loss = loss * torch.nan
            self.calls += 1
        return loss

    def place(self) -> Tensor:
        """All parameters as float64 [d]."""
        return torch.cat([p.detach().flatten().double() for p in self.params])


def run(
    make: Callable[[list[Tensor]], Any], steps: int, closure: bool = True, **options: Any
) -> tuple[Tensor, Any, Bowl]:
    """Iterates [steps, d], the optimizer and the problem."""
    bad_calls, bad_losses = options.pop("bad_calls", ()), options.pop("bad_losses", ())
    sign = options.pop("sign", 1.0)
    bowl = Bowl(**options)
    bowl.bad_calls, bowl.bad_losses, bowl.sign = set(bad_calls), set(bad_losses), sign
    optimizer = make(bowl.params)
    iterates = []
    for _ in range(steps):
        if closure:
            optimizer.step(bowl.closure)
        else:
            bowl.closure()
            optimizer.step()
        iterates.append(bowl.place())
    return torch.stack(iterates), optimizer, bowl
