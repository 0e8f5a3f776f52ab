"""What a step of the L-BFGS phase is told: step sizes, schedules and options, from the groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.checks import loss_value, warn_caller
from fuse_ext.kernels.capture import check_lr_tensor
from fuse_ext.kernels.hooks import with_grad
from fuse_ext.objective.step_options import step_options
from fuse_ext.phase.adam import AdamPhase
from fuse_ext.phase.lbfgs.device import DevicePhase
from fuse_ext.phase.lbfgs.phase import LbfgsPhase
from fuse_ext.phase.living.lengths import have_changed, rates
from fuse_ext.phase.living.phase import LivingPhase
from fuse_ext.phase.modes import (
    ADAM,
    CONSECUTIVE,
    SEARCH,
    check_capturable,
    check_signs,
    closure_wanted,
    living,
    second_phase,
)
from fuse_ext.phase.protocol import NO_SCALING, Call, Outcome, QuasiNewton
from fuse_ext.phase.succession import AnyPhase, Ground
from fuse_ext.search.noise import UNSEEN_NOISE
from fuse_ext.switch.criterion import Observation, Switchover
from fuse_ext.switch.steps import Never, WarmUp
from fuse_ext.vector.flat import FlatParams, ParamGroup


def ask(phase: AnyPhase, call: Call, flat: FlatParams) -> Outcome:
    """A step of FusePV in this phase.

    Raises:
        ValueError: Options that have no meaning for this phase, or for a step without closure.
        RuntimeError: A closure under GradScaler.
    """
    if call.closure is None and call.loss is None:
        call.empty = would_not_move(call.groups)
    if isinstance(phase, AdamPhase):
        note_rate(call)
        call.scaling.check(call.closure)
        if call.closure is None and not call.empty:
            look_ahead(phase, call)
        outcome = phase.step(call)
        flat.gather()  # criteria may look at parameters, as may those who are told of the switch
        if call.groups[0]["deterministic"] and outcome.observed is not None:
            tell_noise(phase, call, outcome.observed, flat)
        return outcome
    if call.empty and phase.host_decides:
        return Outcome(None)
    tell(phase, call, flat)
    if call.scaling is not NO_SCALING:
        # L-BFGS looks at the gradients itself, without the scaler's factor.
        call.scaling.check(call.closure)
        if phase.host_decides and flat.measures.any(bool(call.scaling.found))[0]:
            phase.refuse()
            return Outcome(None)
        call.scaling.unscale(flat.grads())
    return phase.step(call)


def told_of(
    ground: Ground, phase: AnyPhase | None, criterion: Switchover, log: dict[str, Any]
) -> dict[str, Any]:
    """What a report says of the choice of phases: ``second_phase`` and ``waiting``."""
    group, kind, waiting = ground.groups[0], "", ""
    if group["phase"] == ADAM:
        waiting = criterion.waiting(log["phase_steps"], log["phase_epochs"])
        if "out_of_memory" in log:
            waiting = f"no memory for the next phase: {log['out_of_memory']}"
    elif phase is not None and not isinstance(phase, AdamPhase):
        kind = phase.history.kind
    follows = "" if isinstance(criterion, Never) else second_phase(group, ground.flat, kind)
    return {"second_phase": follows, "waiting": waiting}


def look_ahead(phase: AdamPhase, call: Call) -> None:
    """Says of a step without a closure that the phase to come will need one; warns once.

    Raises:
        ValueError: There is no loss either, which the criterion needs.
    """
    wanted, criterion = closure_wanted(call.groups[0]), call.criterion
    assert criterion is not None
    if not wanted or isinstance(criterion, Never):
        return
    why = (
        f"step() without a closure, but with {wanted} the phase after Adam evaluates the model at "
        "trial points: pass step(closure) from the first step on, or, where a trainer passes none, "
        "leave the option out: FusePV's default on minibatches needs no closure"
    )
    if criterion.needs_loss and call.loss is None:
        raise ValueError(why)
    if "closure" not in phase.said:
        phase.said.add("closure")
        warn_caller(f"{why}. As it is, the first step after the switch will raise an error")


# Where a step changes the loss by less, relative to it, that is Adam's own restlessness.
RESTLESS = 1e-2


def tell_noise(phase: AdamPhase, call: Call, observed: Observation, flat: FlatParams) -> None:
    """Warns once where losses that were promised to be of one function are those of batches.

    Where they look like it a call at the point where the next step begins tells.
    """
    assert call.criterion is not None
    if phase.next_loss is not None:
        _compare(phase, observed)
        return
    loss, before = observed.loss, phase.last_loss
    phase.last_loss = loss
    if loss is None or before is None or abs(loss - before) <= RESTLESS * abs(loss):
        return
    waits = [leaf for leaf in call.criterion._leaves() if isinstance(leaf, WarmUp)]
    # Noise turns at two steps of three; where Adam itself makes the loss oscillate, at fewer.
    turns = max((leaf.refused for leaf in waits if 2 * leaf.refused > leaf.n), default=0)
    if not turns or "noise" in phase.said:
        return
    phase.said.add("noise")
    alone = flat.together is None  # one rank's loss is not that of all
    if alone and call.closure is not None and call.log is not None:
        call.log["adam_evaluations"] += 1
        value = loss_value(with_grad(call.closure))
        phase.next_loss = -value if call.groups[0]["maximize"] else value


def _compare(phase: AdamPhase, observed: Observation) -> None:
    """Warns if a step has begun with another loss than was seen there; else Adam oscillates."""
    seen, found = phase.next_loss, observed.loss
    phase.next_loss = None
    if seen is None or found is None or abs(found - seen) <= UNSEEN_NOISE * abs(seen):
        return
    warn_caller(
        f"deterministic=True, but after {observed.step} steps the loss goes up and down as on "
        f"minibatches or with dropout ({seen:.7g} and {found:.7g} at one point). FusePV stays "
        "with Adam until it does not, or no longer falls. Call model.eval() or use the full batch; "
        "on minibatches leave deterministic out"
    )


def tell(phase: QuasiNewton, call: Call, flat: FlatParams) -> None:
    """Puts into the call what the groups have to say to this phase of L-BFGS."""
    groups, lr = call.groups, None
    if isinstance(phase, DevicePhase):
        check_capturable(groups[0], "line_search")
        lr = shared_lr(groups, flat.device)
    if not isinstance(phase, LivingPhase):
        check_signs(groups)
    if lr is None:
        lrs = [lbfgs_lr(group) for group in groups]
    else:
        lrs, unit = [float(group["lbfgs_lr"]) for group in groups], groups[0]["lr_at_switch"]
        if not unit:
            raise ValueError(
                f"lr_at_switch={unit!r}: the L-BFGS step follows lr / (lr at the switch), so "
                "with capturable=True lr must not be 0 at the switch"
            )
        call.lr, call.lr_unit = lr, unit
    same_batch = groups[0]["pairs"] != CONSECUTIVE
    options = step_options(flat, groups, lrs, "line_search", same_batch, SEARCH)
    alone = call.closure is None and isinstance(phase, LbfgsPhase)
    if alone and (options.line_search or options.max_iter > 1):
        raise ValueError(
            "closure=None in the L-BFGS phase needs line_search=None and max_iter=1, got "
            f"line_search={options.line_search!r} and max_iter={options.max_iter}"
        )
    call.options, call.rescues = options, True


def lbfgs_lr(group: ParamGroup) -> float:
    """The group's L-BFGS step: lbfgs_lr, times what a schedule has done to lr since the switch."""
    lr = float(group["lr"])
    if not group["lr_at_switch"]:  # was 0, or the group is new: its schedule begins when lr does
        group["lr_at_switch"] = lr
    return float(group["lbfgs_lr"]) * (lr / group["lr_at_switch"] if lr else 0.0)


