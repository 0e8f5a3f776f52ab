"""FusePV (Algorithm 4): Adam until a switchover condition holds, then L-BFGS."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuse_ext.checks import check_loss, check_number, loss_value
from fuse_ext.curvature.moments import MOMENTS, AdamEngine
from fuse_ext.kernels.hooks import with_grad, without_grad
from fuse_ext.objective.step_options import LbfgsOptions
from fuse_ext.objective.trials import MAX_LINE_SEARCH_EVALUATIONS
from fuse_ext.optim.adam import check_adam_group
from fuse_ext.optim.lbfgs import (
    check_lbfgs_group,
    check_max_eval,
    step_options,
    with_possible_max_eval,
)
from fuse_ext.optim.modes import (
    AUTO,
    CONSECUTIVE,
    LEAST_PAIRS,
    SAME_BATCH,
    SEARCH,
    check_modes,
    check_signs,
    default_history_size,
    default_switch,
    finds_out,
    lbfgs_lr,
)
from fuse_ext.phase.averaged_phase import AveragedPhase
from fuse_ext.phase.averages import AveragedEngine
from fuse_ext.phase.capture import check_capturable
from fuse_ext.phase.captured_phases import check_switch
from fuse_ext.phase.excursion import FAILING, adam_excursion, goes_astray
from fuse_ext.phase.iteration import LbfgsEngine
from fuse_ext.phase.overlap import overlap_step
from fuse_ext.phase.phases import ADAM, LBFGS_PHASE, check_not_scaled
from fuse_ext.switch.criterion import Observation, Switchover
from fuse_ext.switch.when import as_switchover
from fuse_ext.vector.flat import Closure, ParamGroup
from fuse_ext.vector.measures import grads_are_finite

# Curvature test without and with noise in the gradients.
CURVATURE_TOL = {True: 1e-8, False: 1e-4}


class FusePV(AveragedPhase):
    r"""Adam first, then L-BFGS, in one optimizer (FUSE-PV, Algorithm 4).

    Each call of ``step`` is an Adam step (Eq. 2) until ``switch`` says that Adam has done its
    part; from then on it is ``max_iter`` iterations of L-BFGS (Algorithms 1 and 2). Adam's
    moments are released at the switch. As in torch, a parameter whose gradient is None is not
    touched by a step, neither by weight decay nor along old curvature pairs; nor is, in the L-BFGS
    phase, one whose group has lr = 0.

    ::

        opt = FusePV(model.parameters(), lr=1e-3)
        for batch in loader:
            def closure():
                opt.zero_grad()
                loss = loss_fn(model(batch.x), batch.y)
                loss.backward()
                return loss
            opt.step(closure)

    Args:
        params: Tensors or parameter groups, all on one device.
        lr: Adam's step size. Learning-rate schedulers drive it; after the switch the L-BFGS step
            follows the same schedule: it is scaled by lr over the lr at the switch (or the first
            later one, if that was 0).
        switch: A :class:`~fuse_ext.Switchover`; an int for that many steps; a callable on an
            :class:`~fuse_ext.Observation`; None for 50 steps where L-BFGS may go on on averages
            (see ``pairs``), else :class:`~fuse_ext.LossPlateau` or, if ``deterministic``, a short
            :class:`~fuse_ext.WarmUp`.
        betas, eps, weight_decay, amsgrad, decoupled_weight_decay, eps_inside_root, moment_dtype: As
            in :class:`~fuse_ext.Adam`. On averages weight decay is what it is in the Adam phase,
            decoupled or not. With a line search or a fixed step it is an L2 term of the objective,
            weight_decay/2 \|x\|^2, in either case: a decay that is no part of the loss would have
            no minimum to search for.
        maximize: Ascend, in both phases. Groups may differ where L-BFGS is on averages or never
            comes (``switch=Never()``).
        lbfgs_lr: First trial step of L-BFGS, and the step itself without a line search.
        history_size: m, the curvature pairs kept; None for 10 or, if ``deterministic``, as many as
            fit 64 MiB, at most 500 and the number of parameters, but at least 10. (They cost time
            as well: 4 m d reads an iteration.)
        history_dtype: Storage of the pairs: torch.bfloat16 halves it, torch.int8 quarters it.
        line_search: "approximate_wolfe" (which goes on by slopes where noise or rounding hides
            the loss's decrease, and is strong Wolfe elsewhere), "strong_wolfe", "armijo", None
            (fixed step), or "auto": approximate Wolfe where the closure is the same function at
            every call or ``max_iter`` > 1, else a fixed step on averages.
        max_iter: L-BFGS iterations per ``step``, all on the one closure.
        max_eval: Evaluations per ``step`` at most, the one where it begins included (also where
            ``deterministic`` spares it); at least 2 where a step evaluates its end or searches.
            None for 25 an iteration and that one. Those of a ``pair_closure`` come on top.
        tolerance_grad, tolerance_change, rtol: When an L-BFGS ``step`` stops early, as in
            :class:`~fuse_ext.LBFGS`, but on averages; by default it never does while it can go on.
            ``rtol`` knows no scale, and ``report().converged`` tells a loop that it was reached.
        curvature_tol: Pairs need s.y > curvature_tol \|s\| \|y\|; None for 1e-8 if
            ``deterministic``, else 1e-4.
        self_scaling: Before each pair divide the inverse Hessian by min(1, s.y / s.B s), and begin
            with the oldest pair's scale instead of the newest one's (self-scaling BFGS of Oren and
            Luenberger, and Al-Baali). It costs nothing, and pays in long runs on one function
            with many pairs: PINNs ended 60 to 300 times lower with 500. None: where the closure
            is the same function at every call, there is a line search, and m is at least 100.
        deterministic: True is a promise that the closure is the same function at every call (full
            batch, no dropout). A step then begins with the last step's final evaluation, unless
            parameters or gradients were touched in between: about one evaluation an iteration
            instead of two. False: it is not. None: where it decides anything, find out: the first
            L-BFGS step does not move, and the second sees whether the closure gives the same loss
            and gradient again. Where steps then begin with other ones than the last ended with,
            time and again, it was no such function: Adam takes over, and averages after it.
        pairs: How curvature pairs are made, so that none mixes two batches.

            - "averaged": of two successive means over 10 batches each, with a step on the
              averaged gradient in Adam's metric (fuse_ext.phase.averages): one gradient a step,
              no closure needed, 6 vectors more. Not with a line search.
            - "same_batch": of two gradients on the step's own batch. A line search has the second
              one anyway; a fixed step evaluates the closure once more. ``step(pair_closure=...)``
              takes both gradients on another sample, such as the overlap of two batches.
            - "consecutive": with a fixed step, of the gradients of two successive steps: right
              only where both are of one batch (see ``batch_id`` in :meth:`step`).
            - "auto": averaged or same_batch, as ``line_search`` is without or with one.
        step_cap: Longest step on averages, in lengths of Adam's last step (above lr = 1e-3 of one
            with 1e-3, but not below Adam's own), in Adam's metric; nor does any element move by
            more than so many times lr. The cap falls as steps go by, and halves where the gradient
            jumps.
        check_finite: Before an Adam step, check loss and gradient, and skip the step if either is
            not finite: one read of the gradients more, 4 bytes a parameter beside 28. L-BFGS
            always checks.
        capturable: Steps read nothing from the device, which decides instead, so that a CUDA graph
            can repeat them: one graph for each phase (docs/cuda.md). Needs ``line_search=None``,
            ``max_iter=1``, ``rtol=0`` and a criterion that looks at neither loss nor gradient; and
            ``lr``, where it is a tensor, is one for all groups in the L-BFGS phase. The criterion
            counts calls of ``step``, and there is no return to Adam where L-BFGS fails.
        on_switch: Called with the optimizer after each switch to L-BFGS.
        backend: "auto", "native" (C++) or "reference" (plain PyTorch).

    Attributes:
        phase: "adam" or "lbfgs"; also in every parameter group, and saved with it.

    Memory: Adam 8 bytes a parameter, 4 with bfloat16 moments; L-BFGS 4 (2 m + 2), about half with a
    bfloat16 history, and 24 more on averages.

    Raises:
        ValueError, TypeError: An option out of range, or parameters that cannot share one vector.

    References:
        Jiang et al., FUSE, arXiv 2503.04204, 2025, Algorithm 4.
    """

    _shared_options = (
        "moment_dtype",
        "max_iter",
        "max_eval",
        "tolerance_grad",
        "tolerance_change",
        "rtol",
        "history_size",
        "line_search",
        "history_dtype",
        "curvature_tol",
        "self_scaling",
        "deterministic",
        "pairs",
        "step_cap",
        "check_finite",
        "capturable",
        "phase",
    )
    _required_options = ("lr", "betas")
    # GradScaler then leaves unscaling and the check for infinities to the Adam kernel.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        switch: Switchover | int | Callable[[Observation], bool] | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        decoupled_weight_decay: bool = False,
        eps_inside_root: bool = False,
        moment_dtype: torch.dtype | None = None,
        maximize: bool = False,
        lbfgs_lr: float = 1.0,
        history_size: int | None = None,
        history_dtype: torch.dtype | None = None,
        line_search: str | None = AUTO,
        max_iter: int = 1,
        max_eval: int | None = None,
        tolerance_grad: float = 0.0,
        tolerance_change: float = 0.0,
        rtol: float = 0.0,
        curvature_tol: float | None = None,
        self_scaling: bool | None = None,
        deterministic: bool | None = None,
        pairs: str = AUTO,
        step_cap: float = 7.0,
        check_finite: bool = True,
        capturable: bool = False,
        on_switch: Callable[[FusePV], None] | None = None,
        backend: str = "auto",
    ) -> None:
        if on_switch is not None and not callable(on_switch):
            raise TypeError(f"on_switch must be callable or None, got {on_switch!r}")
        if curvature_tol is None:
            curvature_tol = CURVATURE_TOL[bool(deterministic)]
        if max_eval is None and isinstance(max_iter, int):
            max_eval = 1 + MAX_LINE_SEARCH_EVALUATIONS * max(max_iter, 1)
        self._on_switch = on_switch
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "eps_inside_root": eps_inside_root,
            "moment_dtype": moment_dtype,
            "lbfgs_lr": lbfgs_lr,
            "history_size": LEAST_PAIRS if history_size is None else history_size,
            "history_dtype": history_dtype,
            "line_search": line_search,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "rtol": rtol,
            "curvature_tol": curvature_tol,
            "self_scaling": self_scaling,
            "deterministic": deterministic,
            "pairs": pairs,
            "step_cap": step_cap,
            "check_finite": check_finite,
            "capturable": capturable,
            "phase": ADAM,
            "lr_at_switch": None,
        }
        self._check_group(defaults)
        self._switch = default_switch(defaults) if switch is None else as_switchover(switch)
        if capturable:
            check_switch(self._switch)
        if self._switch.at_once:
            defaults["phase"] = LBFGS_PHASE
        self._adam: AdamEngine | None = None
        self._lbfgs: LbfgsEngine | AveragedEngine | None = None
        super().__init__(params, defaults, backend)
        if history_size is None:
            size = default_history_size(defaults, self.flat)
            for group in (self.defaults, *self.param_groups):
                if group["history_size"] == LEAST_PAIRS:
                    group["history_size"] = size
        self._switch.check(self.flat.params)

    @staticmethod
    def _check_group(group: ParamGroup) -> None:
        check_adam_group(group)
        check_number("lbfgs_lr", group["lbfgs_lr"], 0.0)
        check_lbfgs_group(group)
        check_modes(group)
        searches = group["line_search"] is not None or bool(group["deterministic"])
        check_max_eval(group, searches, group["pairs"] in (AUTO, SAME_BATCH))
        check_number("step_cap", group["step_cap"], 0.0)
        if group["capturable"]:
            check_capturable(group, "line_search")
        if group["phase"] not in (ADAM, LBFGS_PHASE):
            raise ValueError(f"phase must be {ADAM!r} or {LBFGS_PHASE!r}, got {group['phase']!r}")

    def _renewed_group(self, group: ParamGroup) -> ParamGroup:
        return with_possible_max_eval(group, "line_search")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_on_switch": self._on_switch}

    # --- switching --------------------------------------------------------------------------

    def switch_now(self, reason: str = "switch_now() was called") -> None:
        """Leaves Adam for L-BFGS, whatever the criterion says; nothing if already there."""
        if self.phase == ADAM:
            self._begin_lbfgs(reason)

    def _begin_lbfgs(self, reason: str) -> None:
        self._settle()
        log = self._log
        engine = self._successor()
        log["switches"] += 1
        log["switch_step"] = log["adam_steps"]
        log["switch_reason"] = reason
        self._adam = self._counts = None
        for param in self.flat.params:
            for name in ("step", *MOMENTS):
                self.state[param].pop(name, None)
            if not self.state[param]:
                del self.state[param]
        self._lbfgs = engine
        for group in self.param_groups:
            group["phase"] = LBFGS_PHASE
            group["lr_at_switch"] = float(group["lr"])
        if self._on_switch is not None:
            self._on_switch(self)

    def switch_back(self) -> None:
        """Returns to Adam with fresh moments; the criterion starts anew."""
        if self.phase == ADAM:
            return
        if self._lbfgs is None:  # the switch at once, taken back before the first step
            self._log["switches"] += 1
        self._lbfgs = None
        self._drop_lbfgs_state()
        for group in self.param_groups:
            group["phase"] = ADAM
            group["lr_at_switch"] = None
        self._log.update(phase_steps=0, phase_epochs=0)
        self._switch.reset()

    def next_epoch(self) -> None:
        """Tells the criteria that an epoch has ended."""
        self._log["phase_epochs"] += 1

    # --- steps ------------------------------------------------------------------------------

    @without_grad
    def step(
        self,
        closure: Closure | None = None,
        *,
        loss: Any = None,
        batch_id: int | str | None = None,
        pair_closure: Closure | None = None,
    ) -> Any:
        """One Adam step, or ``max_iter`` L-BFGS iterations.

        A step with a NaN or infinite loss or gradient is not taken: it is counted in
        :meth:`report`, and the first one warns. A failed line search is followed by one along -g,
        without curvature, then from shorter and shorter first trials. Where most searches fail so,
        though not for rounding, Adam tries: where the closure is one function, for a single step
        of up to ``max_eval`` evaluations, which ends at the least loss that it met; where it is
        not, losses cannot be compared, and Adam goes on from the last point that was accepted,
        with the criterion started anew.

        Where nothing can be gained any more (``report().converged``, or neither searches nor Adam
        find a lower loss) a step is one call of the closure, which sees whether that is still so:
        new data, parameters moved by hand or thawed ones set it going again.

        Args:
            closure: Zeroes the gradients, computes the loss and its gradients, returns the loss,
                or None where nothing needs it. Optional in the Adam phase, and in the L-BFGS phase
                on averages or with a fixed step and ``max_iter=1``.
            loss: The loss of the gradients at hand, for a criterion that needs it, where there is
                no closure.
            batch_id: What batch this is. Without averages, a pair that awaits its second gradient
                and an evaluation remembered (``deterministic``) are dropped when it changes.
            pair_closure: Like ``closure``, on the sample that the pair's two gradients are to be
                of: the overlap of this batch and the next (multi-batch L-BFGS), or a larger one.
                Called before and after an L-BFGS step without averages; not with ``max_iter`` > 1.

        Returns:
            The loss where the step began.

        Raises:
            ValueError: The closure or loss is missing where it is needed.
            TypeError, ValueError: The closure returns no scalar: not even None, or None to a line
                search, ``rtol`` or a criterion that needs the loss. After any error raised by the
                closure, parameters and state are as before the step (with ``max_iter`` > 1: as
                after its last completed iteration).
        """
        if self.param_groups[0]["capturable"]:
            self._notice_lost_state()
            if batch_id is not None or pair_closure is not None:
                raise ValueError("capturable=True goes with neither batch_id nor pair_closure")
            return self._captured_step(closure, loss)
        self._notice_lost_state()
        if self._adam is None and self._lbfgs is None:
            self._renew_layout()
        # torch.distributed.checkpoint makes the state with an empty step at lr = 0.
        empty = closure is None and loss is None and not any(g["lr"] for g in self.param_groups)
        if self.phase == ADAM:
            return self._adam_step(closure, loss, empty)
        if self._lbfgs is None:
            self._begin_lbfgs(self._switch.reason)
        return None if empty else self._lbfgs_step(closure, batch_id, pair_closure)

    def _adam_step(self, closure: Closure | None, loss: Any, empty: bool) -> Any:
        group, log = self.param_groups[0], self._log
        if self._switch.needs_loss and closure is None and loss is None and not empty:
            raise ValueError(
                f"closure=None and loss=None, but switch={self._switch!r} needs the loss: pass a "
                "closure, or step(loss=...)"
            )
        if closure is not None:
            loss = with_grad(closure)
        value = None
        if loss is not None and (self._switch.needs_loss or group["check_finite"]):
            value = loss_value(loss)
        elif self._switch.needs_loss and not empty:
            check_loss(loss, f"switch={self._switch!r}")
        log["adam_evaluations"] += closure is not None
        scale, found_inf = self._from_grad_scaler()
        if found_inf:  # the scaler's business: it lowers its scale
            log["adam_non_finite"] += 1
            return loss
        if group["check_finite"]:
            self.flat.check_unchanged()
            finite = value is None or math.isfinite(value)
            # The scaler has checked the gradients already.
            if not (finite and (found_inf is not None or grads_are_finite(self.flat, self._ops))):
                log["adam_non_finite"] += 1
                self._warn_non_finite()
                return loss
        if self._adam is None or self._adam.outdated(self.state):
            self._adam = self._make_adam()
        self._adam.step(self.param_groups, scale)
        if empty:
            return loss
        log["adam_steps"] += 1
        log["phase_steps"] += 1
        if value is not None and group["maximize"]:
            value = -value
        observation = Observation(
            step=log["phase_steps"],
            epoch=log["phase_epochs"],
            loss=value,
            grad_norm_sq=self._adam.grad_norm_sq if self._switch.needs_grad_norm else None,
            params=self.flat.params,
        )
        if self._switch.observe(observation):
            self.switch_now(self._switch.reason)
        return loss

    def _lbfgs_step(
        self, closure: Closure | None, batch_id: int | str | None, pair_closure: Closure | None
    ) -> Any:
        assert self._lbfgs is not None
        averaged = isinstance(self._lbfgs, AveragedEngine)
        options = self._options()
        if closure is None and not averaged and (options.line_search or options.max_iter > 1):
            raise ValueError(
                f"closure=None in the L-BFGS phase needs line_search=None and max_iter=1, or "
                f"pairs='averaged', got line_search={options.line_search!r} and "
                f"max_iter={options.max_iter}"
            )
        scale, found_inf = self._from_grad_scaler()
        check_not_scaled(scale, closure)
        if found_inf:
            self._lbfgs.count_non_finite()
            return None
        self._unscale(scale)
        seen = self._entry["non_finite"]
        if isinstance(self._lbfgs, AveragedEngine):
            loss = self._averaged_step(self._lbfgs, closure, options)
        else:
            self._lbfgs.begin_batch(batch_id)
            if pair_closure is not None:
                loss = overlap_step(self._lbfgs, closure, pair_closure, options)
            elif closure is not None and goes_astray(self._lbfgs, options):
                self._log["fallbacks"] += 1
                loss = adam_excursion(self._lbfgs, closure, options, self.param_groups)
            else:
                loss = self._lbfgs.step(closure, options)
        if self._entry["non_finite"] > seen and self._lbfgs.progress.reason == "non_finite":
            self._warn_non_finite()
        self._reconsider(options)
        return loss

    def _reconsider(self, options: LbfgsOptions) -> None:
        """Returns to Adam where L-BFGS fails, or where one function turns out to be batches.

        On one function it stays: but for noise no step has made the loss any worse.
        """
        engine = self._lbfgs
        if not isinstance(engine, LbfgsEngine) or goes_astray(engine, options):
            return
        batches = finds_out(self.param_groups[0]) and engine.function.contradicted
        if engine.failing >= FAILING or batches:
            self._log["fallbacks"] += 1
            self.switch_back()  # from where the last good step has led
        if batches:
            self._log["batches"] = True

    def _options(self) -> LbfgsOptions:
        groups = self.param_groups
        if not isinstance(self._lbfgs, AveragedEngine):
            check_signs(groups)
        lrs = [lbfgs_lr(group) for group in groups]
        same_batch = groups[0]["pairs"] != CONSECUTIVE
        return step_options(self.flat, groups, lrs, "line_search", same_batch, SEARCH)
