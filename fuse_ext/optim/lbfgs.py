"""LBFGS (Algorithms 1 and 2), drop-in for ``torch.optim.LBFGS``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.kernels.hooks import without_grad
from fuse_ext.objective.step_options import default_evaluations, step_options
from fuse_ext.optim.flat_optimizer import FlatOptimizer
from fuse_ext.optim.options import LBFGS_TABLE
from fuse_ext.phase.lbfgs.device import DevicePhase
from fuse_ext.phase.lbfgs.iteration import check_lbfgs_state
from fuse_ext.phase.lbfgs.phase import LbfgsPhase, make_lbfgs
from fuse_ext.phase.modes import check_capturable, updates_as_broyden
from fuse_ext.phase.protocol import Call
from fuse_ext.phase.succession import drop_lbfgs_state
from fuse_ext.phase.told import shared_lr
from fuse_ext.tell.report import Report, lbfgs_fields
from fuse_ext.vector.flat import Closure


class LBFGS(FlatOptimizer):
    r"""L-BFGS in two passes over the history an iteration; drop-in for ``torch.optim.LBFGS``.

    An iteration is Algorithm 1 of the paper: the direction :math:`p = -H g` by the two-loop
    recursion (Algorithm 2, its second loop from the oldest pair to the newest), a step t, and the
    pair s = t p, y = g(x + t p) - g(x). The recursion runs on dot products in float64, so that
    the history is read twice an iteration instead of about five times.

    Differences to torch: parameter groups; a parameter without a gradient, or with lr = 0, takes no
    part in a step and is not written, and pairs are used for the parameters alone that they were
    taken on; a pair is kept when
    :math:`s^T y > r \lVert s \rVert \lVert y \rVert` (torch: s.y > 1e-10, which depends on the
    scale of the loss); a trial with a NaN or infinite loss or gradient counts as too far and is
    never accepted (a fixed step is undone, where its end is evaluated); the line search is that
    of Moré and Thuente; at the end of a step the pair is closed with the gradient of the step's
    own last evaluation, so that pairs do not mix batches.

    Args:
        params: Tensors or parameter groups, all on one device.
        lr: First trial step, and the step itself without a line search. Groups may differ: the
            direction is scaled by each group's share (0 freezes a group).
        max_iter: Iterations a step.
        max_eval: Evaluations a step at most, the one where it begins included (also where
            ``deterministic`` spares it); at least 2 with a line search. None for
            ``max_iter * 5 // 4``, as in torch, but at least 26 with a line search: 25 are its
            trials at most. One that is cut short is followed by one with a shorter first trial.
        tolerance_grad: Stop when max|g| is at most this.
        tolerance_change: Stop when -g.p, max|t p| or the loss's change is at most this. These
            two are absolute, as in torch: a loss of small scale ends early (:meth:`report` says
            so) unless they are 0 (or -inf). inf ends a step where it begins.
        rtol: Stop when an iteration lowers the loss by at most this share of it.
        history_size: m, the pairs kept. torch's default of 100 holds 808 bytes a parameter; 10
            is usually as good.
        line_search_fn: None (fixed step), "strong_wolfe", "approximate_wolfe" (for the floor of
            float32) or "armijo".
        maximize: Ascend.
        weight_decay: L2 penalty weight_decay/2 \|x\|^2, part of the objective.
        history_dtype: Storage of the pairs: torch.bfloat16 for half the memory and traffic,
            torch.int8 (with one float32 scale per 128 elements) for a quarter; None for float32
            (float64 for float64 parameters).
        history_device: "cpu": of parameters on a device, pairs in the host's memory, as in
            :class:`~fuse_ext.FusePV`.
        curvature_tol: r above; 1e-8 for full batches, about 1e-4 for minibatches.
        self_scaling: Scale the inverse Hessian before each pair (see ``FusePV``): for long runs on
            one function with a large ``history_size``.
        update: "bfgs", or with ``self_scaling`` "broyden", which takes far fewer iterations there.
        deterministic: Promise that the closure is the same function at every call (no minibatch,
            no dropout): a step then starts from the last evaluation instead of repeating it,
            unless parameters or gradients were touched in between (``p.data.add_(1)`` goes
            unseen). Where the loss can fall no further it evaluates once, to see whether that is
            still so.
        trial_errors: Exception classes that the closure may raise at a trial of a line search,
            which then counts as one of infinite loss (GPyTorch's NanError, torch.linalg.LinAlgError
            of a failed Cholesky). At the start of a step they are raised as any other. As classes
            are no data, a checkpoint does not say it.
        capturable: The step reads nothing from the device, which decides instead, so that a CUDA
            graph can repeat it. Needs ``line_search_fn=None``, ``max_iter=1`` and ``rtol=0``, and
            an ``lr`` that is a tensor is one for all groups. Parameters must not be moved between
            steps by anyone else. Of the tolerances on changes only that on -g.p counts.
        backend: "auto", "native" (C++) or "reference" (plain PyTorch).
        process_group: The ranks that step together; as in :class:`~fuse_ext.FusePV`.
        shard_state: Each holds its share of the history; as in :class:`~fuse_ext.FusePV`.

    Memory: 2 m + 2 vectors of the history's dtype (and one of float32 if it is narrower, or with
    ``capturable``), and one or two vectors of scratch for the line search.

    Raises:
        ValueError, TypeError: An option out of range, or parameters that cannot share one vector.

    References:
        Nocedal and Wright, Numerical Optimization, 2006, Algorithms 7.4 and 7.5. FUSE,
        Algorithms 1 and 2.
    """

    _table = LBFGS_TABLE

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        rtol: float = 0.0,
        maximize: bool = False,
        weight_decay: float = 0.0,
        history_dtype: torch.dtype | None = None,
        history_device: str | None = None,
        curvature_tol: float = 1e-8,
        self_scaling: bool = False,
        update: str = "bfgs",
        deterministic: bool = False,
        trial_errors: tuple[type[Exception], ...] = (),
        capturable: bool = False,
        backend: str = "auto",
        process_group: Any = None,
        shard_state: bool = False,
    ) -> None:
        given = dict(locals())
        if max_eval is None and isinstance(max_iter, int):
            searches = line_search_fn not in (None, "fixed")
            given["max_eval"] = default_evaluations(max_iter, searches, bool(deterministic))
        defaults = self._table.defaults(given)
        self._table.check(defaults)
        self._phase: LbfgsPhase | DevicePhase | None = None
        super().__init__(params, defaults, backend, process_group)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups, state = state_dict["param_groups"], state_dict["state"]
        first, *others = (key for group in groups for key in group["params"])
        if first in state:
            check_lbfgs_state(state[first], groups[0]["history_size"] + 1, self.flat)
        for key in others:
            entry = state.get(key)
            if entry:
                raise ValueError(
                    f"state_dict is not of fuse_ext's L-BFGS: it holds {sorted(map(str, entry))} "
                    f"for parameter {key}"
                )

    def _adopt_state(self) -> None:
        self._phase = None
        first = self.flat.params[0]
        entry = self.state.get(first)
        if not entry:
            return
        history = entry.get("history")
        if history is None:
            del self.state[first]
            return
        if history.shape[2] != self.flat.numel:
            drop_lbfgs_state(entry)  # a group was added: curvature starts afresh
        self._phase = self._make_phase()

    def _make_phase(self) -> LbfgsPhase | DevicePhase:
        group = self.param_groups[0]
        scales = bool(group["self_scaling"])
        broyden = scales and updates_as_broyden(group, self.flat)
        return make_lbfgs(self.flat, self._ops, self._entry, group, scales, broyden)

    @without_grad
    def step(self, closure: Closure | None = None) -> Any:
        """Up to ``max_iter`` iterations.

        Args:
            closure: Zeroes the gradients, computes the loss and its gradients, returns the loss
                (or None, which no line search and no ``rtol`` can do with).
                May be left out for one iteration of a fixed step on the gradients at hand.

        Returns:
            The closure's loss where the step began, or None.

        Raises:
            ValueError: A line search or max_iter > 1 without a closure.
            TypeError, ValueError: The closure returns no scalar; the parameters are then where
                the last completed iteration left them, as for any error in the closure.
        """
        groups, phase = self.param_groups, self._phase
        if phase is None or phase.outdated(self.state):
            self._renew_layout()
            self._adopt_state()
        lr, capturable = None, groups[0]["capturable"]
        if capturable:
            check_capturable(groups[0], "line_search_fn")
            lr = shared_lr(groups, self.flat.device)
        lrs = [float(group["lr"]) if lr is None else 1.0 for group in groups]
        options = step_options(self.flat, groups, lrs, "line_search_fn")
        if closure is None and (options.line_search is not None or options.max_iter > 1):
            if not any(lrs):  # as torch.distributed.checkpoint makes the state
                self._phase = self._phase or self._make_phase()
                return None
            raise ValueError(
                f"closure=None needs line_search_fn=None and max_iter=1, got "
                f"line_search_fn={options.line_search!r} and max_iter={options.max_iter}"
            )
        phase = self._phase
        if phase is None or (capturable and not isinstance(phase, DevicePhase)):
            phase = self._phase = self._make_phase()
        if isinstance(phase, LbfgsPhase):  # without what FusePV has to ask of it: 1 us
            self._loss = phase.iteration.run(closure, options)  # no graph hangs on it
            return self._loss
        return self._noted(phase.step(Call(closure, groups, options=options, lr=lr)).loss)

    def _settle(self) -> None:
        if self._phase is not None and not self._phase.outdated(self.state):
            self._phase.settle({})

    def report(self) -> Report:
        """What was done, and why it stopped."""
        self._settle()
        if self._phase is None or self._phase.outdated(self.state):
            return Report(phase="lbfgs")
        fields = lbfgs_fields(self._phase, self._entry)
        return Report(phase="lbfgs", loss=self._last_loss, **fields)
