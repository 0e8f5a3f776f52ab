"""FusePV's two phases with capturable=True: two steps, each of which a CUDA graph can repeat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.captured_adam import CapturedAdam
from fuse_ext.kernels.hooks import with_grad
from fuse_ext.objective.step_options import LbfgsOptions
from fuse_ext.optim.lbfgs import step_options
from fuse_ext.optim.modes import CONSECUTIVE, check_signs
from fuse_ext.phase.capture import (
    check_capturable,
    device_loss,
    is_capturing,
    refuse_while_capturing,
    shared_lr,
)
from fuse_ext.phase.device import CapturedLbfgs, settle
from fuse_ext.phase.phases import ADAM, TwoPhases, check_not_scaled
from fuse_ext.switch.criterion import Observation, Switchover
from fuse_ext.switch.known_optimum import NearSolution
from fuse_ext.vector.flat import Closure
from fuse_ext.vector.measures import GradStats, grad_stats_into


def check_switch(switch: Switchover) -> None:
    """Raises ValueError for a criterion that reads the device after every Adam step."""
    reads = switch.needs_loss or switch.needs_grad_norm
    if reads or any(isinstance(leaf, NearSolution) for leaf in switch._leaves()):
        raise ValueError(
            f"capturable=True needs a switch that reads nothing from the device, got {switch!r}; "
            "AfterSteps, AfterEpochs, AtOnce and Never do not, nor does When(..., "
            "needs_loss=False, needs_grad_norm=False), and switch_now() switches by hand"
        )


class CapturedPhases(TwoPhases):
    """The steps of FusePV that read nothing from the device.

    While a graph is being captured nothing is counted on the host and the criterion is not asked.
    Replays are seen by neither: the device counts the Adam steps, and the host takes its count
    over whenever it reads it (``report``, ``state_dict``, the switch).
    """

    # Adam steps taken and skipped, float64 [2] on the device; None where the log has the truth.
    _counts: Tensor | None = None
    _stats: Tensor | None = None

    def _options(self) -> LbfgsOptions:
        raise NotImplementedError

    def _begin_lbfgs(self, reason: str) -> None:
        raise NotImplementedError

    def switch_now(self, reason: str = "") -> None:
        """See :class:`fuse_ext.FusePV`."""
        raise NotImplementedError

    def _adopt_state(self) -> None:
        self._counts = self._stats = None
        super()._adopt_state()

    def _settle(self) -> None:
        params = self.__dict__.get("_flat") and self.flat.params
        if params and params[0] in self.state:
            settle(self.state[params[0]])
        if isinstance(self._lbfgs, CapturedLbfgs):
            self._lbfgs.settle()
        if self._counts is not None:
            taken, skipped = map(int, self._counts.tolist())
            log = self._log
            log["phase_steps"] += taken - log["adam_steps"]
            log["adam_steps"], log["adam_non_finite"] = taken, skipped

    def _captured_step(self, closure: Closure | None, loss: Any) -> Any:
        """One step of either phase."""
        if self._adam is None and self._lbfgs is None:
            self._renew_layout()
        if self.phase == ADAM:
            return self._captured_adam_step(closure, loss)
        if self._lbfgs is None:
            self._begin_lbfgs(self._switch.reason)
        return self._captured_lbfgs_step(closure)

    def _captured_adam_step(self, closure: Closure | None, loss: Any) -> Any:
        group, log, flat = self.param_groups[0], self._log, self.flat
        numbers = [g["lr"] for g in self.param_groups if not isinstance(g["lr"], Tensor)]
        # torch.distributed.checkpoint makes the state with an empty step at lr = 0.
        empty = closure is None and loss is None and numbers and not any(numbers)
        if closure is not None:
            loss = with_grad(closure)
        checked = device_loss(loss, flat.device)
        if isinstance(loss, Tensor):
            loss = loss.detach()
        engine = self._adam
        if engine is None or engine.outdated(self.state):
            engine = self._adam = self._make_adam()
        assert isinstance(engine, CapturedAdam)
        if self._counts is None:
            counted = [float(log["adam_steps"]), float(log["adam_non_finite"])]
            self._counts = torch.tensor(counted, dtype=torch.float64, device=flat.device)
        found_inf = getattr(self, "found_inf", None)
        square = None
        if group["check_finite"] and found_inf is None:  # a GradScaler has looked already
            square = self._grad_square()
        engine.step(
            self.param_groups,
            getattr(self, "grad_scale", None),
            found_inf,
            loss=checked if group["check_finite"] else None,
            grad_square=square,
            counts=None if empty else self._counts,
        )
        if empty or is_capturing(flat.device):
            return loss
        log["adam_evaluations"] += closure is not None
        log["adam_steps"] += 1
        log["phase_steps"] += 1
        observation = Observation(
            step=log["phase_steps"],
            epoch=log["phase_epochs"],
            loss=None,
            grad_norm_sq=None,
            params=flat.params,
        )
        if self._switch.observe(observation):
            self.switch_now(self._switch.reason)
        return loss

    def _grad_square(self) -> Tensor | None:
        """g.g of all gradients at hand, on the device."""
        if self._stats is None:
            refuse_while_capturing(self.flat.device, "memory for the gradients' norms is taken")
            self._stats = torch.zeros(
                len(GradStats._fields), dtype=torch.float64, device=self.flat.device
            )
        if not grad_stats_into(self.flat, self._ops, self._stats):
            return None
        place = GradStats._fields.index("square")
        return self._stats[place : place + 1]

    def _captured_lbfgs_step(self, closure: Closure | None) -> Any:
        groups, flat = self.param_groups, self.flat
        check_capturable(groups[0], "line_search")
        check_signs(groups)
        lr, unit = shared_lr(groups, flat.device), 1.0
        if lr is None:
            options = self._options()
        else:
            lrs = [float(group["lbfgs_lr"]) for group in groups]
            same = groups[0]["pairs"] != CONSECUTIVE
            options = step_options(flat, groups, lrs, "line_search", same)
            unit = groups[0]["lr_at_switch"]
            if not unit:
                raise ValueError(
                    f"lr_at_switch={unit!r}: the L-BFGS step follows lr / (lr at the switch), so "
                    "with capturable=True lr must not be 0 at the switch"
                )
        scale = getattr(self, "grad_scale", None)
        check_not_scaled(scale, closure)
        self._unscale(scale)  # a gradient that overflowed stays so, and the step is not taken
        assert isinstance(self._lbfgs, CapturedLbfgs)
        return self._lbfgs.step(closure, options, lr, unit)
