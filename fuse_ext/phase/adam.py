"""The Adam phase (Eq. 2): looks at loss and gradient, then takes the fused step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.checks import check_loss
from fuse_ext.curvature.moments import Moments
from fuse_ext.kernels.capture import device_loss, is_capturing, refuse_while_capturing
from fuse_ext.kernels.hooks import with_grad
from fuse_ext.kernels.ops import Ops
from fuse_ext.phase.protocol import Call, Outcome
from fuse_ext.switch.criterion import Observation
from fuse_ext.vector.flat import FlatParams, ParamGroup
from fuse_ext.vector.gradients import STATS, Readout, grad_stats_into


def make_moments(
    flat: FlatParams, ops: Ops, state: dict[Any, Any], groups: list[ParamGroup]
) -> Moments:
    """Adam's moments for these groups, with counts where their options want them."""
    first = groups[0]
    on_device, keeps = bool(first["capturable"]), bool(first["master_weights"])
    return Moments(flat, ops, state, groups, first["moment_dtype"], on_device, keeps)


class AdamPhase:
    """Adam. A call brings the log that it counts in (``adam_steps`` and so on), and the criterion.

    With ``capturable`` a step reads nothing from the device: the kernel skips what is not finite,
    and counts. While a graph is captured nothing is counted on the host; replays are not seen by
    it, and :meth:`settle` takes the device's counts over.

    Args:
        flat: The parameters.
        ops: Kernels to use.
        state: ``Optimizer.state``.
        groups: ``Optimizer.param_groups``.

    Attributes:
        moments: None before the first step that is taken, unless ``state`` holds some.
        said: What the user was warned of.
        last_loss: That of the last step, where one function was promised.
        next_loss: What was seen where the next step begins, if that was looked at.
    """

    def __init__(
        self,
        flat: FlatParams,
        ops: Ops,
        state: dict[Any, Any],
        groups: list[ParamGroup],
    ) -> None:
        self._flat, self._ops, self._state = flat, ops, state
        # Steps taken and skipped, float64 [2] on the device; None where the log has the truth.
        self._counted: Tensor | None = None
        self._stats: Tensor | None = None
        self._readout = Readout(flat, ops)
        self.moments: Moments | None = None
        self.said: set[str] = set()
        self.last_loss: float | None = None
        self.next_loss: float | None = None
        # The user may keep other things in the state, under other keys.
        if any("step" in state.get(param, {}) for param in flat.params):
            self.moments = make_moments(flat, ops, state, groups)

    @property
    def begun(self) -> bool:
        """Whether there are moments."""
        return self.moments is not None

    def outdated(self, state: dict[Any, Any]) -> bool:
        """Never: where entries were replaced the next step takes them over."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        return 0 if self.moments is None else self.moments.nbytes

    def new_objective(self) -> None:
        """Adam goes on: its averages forget by themselves."""

    def settle(self, log: dict[str, Any]) -> None:
        """Brings to the log what the device has counted."""
        if self._counted is not None:
            taken, skipped = map(int, self._counted.tolist())
            log["phase_steps"] += taken - log["adam_steps"]
            log["adam_steps"], log["adam_non_finite"] = taken, skipped

    def step(self, call: Call) -> Outcome:
        """One step; not taken where loss or gradient are not finite."""
        if call.groups[0]["capturable"]:
            return self._step_on_device(call)
        log, loss, checks = call.log, call.loss, call.groups[0]["check_finite"]
        criterion = call.criterion
        assert log is not None and criterion is not None
        if criterion.needs_loss and call.closure is None and loss is None and not call.empty:
            raise ValueError(
                f"closure=None and loss=None, but switch={criterion!r} needs the loss: pass a "
                "closure, or step(loss=...)"
            )
        try:
            if call.closure is not None:
                loss = with_grad(call.closure)
            wants_loss = loss is not None and (criterion.needs_loss or checks)
            if wants_loss:
                check_loss(loss)
            elif criterion.needs_loss and not call.empty:
                check_loss(loss, f"switch={criterion!r}")
        except Exception:
            if call.closure is not None and (criterion.needs_loss or checks):
                self._flat.measures.tell_raised()
            raise
        log["adam_evaluations"] += call.closure is not None
        found_inf = call.scaling.found_inf
        looks = checks and found_inf is None  # else the scaler has checked the gradients already
        if looks:
            self._flat.check_unchanged()
        told = self._readout.read(loss if wants_loss else None, found_inf, looks)
        if told.found_inf:  # the scaler's business: it lowers its scale
            log["adam_non_finite"] += 1
            return Outcome(loss)
        if checks and not self._readout.finite(told):
            log["adam_non_finite"] += 1
            return Outcome(loss, refused=True)
        value = told.loss
        self._ready(call.groups).step(call.groups, call.scaling.factor)
        if call.empty:
            return Outcome(loss)
        if value is not None and call.groups[0]["maximize"]:
            value = -value
        return Outcome(loss, self._counted_step(call, value))

    def _ready(self, groups: list[ParamGroup]) -> Moments:
        if self.moments is None or self.moments.outdated(self._state):
            self.moments = make_moments(self._flat, self._ops, self._state, groups)
        return self.moments

    def _counted_step(self, call: Call, value: float | None) -> Observation:
        """Counts the step; what the criterion may look at, the loss as a number to minimise."""
        log, criterion, moments = call.log, call.criterion, self.moments
        assert log is not None and criterion is not None and moments is not None
        log["adam_steps"] += 1
        log["phase_steps"] += 1
        return Observation(
            step=log["phase_steps"],
            epoch=log["phase_epochs"],
            loss=value,
            grad_norm_sq=moments.grad_norm_sq if criterion.needs_grad_norm else None,
            params=self._flat.params,
        )

    def _step_on_device(self, call: Call) -> Outcome:
        groups, log, loss, device = call.groups, call.log, call.loss, self._flat.device
        assert log is not None
        checks = groups[0]["check_finite"]
        if call.closure is not None:
            loss = with_grad(call.closure)
        checked = device_loss(loss, device)
        if isinstance(loss, Tensor):
            loss = loss.detach()
        moments = self._ready(groups)
        if self._counted is None:
            counted = [float(log["adam_steps"]), float(log["adam_non_finite"])]
            self._counted = torch.tensor(counted, dtype=torch.float64, device=device)
        found_inf = call.scaling.found_inf
        square = None
        if checks and found_inf is None:  # a GradScaler has looked already
            square = self._grad_square()
        moments.step_on_device(
            groups,
            call.scaling.factor,
            found_inf,
            loss=checked if checks else None,
            grad_square=square,
            counted=None if call.empty else self._counted,
        )
        if call.empty or is_capturing(device):
            return Outcome(loss)
        log["adam_evaluations"] += call.closure is not None
        return Outcome(loss, self._counted_step(call, None))

    def _grad_square(self) -> Tensor | None:
        """g.g of all gradients at hand, on the device."""
        if self._stats is None:
            refuse_while_capturing(self._flat.device, "memory for the gradients' norms is taken")
            self._stats = torch.zeros(len(STATS), dtype=torch.float64, device=self._flat.device)
        if not grad_stats_into(self._flat, self._ops, self._stats):
            return None
        place = STATS.index("square")
        return self._stats[place : place + 1]