def shared_lr(groups: list[ParamGroup], device: torch.device) -> Tensor | None:
    """The tensor that is every group's lr, or None where all are numbers.

    L-BFGS takes one step for all parameters, of which each group has a share known to the host.
    """
    lrs = [group["lr"] for group in groups]
    if not any(isinstance(lr, Tensor) for lr in lrs):
        return None
    for i, lr in enumerate(lrs):
        if lr is not lrs[0]:
            raise ValueError(
                "capturable=True needs one lr tensor for all parameter groups in the L-BFGS phase, "
                f"got {lrs[0]!r} in group 0 and {lr!r} in group {i}"
            )
    check_lr_tensor(lrs[0], device)
    first: Tensor = lrs[0]
    return first


def note_rate(call: Call) -> None:
    """Notes in the log whether lr changes while Adam steps, where the next phase asks for that."""
    group, log = call.groups[0], call.log
    if log is None or group["capturable"] or not living(group):
        return
    lrs = rates(call.groups)
    if have_changed(log.setdefault("last_lr", lrs), lrs):
        log["scheduled"] = True
    log["last_lr"] = lrs


def would_not_move(groups: list[ParamGroup]) -> bool:
    """Whether lr is 0: torch.distributed.checkpoint makes the state with such an empty step."""
    lrs = [group["lr"] for group in groups]
    if groups[0]["capturable"]:  # tensors lie on the device
        lrs = [lr for lr in lrs if not isinstance(lr, Tensor)]
    return bool(lrs) and not any(lrs)
