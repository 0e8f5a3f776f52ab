"""FusePV's L-BFGS phase on averages, and how it learns that it had better be another."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fuse_ext.averaged import AveragedEngine
from fuse_ext.captured_phases import CapturedPhases
from fuse_ext.checks import loss_value
from fuse_ext.flat import Closure
from fuse_ext.hooks import with_grad
from fuse_ext.lbfgs_engine import LbfgsEngine
from fuse_ext.lbfgs_options import LbfgsOptions
from fuse_ext.modes import (
    AVERAGED,
    averages,
    check_signs,
    finds_out,
    mixed_signs,
    same_loss,
    self_scales,
)


class AveragedPhase(CapturedPhases):
    """The steps of FusePV on minibatches."""

    def _successor(self) -> LbfgsEngine | AveragedEngine:
        """The engine that follows Adam."""
        group = self.param_groups[0]
        if averages(group) and self._adam is not None and self._log["phase_steps"]:
            engine = self._make_lbfgs(averaged=True)
            assert isinstance(engine, AveragedEngine)
            engine.inherit(self._adam, self.param_groups)
            if finds_out(group) and not mixed_signs(self.param_groups):
                self._entry["watched_loss"] = math.nan
            return engine
        if group["pairs"] == AVERAGED:
            raise RuntimeError("pairs='averaged' needs Adam's moments: take an Adam step first")
        check_signs(self.param_groups)
        return self._make_lbfgs()

    def _averaged_step(
        self, engine: AveragedEngine, closure: Closure | None, options: LbfgsOptions
    ) -> Any:
        """One step on averages, unless the closure turns out to be one function all along."""
        entry, loss, groups = self._entry, None, self.param_groups
        mixed = mixed_signs(groups)
        if mixed:
            entry.pop("watched_loss", None)  # no function to minimise, be it one or not
        if closure is not None:
            loss = with_grad(closure)
            entry["func_evals"] += 1
        if closure is not None and loss is None:
            entry.pop("watched_loss", None)  # there is no finding out then
        elif closure is not None:
            value = loss_value(loss)
            before = entry.get("watched_loss")
            if before is not None and math.isnan(before) and math.isfinite(value):
                entry["watched_loss"] = value
                engine.progress.reason = "watch"
                return loss
            entry.pop("watched_loss", None)
            if before is not None and same_loss(before, value):
                self._drop_lbfgs_state()
                self._lbfgs = self._make_lbfgs()
                assert isinstance(self._lbfgs, LbfgsEngine)
                if self_scales({**self.param_groups[0], "deterministic": True}):
                    self._lbfgs.history.scale_itself()
                return self._lbfgs.step(closure, options)
            if not math.isfinite(value):
                engine.count_non_finite()
                return loss
        if mixed:
            ascends = self.flat.per_segment([bool(group["maximize"]) for group in groups], None)
            options = replace(options, maximize=False, ascends=ascends)
        shrinks = [
            1.0 - float(group["lr"]) * float(group["weight_decay"])
            if group["decoupled_weight_decay"]
            else None
            for group in groups
        ]
        engine.step(
            options,
            float(groups[0]["betas"][0]),
            float(groups[0]["step_cap"]),
            self.flat.per_segment(shrinks, None),
        )
        return loss
