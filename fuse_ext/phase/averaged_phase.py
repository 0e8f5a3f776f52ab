"""FusePV's L-BFGS phase on averages, and how it learns that it had better be another."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from fuse_ext.checks import loss_value
from fuse_ext.kernels.hooks import with_grad
from fuse_ext.objective.step_options import LbfgsOptions
from fuse_ext.optim.modes import (
    AVERAGED,
    averages,
    check_signs,
    finds_out,
    mixed_signs,
    self_scales,
)
from fuse_ext.phase.averages import AveragedEngine
from fuse_ext.phase.captured_phases import CapturedPhases
from fuse_ext.phase.iteration import LbfgsEngine
from fuse_ext.search.one_function import Values, agree
from fuse_ext.vector.flat import Closure
from fuse_ext.vector.measures import GradStats, grad_stats_into

# What watching the closure has led to.
WATCHING, ONE_FUNCTION, BATCHES = "watching", "one function", "batches"


class AveragedPhase(CapturedPhases):
    """The steps of FusePV on minibatches."""

    def _successor(self) -> LbfgsEngine | AveragedEngine:
        """The engine that follows Adam."""
        group = self.param_groups[0]
        if averages(group) and self._adam is not None and self._log["phase_steps"]:
            engine = self._make_lbfgs(averaged=True)
            assert isinstance(engine, AveragedEngine)
            engine.inherit(self._adam, self.param_groups)
            watches = finds_out(group) and not mixed_signs(self.param_groups)
            if watches and not self._log.get("batches"):
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
            if "watched_loss" in entry:
                watched = self._watch(engine, value)
                if watched is WATCHING:
                    engine.progress.reason = "watch"
                    return loss
                if watched is ONE_FUNCTION:
                    self._drop_lbfgs_state()
                    self._lbfgs = self._make_lbfgs()
                    assert isinstance(self._lbfgs, LbfgsEngine)
                    if self_scales({**self.param_groups[0], "deterministic": True}):
                        self._lbfgs.history.scale_itself()
                    return self._lbfgs.step(closure, options, evaluated=loss)
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

    def _watch(self, engine: AveragedEngine, value: float) -> str:
        """Compares two calls at one point: the loss and the norms of the gradient."""
        entry, flat = self._entry, self.flat
        stats = torch.zeros(len(GradStats._fields), dtype=torch.float64, device=flat.device)
        grad_stats_into(flat, self._ops, stats)
        norms = GradStats(*stats.tolist())
        now = Values(value, norms.square, norms.abs_sum)
        before = Values(entry["watched_loss"], *entry.get("watched_grad", (math.nan, math.nan)))
        if not before.finite and now.finite:
            entry["watched_loss"], entry["watched_grad"] = now.loss, [now.square, now.abs_sum]
            return WATCHING
        del entry["watched_loss"]
        entry.pop("watched_grad", None)
        return ONE_FUNCTION if now.finite and agree(before, now) else BATCHES
