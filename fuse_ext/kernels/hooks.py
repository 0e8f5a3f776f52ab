"""What stands between a call of ``optimizer.step`` and the step: hooks, profiler, autograd's mode.

For a small problem this costs more than the step itself, unless it is left out where nobody would
notice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fuse_ext import _C
from fuse_ext.checks import refuse_closure

Step = TypeVar("Step", bound=Callable[..., Any])
# A step with a closure asks for each of them several times.
_is_grad_enabled, _set_grad_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled
# What without_grad has been put around, by what came of that.
_guarded: dict[Callable[..., Any], Callable[..., Any]] = {}


def noticed(func: Callable[..., Any]) -> Callable[..., Any]:
    """torch's wrapper around an optimizer's ``step``, entered only where someone would notice.

    It names the step in a profile and runs the hooks; and torch.compile is kept out of both: the
    step has nothing to fuse with one op and would be traced anew for every step count. There too
    ``take_step`` of the optimizer takes it, which has to be asked if ``shares_steps``.
    """

    @functools.wraps(func)
    def within(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.take_step(func, args, kwargs)

    watched = _disable_dynamo(Optimizer.profile_hook_step(within))
    # Where without_grad stands around it, one wrapper does for both.
    guarded = _guarded.get(func)

    @functools.wraps(func)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        closure = args[0] if args else kwargs.get("closure")
        if closure is not None and not callable(closure):
            refuse_closure(closure)
        if (
            torch.compiler.is_compiling()
            or self.shares_steps
            or _C.is_observed()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return watched(self, *args, **kwargs)
        if guarded is None:  # a subclass's own
            return func(self, *args, **kwargs)
        before = _is_grad_enabled()
        _set_grad_enabled(False)
        try:
            return guarded(self, *args, **kwargs)
        finally:
            _set_grad_enabled(before)

    return step


def without_grad(func: Step) -> Step:
    """``torch.no_grad()`` as a decorator, at a fifth of its price."""

    @functools.wraps(func)
    def inner(*args: Any, **kwargs: Any) -> Any:
        before = _is_grad_enabled()
        _set_grad_enabled(False)
        try:
            return func(*args, **kwargs)
        finally:
            _set_grad_enabled(before)

    _guarded[inner] = func
    return inner  # type: ignore[return-value]


def with_grad(closure: Callable[[], Any]) -> Any:
    """Calls a closure under ``torch.enable_grad()``, at a fifth of its price."""
    before = _is_grad_enabled()
    _set_grad_enabled(True)
    try:
        return closure()
    finally:
        _set_grad_enabled(before)
