"""FusePV (Algorithm 4): Adam until a switchover condition holds, then L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fuse_ext.kernels.hooks import without_grad
from fuse_ext.optim.flat_optimizer import FlatOptimizer
from fuse_ext.optim.options import FUSE_PV_TABLE, check_switch
from fuse_ext.phase import modes, succession
from fuse_ext.phase.living.phase import put_average
from fuse_ext.phase.modes import ADAM, AUTO, LBFGS, finds_out
from fuse_ext.phase.protocol import Call, Outcome, Scaling
from fuse_ext.phase.told import ask, told_of
from fuse_ext.switch.criterion import Observation, Switchover
from fuse_ext.switch.when import as_switchover
from fuse_ext.tell.log import LOG, criterion_in, falls_back, log_in, rested, warn_non_finite
from fuse_ext.tell.report import Report, report_of_phases
from fuse_ext.vector.flat import Closure, FlatParams, ParamGroup


class FusePV(FlatOptimizer):
    r"""Adam first, then L-BFGS, in one optimizer (FUSE-PV, Algorithm 4).

    Each call of ``step`` is an Adam step (Eq. 2) until ``switch`` says that Adam has done its part;
    then it is ``max_iter`` iterations of L-BFGS (Algorithms 1 and 2), with Adam's moments released,
    or on minibatches one step of Adam's averages in ``metric``. No step touches a parameter whose
    gradient is None; nor, after Adam, one whose group has lr = 0.

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
        lr: Adam's step size. Learning-rate schedulers drive it; after the switch the L-BFGS step is
            scaled by lr over the lr at the switch (or the first later one, if that was 0).
        switch: A :class:`~fuse_ext.Switchover`; an int for that many steps; a callable on an
            :class:`~fuse_ext.Observation`; None for 20 steps where minibatches may follow, else
            :class:`~fuse_ext.LossPlateau`, or a :class:`~fuse_ext.WarmUp` if ``deterministic``.
        betas, eps, weight_decay, amsgrad, decoupled_weight_decay, eps_inside_root, moment_dtype,
            master_weights: As in :class:`~fuse_ext.Adam`. On minibatches weight decay is that of
            the Adam phase, and master weights stay. With a line search or a fixed step it is an L2
            term, weight_decay/2 \|x\|^2, decoupled or not, and they go.
        maximize: Ascend. Groups may differ on minibatches, and with ``switch=Never()``.
        lbfgs_lr: First trial step of L-BFGS, and the step itself without a line search.
        curvature: "dense" for the inverse Hessian as a matrix of 4 d^2 bytes for d parameters
            (:mod:`~fuse_ext.curvature.dense`), "pairs" for L-BFGS, "auto" for a matrix up to
            512 MiB (11,576 parameters; on a GPU 1 GiB, 16,376) on one function with a line search,
            where nothing is said of pairs, and for pairs elsewhere.
        update: "broyden" (of the matrix, or of pairs that scale themselves), or "bfgs".
        history_size: m, the curvature pairs kept; None for 10 or, on one function, as many as fit
            64 MiB, at most 200 (BFGS: 500) and d, but at least 10: 4 m d reads an iteration.
        history_dtype: Storage of the pairs: torch.bfloat16 halves it, torch.int8 quarters it.
        history_device: "cpu": pairs of parameters on a device in the host's (pinned) memory.
        line_search: "approximate_wolfe" (which goes on by slopes where noise or rounding hides
            the loss's decrease, and is strong Wolfe elsewhere), "strong_wolfe", "armijo", None
            (fixed step), or "auto": approximate Wolfe where the closure is the same function at
            every call or ``max_iter`` > 1, else none, and no pairs (see ``metric``).
        max_iter: L-BFGS iterations per ``step``, all on the one closure.
        max_eval: Evaluations per ``step`` at most, the (perhaps spared) one where it begins
            included; at least 2 where it evaluates its end or searches; None: 25 an iteration, + 1.
        tolerance_grad, tolerance_change, rtol: When an L-BFGS ``step`` stops early, as in
            :class:`~fuse_ext.LBFGS`; by default never while it can go on. ``report().converged``
            tells a loop that ``rtol`` was reached.
        curvature_tol: Pairs need s.y > curvature_tol \|s\| \|y\|; None for 1e-8 if
            ``deterministic`` or found out to be so, else 1e-4.
        self_scaling: Before each pair divide the inverse Hessian by min(1, s.y / s.B s), and begin
            with the oldest pair's scale, not the newest one's (Oren, Luenberger, Al-Baali). None:
            with a matrix, and on one function with a line search and m of at least 100.
        deterministic: True is a promise that the closure is the same function at every call (full
            batch, no dropout). A step then begins with the last one's final evaluation, unless
            parameters or gradients were touched in between, so that an iteration takes about one;
            where a trial does not fit that, the start is evaluated again. False: it is not. None:
            find out, by a first step after Adam that does not move, with a line search by holding
            a step's start against the last one's end. If they agree all is as if promised; if not,
            time and again, Adam takes over.
        trial_errors: As in :class:`~fuse_ext.LBFGS`.
        pairs: How curvature pairs are made, so that none mixes two batches: "same_batch" of two
            gradients on the step's own batch (a fixed step evaluates once more) or
            ``pair_closure``'s, "consecutive" of two steps' gradients, right with a fixed step where
            both are of one batch (see ``batch_id``), "auto" as the former with a line search, and
            without one none (see ``metric``).
        metric: On minibatches without pairs: "diagonal", Adam's, or "kronecker" for all matrices;
            "auto" where gradients gain by it, sides up to 512 (GPU 2,048), thin ones in blocks.
        average_weights: There, keep the mean of the last weights, for :meth:`eval`.
        step_cap: Longest step on minibatches, in Adam's steps (above lr = 1e-3 in those of 1e-3,
            but not below Adam's own). It falls, below that only where known losses do not fall.
        check_finite: Skip an Adam step where loss or gradient is not finite: one more read of the
            gradients (4 bytes beside 28). L-BFGS always does.
        capturable: Steps read nothing from the device, which decides instead, so that a CUDA graph
            can repeat them: one for each phase (docs/cuda.md). Needs ``line_search=None``,
            ``max_iter=1``, ``rtol=0``, a criterion that looks at neither loss nor gradient, and one
            ``lr`` for all groups in L-BFGS where it is a tensor. The criterion counts calls of
            ``step``, and Adam does not take over where L-BFGS fails.
        on_switch: Called with the optimizer after each switch to L-BFGS.
        backend: "auto", "native" (C++) or "reference" (plain PyTorch).
        process_group: The ranks that step together, with DistributedDataParallel a group or a mesh
            (docs/large-models.md); "local" for none; None for those of DTensors.
        shard_state: Then each rank holds the state of its share of the rows alone (ZeRO-1).

    Attributes:
        phase: "adam" or "lbfgs"; also in every parameter group, and saved with it.

    Memory: 8 bytes a parameter; on minibatches 12, and 8 a^2 for a side of a; L-BFGS 4 (2 m + 2).

    Raises:
        ValueError, TypeError: An option out of range, or parameters that cannot share one vector.

    References:
        Jiang et al., FUSE, arXiv 2503.04204, 2025, Algorithm 4.
    """

    _table = FUSE_PV_TABLE
    # GradScaler then leaves unscaling and the check for infinities to the Adam kernel.
    _step_supports_amp_scaling = True
    _phase: succession.AnyPhase | None = None  # the one that exists; none before the first step
    _began = False  # whether there has been a log: without one the state has been cleared since

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        switch: Switchover | int | Callable[[Observation], bool] | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        decoupled_weight_decay: bool = False,
        eps_inside_root: bool = False,
        moment_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        maximize: bool = False,
        lbfgs_lr: float = 1.0,
        history_size: int | None = None,
        history_dtype: torch.dtype | None = None,
        history_device: str | None = None,
        line_search: str | None = AUTO,
        max_iter: int = 1,
        max_eval: int | None = None,
        tolerance_grad: float = 0.0,
        tolerance_change: float = 0.0,
        rtol: float = 0.0,
        curvature_tol: float | None = None,
        self_scaling: bool | None = None,
        curvature: str = AUTO,
        update: str = "broyden",
        deterministic: bool | None = None,
        trial_errors: tuple[type[Exception], ...] = (),
        pairs: str = AUTO,
        metric: str = AUTO,
        average_weights: bool = True,
        step_cap: float = 7.0,
        check_finite: bool = True,
        capturable: bool = False,
        on_switch: Callable[[FusePV], None] | None = None,
        backend: str = "auto",
        process_group: Any = None,
        shard_state: bool = False,
    ) -> None:
        given = dict(locals())
        if on_switch is not None and not callable(on_switch):
            raise TypeError(f"on_switch must be callable or None, got {on_switch!r}")
        self._unsaid = modes.fill_in(given)
        defaults = self._table.defaults({**given, "phase": ADAM, "lr_at_switch": None})
        self._table.check(defaults)
        self._on_switch = on_switch
        self._switch = modes.default_switch(defaults) if switch is None else as_switchover(switch)
        check_switch(self._switch, capturable)
        defaults["phase"] = LBFGS if self._switch.at_once else ADAM
        super().__init__(params, defaults, backend, process_group)
        self._fill_in()
        self._switch.check(self.flat.params)

    @property
    def phase(self) -> str:
        """As in the groups."""
        return str(self.param_groups[0]["phase"])

    @property
    def _log(self) -> dict[str, Any]:
        """Counters and the criterion's state, saved with the rest."""
        self._began = True
        return log_in(self._entry)

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
        with the criterion started anew. On minibatches so does it, for 100 steps at least, where
        losses have stayed above those at the switch. Without memory for a phase the last goes on.

        Where nothing can be gained any more (``report().converged``, or no search and no Adam step
        finds a lower loss) a step is one call of the closure, to see whether that is still so.

        Args:
            closure: Zeroes the gradients, computes loss and gradients, returns the loss, or None
                where nothing needs it. Optional in Adam, on minibatches, and with a fixed step.
            loss: Of the gradients at hand, where there is no closure and a criterion needs it.
            batch_id: What batch this is. In L-BFGS a change is as :meth:`new_objective`.
            pair_closure: Like ``closure``, on the sample that the pair's two gradients are to be
                of, before and after the step: the overlap of two batches, say. Not if max_iter > 1.

        Returns:
            The loss where the step began.

        Raises:
            ValueError: The closure or loss is missing where it is needed.
            RuntimeError: After :meth:`eval`.
            TypeError, ValueError: The closure returns no scalar: not even None, or None to a line
                search, ``rtol`` or a criterion that needs the loss. After any error raised by the
                closure, parameters and state are as before the step (with ``max_iter`` > 1: as
                after its last completed iteration).
        """
        self._notice_lost_state()
        if self.param_groups[0]["capturable"] and (batch_id is not None or pair_closure):
            raise ValueError("capturable=True goes with neither batch_id nor pair_closure")
        if (phase := self._phase) is None or not phase.begun:  # parameters may be converted
            phase = self._begin_phase()
        call = Call(closure, self.param_groups, loss, self._log, self._switch, Scaling.of(self))
        call.batch_id, call.pair_closure = batch_id, pair_closure
        outcome = ask(phase, call, self.flat)
        if outcome.one_function:
            outcome = self._grow(succession.found_one_function).step(call.taken_over(outcome.loss))
        if outcome.believed or succession.grows_now(self._ground, self._phase, call.log):
            self._grow(succession.grown)
        return self._follow(outcome)

    def _grow(self, follows: Callable[..., succession.AnyPhase]) -> succession.AnyPhase:
        """The phase for a closure that was found to be one function, or the one at hand."""
        self._fill_in(found=True)
        self._phase = follows(self._ground(), self._phase, self._log)
        if succession.GROWS_AT in self._log:  # there was no memory
            self._fill_in()
        return self._phase

    def _follow(self, outcome: Outcome) -> Any:
        """Asks the criterion; leaves L-BFGS where it fails or has taken batches for a function."""
        if outcome.refused:
            warn_non_finite(self)
        observed = outcome.observed
        if observed and modes.agreed(self._switch, observed, self.flat) and rested(self._log):
            self.switch_now(self._switch.reason or modes.ON_ANOTHER_RANK)
        if outcome.troubled and falls_back(self._log, outcome, finds_out(self.param_groups[0])):
            self.switch_back()  # from where the last good step has led
        return self._noted(outcome.loss)

    @without_grad
    def eval(self) -> None:
        """On minibatches gives parameters the mean of the last ones, to validate and save.

        It gains what a schedule that ends at 0 does. To be undone by :meth:`train` before the next
        gradient; on ranks that share parameters all are to call both.
        """
        self._notice_lost_state()
        put_average(self._phase, True)

    @without_grad
    def train(self) -> None:
        """Gives parameters back what steps go on from, where :meth:`eval` was called."""
        self._notice_lost_state()
        put_average(self._phase, False)

    def report(self) -> Report:
        """What was done, and why."""
        self._notice_lost_state()
        self._settle()
        told = told_of(self._ground(), self._phase, self._switch, self._log)
        told["loss"] = self._last_loss
        return report_of_phases(self.phase, self._log, self._entry, self._phase, **told)

    def _ground(self) -> succession.Ground:
        return succession.Ground(self.flat, self._ops, self.state, self.param_groups)

    def _begin_phase(self) -> succession.AnyPhase:
        """The phase that begins with this step."""
        self._renew_layout()
        if self.phase == LBFGS:  # the switch comes at once
            self._begin_lbfgs(self._switch.reason)
        else:
            self._phase = self._ground().adam()
        return self._phase  # type: ignore[return-value]

    def switch_now(self, reason: str = "switch_now() was called") -> None:
        """Leaves Adam, whatever the criterion says; nothing if already left, or without memory."""
        if self.phase == ADAM:
            self._begin_lbfgs(reason)

    def _begin_lbfgs(self, reason: str) -> None:
        self._settle()
        known = self._log, self._unsaid, reason
        phase = succession.successor(self._ground(), self._phase, *known)
        if phase is None:
            return
        succession.drop_adam_state(self._ground(), phase)
        self._phase = phase
        for group in self.param_groups:
            group["phase"], group["lr_at_switch"] = LBFGS, float(group["lr"])
        if self._on_switch is not None:
            self._on_switch(self)

    def switch_back(self) -> None:
        """Returns to Adam, with the moments if they were kept; the criterion starts anew."""
        if self.phase == ADAM:
            return
        self._log["switches"] += self._phase is None  # at once, taken back before the first step
        succession.leave_second(self._ground(), self._phase)
        self._phase = None
        self._begin_adam()
        self._log.update(phase_steps=0, phase_epochs=0)

    def _begin_adam(self, phase: str = ADAM) -> None:
        for group in self.param_groups:
            group.update(phase=phase, lr_at_switch=None)
        self._fill_in()
        self._switch.reset()

    def _fill_in(self, found: bool = False) -> None:
        modes.fill_in_groups([self.defaults, *self.param_groups], self.flat, self._unsaid, found)

    def next_epoch(self) -> None:
        """Tells the criteria that an epoch has ended."""
        self._log["phase_epochs"] += 1

    def __getstate__(self) -> dict[str, Any]:
        own = "_switch", "_on_switch", "_unsaid"
        return super().__getstate__() | {name: vars(self)[name] for name in own}

    def _notice_lost_state(self) -> None:
        """Where the user has cleared the state, begins anew, or with what was put in its place."""
        phase, first = self._phase, self.flat.params[0]
        lost = phase is not None and phase.outdated(self.state)
        if not lost and (not self._began or LOG in self.state.get(first, {})):
            return
        self._phase = None
        if not self.state.get(first):  # the first phase, with nothing observed
            self._began = False
            self._begin_adam(LBFGS if self._switch.at_once else ADAM)
        self._renew_layout()
        self._adopt_state()

    def _adopt_state(self) -> None:
        self._phase = succession.adopted(self._ground(), self.phase)

    def _settle(self) -> None:
        if self.__dict__.get("_flat") is not None and self.flat.params[0] in self.state:
            succession.settle(self._phase, self._entry, self._log)

    def _check_groups(self, groups: list[ParamGroup]) -> None:
        super()._check_groups(groups)
        modes.check_signs_to_come(groups, self._switch)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        succession.check_phase_state(state_dict, self.flat, self.defaults, LOG)
        if (criterion := criterion_in(state_dict)) is not None:
            self._switch._parse(criterion)

    def state_dict(self) -> dict[str, Any]:
        """As in torch: the phase is in the parameter groups, tensors and counters in the state."""
        if self._waiting is None:
            self._notice_lost_state()
            self._log["criterion"] = self._switch.state_dict()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, for a checkpoint of this class or of Adam, in either phase.

        Nothing changes if it does not fit (ValueError, TypeError: it is of another optimizer,
        criterion or model, or out of range). The criterion keeps its own thresholds.
        """
        super().load_state_dict(state_dict)
        criterion = self.state.get(self.flat.params[0], {}).get(LOG, {}).get("criterion")
        self._switch.reset() if criterion is None else self._switch.load_state_dict(criterion)

    def _note_group(self, before: FlatParams) -> None:
        modes.fill_in_anew([self.defaults, *self.param_groups], before, self.flat, self._unsaid)
