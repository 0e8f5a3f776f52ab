"""Which phase follows which, what it takes over from the state, and what it leaves of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from fuse_ext.checks import warn_caller
from fuse_ext.curvature.dense import MATRIX_NAMES, DenseMatrix
from fuse_ext.curvature.moments import MOMENTS, check_adam_state
from fuse_ext.curvature.ring import History
from fuse_ext.curvature.ring_state import BEFORE, SET_ASIDE, STATE_NAMES
from fuse_ext.kernels import scalars
from fuse_ext.kernels.ops import Ops
from fuse_ext.objective.setbacks import COUNTERS
from fuse_ext.objective.step_options import mixed_signs
from fuse_ext.objective.watch import Watch
from fuse_ext.phase.adam import AdamPhase
from fuse_ext.phase.lbfgs.device import DevicePhase
from fuse_ext.phase.lbfgs.device import settle as settle_entry
from fuse_ext.phase.lbfgs.iteration import ITERATION_NAMES, check_lbfgs_state
from fuse_ext.phase.lbfgs.phase import LbfgsPhase, make_lbfgs
from fuse_ext.phase.living.average import AVERAGE_NAMES, check_average_state
from fuse_ext.phase.living.metric.state import KRONECKER_NAMES, check_kronecker_state
from fuse_ext.phase.living.phase import LATER_NAMES, LISTS, LIVING_NAMES, LivingPhase, living_names
from fuse_ext.phase.modes import (
    ADAM,
    LBFGS,
    check_signs,
    finds_out,
    living,
    self_scales,
    takes_matrix,
    updates_as_broyden,
    watches_searches,
    will_scale,
)
from fuse_ext.phase.protocol import QuasiNewton
from fuse_ext.phase.room import ADVICE, ELSEWHERE, STAY, attempt, in_words
from fuse_ext.vector.flat import FlatParams, ParamGroup
from fuse_ext.vector.narrow.masters import MASTER

# Under this name FusePV's log says when a phase after Adam tries again to grow.
GROWS_AT = "grows_at"
AnyPhase: TypeAlias = AdamPhase | QuasiNewton
# What the L-BFGS phase gives up beside its ring when it ends: all that it holds but the counters.
_HELD = (
    *MATRIX_NAMES,
    *ITERATION_NAMES,
    *Watch.NAMES,
    *living_names(),
    "batch_id",
)
_GIVEN_UP = {*_HELD} - {*COUNTERS}


class Ground(NamedTuple):
    """What phases are made on.

    Attributes:
        flat: The parameters.
        ops: Kernels to use.
        state: ``Optimizer.state``.
        groups: ``Optimizer.param_groups``.
    """

    flat: FlatParams
    ops: Ops
    state: dict[Any, Any]
    groups: list[ParamGroup]

    @property
    def entry(self) -> dict[str, Any]:
        """The state entry that belongs to all parameters, which lies with the first."""
        entry: dict[str, Any] = self.state[self.flat.params[0]]
        return entry

    def adam(self) -> AdamPhase:
        """Adam, with whatever moments the state holds."""
        return AdamPhase(self.flat, self.ops, self.state, self.groups)

    def lbfgs(
        self, one_function: bool = False, self_scaling: bool = False
    ) -> LbfgsPhase | DevicePhase:
        """L-BFGS on one function or one batch, with whatever curvature the entry holds.

        ``one_function``: that it is has been found out. ``self_scaling``: pairs scale in any case.
        """
        group = self.groups[0]
        known = {**group, "deterministic": True} if one_function else group
        dense = takes_matrix(known, self.flat)
        scales = self_scaling or self_scales(known)
        # Where they are yet to be many, the first few pairs need not.
        broyden = self_scales(known) and updates_as_broyden(group, self.flat)
        watches = watches_searches(group)
        return make_lbfgs(self.flat, self.ops, self.entry, group, scales, broyden, watches, dense)

    def living(self) -> LivingPhase:
        """The phase in a living metric, with the moments that the state holds."""
        return LivingPhase(self.flat, self.ops, self.state, self.groups)


def adopted(ground: Ground, phase: str) -> AnyPhase | None:
    """The phase of a state at hand; None where its first step is still to come."""
    flat, state = ground.flat, ground.state
    if phase == ADAM:
        # The user may keep other things in the state, under other keys.
        begun = any("step" in state.get(param, {}) for param in flat.params)
        return ground.adam() if begun else None
    entry = state.get(flat.params[0], {})
    if "living_steps" in entry:
        return ground.living()
    if "history" not in entry:
        return None
    if entry["history"].shape[2] != flat.numel:
        drop_lbfgs_state(entry)  # a group was added: curvature starts afresh
    return ground.lbfgs()


def successor(
    ground: Ground, before: AnyPhase | None, log: dict[str, Any], unsaid: set[str], reason: str
) -> QuasiNewton | None:
    """The phase that follows Adam, None where there is no memory for it: then Adam goes on.

    Args:
        ground: What it is made on; as it was where there is no memory.
        before: Adam's phase; None where L-BFGS is to begin at once.
        log: FusePV's, which notes it.
        unsaid: The options that the constructor has filled in.
        reason: Why it follows now.

    Raises:
        torch.OutOfMemoryError, RuntimeError, MemoryError: There is no memory on some rank, nor has
            Adam begun; on all of them.
        RuntimeError, ValueError: As :func:`_made_successor`.
    """
    measures = ground.flat.measures
    made, error = attempt(
        ground.state, measures, lambda: _made_successor(ground, before, log, unsaid)
    )
    if made is not None:
        for name in ("out_of_memory", GROWS_AT):
            log.pop(name, None)
        log["switches"] += 1
        log["switch_step"], log["switch_reason"] = log["adam_steps"], reason
        phase, inherit = made
        inherit()
        return phase
    assert error is not None
    if not isinstance(before, AdamPhase):
        if str(error) == ELSEWHERE:
            raise torch.OutOfMemoryError(f"no memory for the phase that begins, {ELSEWHERE}")
        raise error
    log["out_of_memory"] = in_words(error)
    log["stays_until"] = log["phase_steps"] + STAY
    warn_caller(
        f"no memory for the phase after Adam ({log['out_of_memory']}): Adam goes on, for {STAY} "
        f"steps before the next attempt; {ADVICE}"
    )
    return None


def _made_successor(
    ground: Ground, before: AnyPhase | None, log: dict[str, Any], unsaid: set[str]
) -> tuple[QuasiNewton, Callable[[], None]]:
    """The phase that follows Adam, with all its memory, and how it begins where Adam ends.

    Raises:
        ValueError: Groups of both signs where there is one objective.
    """
    groups = ground.groups
    if living(groups[0]) and isinstance(before, AdamPhase) and log["phase_steps"]:
        watches = finds_out(groups[0]) and not mixed_signs(groups) and not log.get("batches")
        begun, scheduled = ground.living(), bool(log.get("scheduled"))
        begun.take_memory()
        return begun, lambda: begun.inherit(groups, scheduled, watches)
    check_signs(groups)
    scales = will_scale(groups[0], ground.flat, unsaid)
    return ground.lbfgs(self_scaling=scales), lambda: None


def found_one_function(ground: Ground, before: AnyPhase, log: dict[str, Any]) -> AnyPhase:
    """The phase that follows one for minibatches which turn out to be one function.

    Where there is no memory for it that one, as it was.
    """

    def make() -> AnyPhase:
        drop_lbfgs_state(ground.entry)
        drop_adam_state(ground, None)  # a living metric has kept them
        return ground.lbfgs(one_function=True)

    phase = _larger(ground, before, log, make)
    if phase is not before:
        ground.entry["agreed"] = 1.0  # as it was seen at one point
    return phase


def grown(ground: Ground, phase: AnyPhase, log: dict[str, Any]) -> AnyPhase:
    """The phase with the curvature that its closure deserves, seen to be one function.

    That is a matrix, which takes over the pairs, or room for more of them; where there is no memory
    for it the phase as it was.
    """
    entry, group = ground.entry, ground.groups[0]
    slots = group["history_size"] + 1
    if not isinstance(phase, LbfgsPhase) or not isinstance(ring := phase.history, History):
        return phase
    wants_matrix = takes_matrix({**group, "deterministic": True}, ground.flat)
    if not wants_matrix and entry["history"].shape[1] >= slots:
        return phase

    def make() -> AnyPhase:
        if wants_matrix:
            drop_ring(entry)
            larger = ground.lbfgs(one_function=True)
            assert isinstance(larger.history, DenseMatrix)
            larger.history.take_over(ring)
        else:
            enlarge(entry, slots)
            larger = ground.lbfgs()  # it scales itself already, or never will
            assert isinstance(larger.history, History)
            scales = larger.history.header().self_scaling
            if scales and "broyden" not in entry and updates_as_broyden(group, ground.flat):
                larger.history.update_as_broyden()
        larger.progress.warned = phase.progress.warned
        return larger

    return _larger(ground, phase, log, make)


def _larger(
    ground: Ground, phase: AnyPhase, log: dict[str, Any], make: Callable[[], AnyPhase]
) -> AnyPhase:
    """The phase that is made; where there is no memory, which is said once, the one at hand."""
    made, error = attempt(ground.state, ground.flat.measures, make)
    if made is not None:
        log.pop(GROWS_AT, None)
        return made
    assert error is not None
    if GROWS_AT not in log:
        warn_caller(
            f"no memory for the phase of one function ({in_words(error)}): the phase at hand goes "
            f"on, for {STAY} steps before each further attempt; {ADVICE}"
        )
    log[GROWS_AT] = ground.entry["n_iter"] + STAY
    return phase


def grows_now(
    where: Callable[[], Ground], phase: AnyPhase | None, log: dict[str, Any] | None
) -> bool:
    """Whether to try again to grow where there was no memory; asked in every step.

    A phase for minibatches is to find out again first.
    """
    if log is None or GROWS_AT not in log:
        return False
    at, ground = log[GROWS_AT], where()
    entry = ground.entry
    if entry.get("n_iter", 0) < at:
        return False
    if isinstance(phase, LivingPhase):
        if "watched_loss" not in entry:
            Watch(ground.flat, ground.ops, entry).begin()
            log[GROWS_AT] = at + STAY
        return False
    return isinstance(phase, LbfgsPhase) and phase.believes(ground.groups)


def settle(phase: AnyPhase | None, entry: dict[str, Any], log: dict[str, Any]) -> None:
    """Brings to the host what the device alone has counted, be its phase at hand or not."""
    settle_entry(entry)
    if phase is not None:
        phase.settle(log)


def drop_adam_state(ground: Ground, after: AnyPhase | None) -> None:
    """Gives Adam's moments up, unless the phase after it goes on with them.

    What else the state holds stays.
    """
    if isinstance(after, LivingPhase):
        return
    names = ("step", *MOMENTS, *KRONECKER_NAMES, *AVERAGE_NAMES, MASTER)
    for param in ground.flat.params:
        for name in names:
            ground.state[param].pop(name, None)
        if not ground.state[param]:
            del ground.state[param]


def drop_ring(entry: dict[str, Any]) -> None:
    """Takes the history out of a state entry; what it has counted stays (``BEFORE``)."""
    if "scalars" in entry:
        header = scalars.read_header(entry["scalars"])
        for name, before in BEFORE.items():
            entry[before] = entry.get(before, 0) + int(getattr(header, name))
    for name in STATE_NAMES:
        entry.pop(name, None)


def enlarge(entry: dict[str, Any], slots: int) -> None:
    """Makes room for more pairs in a state entry that holds a ring; the pairs stay."""
    entry.pop(SET_ASIDE, None)  # of other slots
    before = entry["history"].shape[1]
    kept = scalars.in_order(entry["scalars"], before)
    if "broyden" in entry:
        entry["broyden"] = scalars.broyden_with_more_slots(
            entry["broyden"], entry["scalars"], before, slots
        )
    entry["scalars"] = scalars.with_more_slots(entry["scalars"], before, slots)
    for name in ("history", "history_scale"):
        if name in entry:
            old = entry[name]
            entry[name] = old.new_zeros(2, slots, old.shape[2])
            entry[name][:, : len(kept)] = old[:, kept]


def leave_second(ground: Ground, phase: AnyPhase | None) -> None:
    """Takes out of the state what belongs to the phase after Adam; its counts stay."""
    if isinstance(phase, LivingPhase):
        phase.leave(ground.groups)
    drop_lbfgs_state(ground.entry)


def drop_lbfgs_state(entry: dict[str, Any]) -> None:
    """Takes what L-BFGS knows out of a state entry; what it has counted stays."""
    settle_entry(entry)
    drop_ring(entry)
    for name in _GIVEN_UP:
        entry.pop(name, None)


def check_phase_state(
    saved: dict[str, Any], flat: FlatParams, defaults: dict[str, Any], own: str
) -> None:
    """Raises ValueError, naming the entry, for a saved state of neither phase.

    Args:
        saved: The state_dict.
        flat: The parameters that it is to be for.
        defaults: Of options that a saved group lacks.
        own: The name of an entry that belongs to neither phase.
    """
    groups, state = saved["param_groups"], saved["state"]
    keys = [i for group in groups for i in group["params"]]
    first = state.get(keys[0], {})
    if groups[0].get("phase", ADAM) == LBFGS:
        # Until then a switch at once is still to come.
        if groups[0].get("lr_at_switch") is not None or first.keys() - {own}:
            if "living_steps" in first:
                check_living_state(state, flat, keys)
                return
            size = groups[0].get("history_size", defaults["history_size"])
            check_lbfgs_state(first, size + 1, flat)
        if "history" in first:
            check_signs([{**defaults, **group} for group in groups])
    else:  # torch.optim.Adam's checkpoints have no phase and are welcome
        moments = {
            name: value for name, value in first.items() if name not in (own, *ITERATION_NAMES)
        }
        check_adam_state({**state, keys[0]: moments}, flat.params, keys)


def check_living_state(state: dict[Any, Any], flat: FlatParams, keys: list[Any]) -> None:
    """Raises ValueError unless a saved state is that of a phase in a living metric."""
    entry = state[keys[0]]
    for name in (*LIVING_NAMES, *(name for name in LATER_NAMES if name in entry)):
        value = entry.get(name)
        unknown = value is None and name in ("held", "usual_log")
        if not (unknown or _are_numbers(value, name in LISTS)):
            raise ValueError(f"state_dict does not fit: {name} is {value!r}, no number")
    moments = {
        key: {n: state[key][n] for n in ("step", *MOMENTS, MASTER) if n in state[key]}
        for key in keys
        if key in state
    }
    check_adam_state(moments, flat.params, keys)
    for i, (param, key) in enumerate(zip(flat.tensors, keys, strict=True)):
        check_kronecker_state(state.get(key, {}), param, i)
        check_average_state(state.get(key, {}), flat.params[i], i)


def _are_numbers(value: Any, may_be_list: bool) -> bool:
    """Whether it is one, or a list of such or of such lists."""
    if may_be_list and isinstance(value, list):
        return all(_are_numbers(part, True) for part in value)
    return isinstance(value, (int, float))
