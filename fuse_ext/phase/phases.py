"""The state of an optimizer that is Adam in one phase and L-BFGS in the other."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from fuse_ext.curvature.captured_adam import make_adam
from fuse_ext.curvature.moments import AdamEngine, check_adam_state, check_moments_fit
from fuse_ext.curvature.ring import STATE_NAMES
from fuse_ext.optim.flat_optimizer import FlatOptimizer
from fuse_ext.optim.lbfgs import check_lbfgs_state
from fuse_ext.optim.modes import check_signs, check_signs_to_come, self_scales
from fuse_ext.phase.averages import AVERAGED_NAMES, VECTORS, AveragedEngine, check_averaged_state
from fuse_ext.phase.device import make_lbfgs
from fuse_ext.phase.iteration import COUNTERS, ENGINE_NAMES, LbfgsEngine
from fuse_ext.switch.criterion import Switchover
from fuse_ext.tell.report import LOG, NEW_LOG, Report, check_log, lbfgs_fields
from fuse_ext.vector.flat import Closure, FlatParams, ParamGroup

ADAM, LBFGS_PHASE = "adam", "lbfgs"
# In the L-BFGS phase, where there is such a thing: the loss that a watched closure returned last
# (NaN before); the batch of a pair in waiting.
WATCH_NAMES = ("watched_loss", "watched_grad", "batch_id")


def check_not_scaled(scale: Tensor | None, closure: Closure | None) -> None:
    """Raises RuntimeError for a closure under GradScaler in the L-BFGS phase."""
    if scale is not None and closure is not None:
        raise RuntimeError(
            "GradScaler does not go with a closure in the L-BFGS phase: losses and gradients "
            "there must not be scaled; call step(closure) without it"
        )


class TwoPhases(FlatOptimizer):
    """Where the phase, its engine, the counts and the criterion are kept, saved and restored.

    At most one engine exists at a time. In the L-BFGS phase there is none until the first step
    where the switch comes at once, since parameters may be converted until then.
    """

    _switch: Switchover
    _adam: AdamEngine | None = None
    _lbfgs: LbfgsEngine | AveragedEngine | None = None
    # Whether there has been a log: without one the state has been cleared since.
    _began = False

    def switch_back(self) -> None:
        """See :class:`fuse_ext.FusePV`."""
        raise NotImplementedError

    @property
    def phase(self) -> str:
        """Either "adam" or "lbfgs"."""
        phase: str = self.param_groups[0]["phase"]
        return phase

    @property
    def _entry(self) -> dict[str, Any]:
        """The state that belongs to all parameters lies with the first, as torch's LBFGS does."""
        entry: dict[str, Any] = self.state[self.flat.params[0]]
        return entry

    @property
    def _log(self) -> dict[str, Any]:
        """Counters and the criterion's state, saved with the rest."""
        self._began = True
        log: dict[str, Any] = self._entry.setdefault(LOG, dict(NEW_LOG))
        return log

    def _notice_lost_state(self) -> None:
        """Begins as a new optimizer would, where the user has cleared the state.

        What was put in its place is taken over.
        """
        lost = self._lbfgs is not None and self._lbfgs.outdated(self.state)
        if not lost and self._began and LOG not in self.state.get(self.flat.params[0], {}):
            lost = True
        if not lost:
            return
        self._adam = self._lbfgs = None
        if not self.state.get(self.flat.params[0]):
            self._begin_anew()
        self._renew_layout()
        self._adopt_state()

    def _begin_anew(self) -> None:
        """The first phase, with nothing observed."""
        self._began = False
        for group in self.param_groups:
            group["phase"] = LBFGS_PHASE if self._switch.at_once else ADAM
            group["lr_at_switch"] = None
        self._switch.reset()

    def state_dict(self) -> dict[str, Any]:
        """As in torch: the phase is in the parameter groups, tensors and counters in the state."""
        self._notice_lost_state()
        self._log["criterion"] = self._switch.state_dict()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_switch": self._switch}

    def _check_groups(self, groups: list[ParamGroup]) -> None:
        super()._check_groups(groups)
        check_signs_to_come(groups, self._switch)

    def _check_layout(self, flat: FlatParams) -> None:
        check_moments_fit(self.param_groups[0]["moment_dtype"], flat.params)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups, state = state_dict["param_groups"], state_dict["state"]
        keys = [i for group in groups for i in group["params"]]
        first = state.get(keys[0], {})
        if groups[0].get("phase", ADAM) == LBFGS_PHASE:
            size = groups[0].get("history_size", self.defaults["history_size"])
            # Until then a switch at once is still to come.
            if groups[0].get("lr_at_switch") is not None or first.keys() - {LOG}:
                check_lbfgs_state(first, size + 1, self.flat)
                check_averaged_state(first, self.flat)
            if "history" in first and VECTORS[0] not in first:
                check_signs([{**self.defaults, **group} for group in groups])
        else:  # torch.optim.Adam's checkpoints have no phase and are welcome
            ours = (LOG, *ENGINE_NAMES)
            moments = {name: value for name, value in first.items() if name not in ours}
            check_adam_state({**state, keys[0]: moments}, self.flat.params, keys)
        log = first.get(LOG, NEW_LOG)
        check_log(log)
        if "criterion" in log:
            self._switch._parse(log["criterion"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, for a checkpoint of this class or of Adam, in either phase.

        Nothing changes if it does not fit. The criterion keeps its thresholds and takes over what
        the saved one had observed.

        Raises:
            ValueError, TypeError: The state is of another optimizer or criterion, or of other
                parameters, or an option in it is out of range.
        """
        super().load_state_dict(state_dict)
        criterion = self.state.get(self.flat.params[0], {}).get(LOG, {}).get("criterion")
        if criterion is None:
            self._switch.reset()
        else:
            self._switch.load_state_dict(criterion)

    def _own_group(self, param_group: ParamGroup) -> ParamGroup:
        group = super()._own_group(param_group)
        # State of the optimizer that the group comes from, if it comes from one.
        for name in ("phase", "lr_at_switch"):
            group.pop(name, None)
        if self.__dict__.get("_flat") is not None:
            group["phase"] = self.phase
        return group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, in either phase.

        In the L-BFGS phase the curvature starts afresh; on averages Adam takes over again, since
        it has to find the new parameters' metric.
        """
        averaged = isinstance(self.__dict__.get("_lbfgs"), AveragedEngine)
        if self.__dict__.get("_flat") is not None:
            self._settle()
        super().add_param_group(param_group)
        if averaged:
            self.switch_back()

    def _adopt_state(self) -> None:
        self._adam = self._lbfgs = None
        if self.phase == LBFGS_PHASE:
            history = self.state.get(self.flat.params[0], {}).get("history")
            if history is None:
                return  # the first step makes it
            if history.shape[2] != self.flat.numel:
                self._drop_lbfgs_state()  # a group was added: curvature starts afresh
            self._lbfgs = self._make_lbfgs()
        # The user may keep other things in the state, under other keys.
        elif any("step" in self.state.get(param, {}) for param in self.flat.params):
            self._adam = self._make_adam()

    def _from_grad_scaler(self) -> tuple[Tensor | None, bool | None]:
        """GradScaler's factor on the gradients and whether it found infinities; it sets both."""
        found_inf = getattr(self, "found_inf", None)
        found = None if found_inf is None else float(found_inf) != 0.0
        return getattr(self, "grad_scale", None), found

    def _unscale(self, scale: Tensor | None) -> None:
        """Takes GradScaler's factor out of the gradients, where L-BFGS looks at them."""
        if scale is not None:
            for param in self.flat.params:
                if param.grad is not None:
                    param.grad.div_(scale)

    def _warn_non_finite(self) -> None:
        if not self.__dict__.get("_warned_non_finite"):
            self._warned_non_finite = True
            warnings.warn(
                "FusePV met a loss or gradient that is not finite and did not take the step; "
                "further ones are only counted in report()",
                RuntimeWarning,
                stacklevel=4,
            )

    def report(self) -> Report:
        """What was done, and why."""
        self._notice_lost_state()
        self._settle()
        log, entry, adam = self._log, self._entry, self._adam
        fields = lbfgs_fields(self._lbfgs, entry)
        fields["evaluations"] += log["adam_evaluations"]
        fields["non_finite"] += log["adam_non_finite"]
        if self._lbfgs is None:
            fields["state_bytes"] = 0 if adam is None else adam.nbytes
        return Report(
            phase=self.phase,
            adam_steps=log["adam_steps"],
            switch_step=log["switch_step"],
            switch_reason=log["switch_reason"],
            fallbacks=log["fallbacks"],
            **fields,
        )

    def _make_adam(self) -> AdamEngine:
        return make_adam(self.flat, self._ops, self.state, self.param_groups)

    def _make_lbfgs(self, averaged: bool = False) -> LbfgsEngine | AveragedEngine:
        """The engine of the state at hand, or a new one on averages."""
        group, entry = self.param_groups[0], self._entry
        if not averaged and VECTORS[0] not in entry:
            return make_lbfgs(self.flat, self._ops, entry, group, self_scales(group))
        size, dtype = group["history_size"], group["history_dtype"]
        return AveragedEngine(self.flat, self._ops, entry, size, dtype)

    def _drop_lbfgs_state(self) -> None:
        self._settle()
        for name in (*STATE_NAMES, *ENGINE_NAMES, *AVERAGED_NAMES, *WATCH_NAMES):
            if name not in COUNTERS:
                self._entry.pop(name, None)
