"""Fuse (Algorithm 3): every step blends Adam's and L-BFGS's iterate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuse_ext.checks import check_integer, check_number
from fuse_ext.curvature.moments import MOMENTS, Moments, check_adam_state
from fuse_ext.curvature.ring import History
from fuse_ext.kernels.hooks import without_grad
from fuse_ext.kernels.scalars import Header
from fuse_ext.objective.evaluations import Point
from fuse_ext.objective.step_options import MAX_LINE_SEARCH_EVALUATIONS, StepOptions, step_options
from fuse_ext.optim.flat_optimizer import FlatOptimizer
from fuse_ext.optim.options import FUSE_TABLE
from fuse_ext.phase.lbfgs.iteration import Iteration, check_lbfgs_state
from fuse_ext.phase.lbfgs.phase import LbfgsPhase
from fuse_ext.phase.modes import CURVATURE_TOL
from fuse_ext.phase.succession import drop_lbfgs_state
from fuse_ext.tell.report import Report, lbfgs_fields
from fuse_ext.vector.flat import Closure, Part
from fuse_ext.vector.host.rows import lies_apart

PHASE = "fuse"
# What a step of L-BFGS is in a blend: one iteration that nothing ends early. Its evaluations are
# those of a search, the one where it begins and the one after the step.
_ONE_ITERATION = {
    "max_iter": 1,
    "max_eval": MAX_LINE_SEARCH_EVALUATIONS + 2,
    "tolerance_grad": 0.0,
    "tolerance_change": 0.0,
    "rtol": 0.0,
}


@dataclass(frozen=True)
class _Schedule:
    """Theta over the number of steps taken (the first step is 0).

    Attributes:
        steps: How many steps the change takes, at least 1.
        start, end: Theta before and after, each in [0, 1].
    """

    steps: int
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)
        check_number("start", self.start, 0.0, 1.0)
        check_number("end", self.end, 0.0, 1.0)


class LinearTheta(_Schedule):
    """From ``start`` to ``end`` in a straight line over ``steps`` steps, then ``end``."""

    def __call__(self, step: int) -> float:
        """Theta at a step (the first is 0)."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


class CosineTheta(_Schedule):
    """From ``start`` to ``end`` along half a cosine over ``steps`` steps, then ``end``."""

    def __call__(self, step: int) -> float:
        """Theta at a step (the first is 0)."""
        share = 0.5 * (1.0 + math.cos(math.pi * min(step / self.steps, 1.0)))
        return self.end + (self.start - self.end) * share


class Fuse(FlatOptimizer):
    r"""Adam and L-BFGS at once: :math:`x_{k+1} = \theta x^A + (1 - \theta) x^L` (Algorithm 3).

    :math:`x^A` is Adam's iterate (Eq. 2) and :math:`x^L` that of L-BFGS (Algorithm 1), both from
    :math:`x_k` and its gradient; both states advance at every step, and the curvature pair uses
    the step really taken. theta near 1 early and near 0 late is the paper's advice. A step costs
    both methods' work; :class:`~fuse_ext.FusePV` is the practical version.

    Args:
        params: Tensors or parameter groups, all on one device.
        lr: Adam's step size. Learning-rate schedulers drive it alone; L-BFGS has ``lbfgs_lr``.
        theta: Adam's share, in [0, 1]: a number, or a function of the number of steps taken, such
            as :class:`LinearTheta` or :class:`CosineTheta`. None for ``LinearTheta(1000)``.
        line_search: How x^L finds its step: None (``lbfgs_lr``), "armijo", "strong_wolfe" or
            "approximate_wolfe".
        deterministic: Promise that the closure is the same function at every call: the pair is
            then completed by the next step's evaluation, unless parameters were moved in between.
        trial_errors: As in :class:`~fuse_ext.LBFGS`.
        same_batch_pairs: Otherwise, with a closure, evaluate it once more after the step, so that
            no pair mixes two batches.
        betas, eps, weight_decay, amsgrad, decoupled_weight_decay, eps_inside_root: As in FusePV.
        maximize, lbfgs_lr, history_size, history_dtype, history_device, curvature_tol, backend:
            As in FusePV.
        process_group, shard_state: As in FusePV.

    Memory: Adam's 8 bytes a parameter and L-BFGS's 4 (2 m + 2), and one vector of scratch (three
    with a line search).

    Raises:
        ValueError, TypeError: An option out of range, or parameters that cannot share one vector.

    References:
        FUSE, arXiv 2503.04204, Algorithm 3.
    """

    _table = FUSE_TABLE

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        theta: float | Callable[[int], float] | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        decoupled_weight_decay: bool = False,
        eps_inside_root: bool = False,
        maximize: bool = False,
        lbfgs_lr: float = 1.0,
        history_size: int = 10,
        history_dtype: torch.dtype | None = None,
        history_device: str | None = None,
        line_search: str | None = None,
        curvature_tol: float | None = None,
        deterministic: bool = False,
        trial_errors: tuple[type[Exception], ...] = (),
        same_batch_pairs: bool = True,
        backend: str = "auto",
        process_group: Any = None,
        shard_state: bool = False,
    ) -> None:
        given = dict(locals())
        if theta is None:
            theta = LinearTheta(1000)
        if not callable(theta):
            check_number("theta", theta, 0.0, 1.0)
        if curvature_tol is None:
            given["curvature_tol"] = CURVATURE_TOL[bool(deterministic)]
        defaults = self._table.defaults({**given, **_ONE_ITERATION})
        self._table.check(defaults)
        self._theta = theta
        self._adam: Moments | None = None
        self._lbfgs: Iteration | None = None  # on this history
        self._history: History | None = None
        self._grads: Tensor | None = None
        super().__init__(params, defaults, backend, process_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_theta": self._theta}

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups, state = state_dict["param_groups"], state_dict["state"]
        keys = [i for group in groups for i in group["params"]]
        first = state.get(keys[0], {})
        # Before the first step taken, and where it has no gradient, no moments of Adam.
        moments = {name: first[name] for name in ("step", *MOMENTS) if name in first}
        check_adam_state({**state, keys[0]: moments}, self.flat.params, keys)
        if any(state.get(key) for key in keys):
            check_lbfgs_state(first, groups[0]["history_size"] + 1, self.flat)

    def _adopt_state(self) -> None:
        self._adam = self._lbfgs = self._grads = None
        if "history" not in self.state.get(self.flat.params[0], {}):
            return
        if self._entry["history"].shape[2] != self.flat.numel:
            drop_lbfgs_state(self._entry)  # a group was added: curvature starts afresh
        self._make_halves()

    def _make_halves(self) -> None:
        group = self.param_groups[0]
        self._adam = Moments(self.flat, self._ops, self.state, self.param_groups)
        size, dtype = group["history_size"], group["history_dtype"]
        apart = lies_apart(group["history_device"], self.flat)
        self._history = History(self.flat, self._ops, self._entry, size, dtype, apart=apart)
        self._lbfgs = Iteration(self.flat, self._ops, self._entry, self._history)

    @property
    def theta(self) -> float:
        """Adam's share in the next step."""
        theta = self._theta
        if callable(theta):
            theta = theta(self.state.get(self.flat.params[0], {}).get("n_iter", 0))
        check_number("theta", theta, 0.0, 1.0)
        return float(theta)

    @without_grad
    def step(self, closure: Closure | None = None) -> Any:
        """One blended step.

        A step with a NaN or infinite loss or gradient is not taken; it is counted in
        :meth:`report`.

        Args:
            closure: Zeroes the gradients, computes the loss and its gradients, returns the loss.
                May return None, or be left out, without a line search.

        Returns:
            The loss where the step began, or None.

        Raises:
            ValueError: A line search without a closure; theta outside [0, 1].
            TypeError, ValueError: The closure returns no scalar. Whatever the closure raises
                leaves the parameters as they were; only an error in the evaluation after the step
                (``same_batch_pairs``) leaves the step taken and its pair dropped.
        """
        if closure is None and self._would_not_move():
            self._make_ready()
            assert self._adam is not None
            self._adam.step(self.param_groups)
            return None
        options, theta = self._options(), self.theta
        if closure is None and options.line_search is not None:
            raise ValueError(
                f"closure=None needs line_search=None, got line_search={options.line_search!r}"
            )
        self._make_ready()
        assert self._adam is not None and self._lbfgs is not None
        lbfgs = self._lbfgs
        self.flat.check_unchanged()
        point = lbfgs.objective.start(closure, options)
        if not point.finite:
            lbfgs.refuse(point)
            return self._noted(point.loss)
        if not point.part.params:
            lbfgs.progress.reason = "gradient"
            return self._noted(point.loss)
        header = lbfgs.find_direction(point, options)
        step = self._lbfgs_step_length(closure, options, point, header)
        origin = lbfgs.trials.origin()
        lbfgs.history.move(origin, 0.0, save=True)
        self._adam.step(self.param_groups)
        assert self._history is not None
        self._history.blend(origin, theta, step)
        lbfgs.take_step(1.0)
        lbfgs.progress.step_length = step
        self._entry["n_iter"] += 1
        if closure is not None and options.same_batch_pairs and not options.deterministic:
            self._complete_pair(closure, options)
        lbfgs.objective.note_arrival(None, options)
        return self._noted(point.loss)

    def _would_not_move(self) -> bool:
        """Whether lr and gradients are 0, as where torch.distributed.checkpoint makes a state."""
        if any(float(group["lr"]) for group in self.param_groups):
            return False
        return not any(p.grad is not None and bool(p.grad.any()) for p in self.flat.params)

    def _make_ready(self) -> None:
        """Makes the halves; anew where the user has cleared or replaced the state."""
        if self._lbfgs is None or self._lbfgs.objective.outdated(self.state):
            self._renew_layout()
            self._adopt_state()
        if self._lbfgs is None:
            self._make_halves()

    def _lbfgs_step_length(
        self, closure: Closure | None, options: StepOptions, point: Point, header: Header | None
    ) -> float:
        """t of x^L = x + t p; 0 where L-BFGS has no step to offer."""
        assert self._lbfgs is not None
        progress = self._lbfgs.progress
        if header is None or options.lr == 0.0:
            progress.reason = "no_descent" if header is None else "lr"
            return 0.0
        progress.reason = "max_iter"
        trials = self._lbfgs.trials
        first = trials.first_trial(header, point, options, options.lr * trials.usual.share)
        if options.line_search is None or closure is None:
            return first
        flat, part = self.flat, self._lbfgs.history.part
        if self._grads is None:
            self._grads = flat.new_vector()
        params, offsets = part.reals(part.params), part.offsets
        self._ops.grad_gather(params, point.grads, offsets, self._grads)
        result, *_ = self._lbfgs.search(closure, options, point, header, first)
        # Adam steps from the same point with the same gradient.
        self._lbfgs.history.move(self._lbfgs.trials.origin(), 0.0, save=False)
        self._restore_gradients(part)
        if not result.success:
            # As in LBFGS: without history the next direction is -g.
            self._entry["line_search_failures"] += 1
            progress.reason = "line_search"
            if header.usable > 0:
                self._entry["resets"] += 1
                self._lbfgs.history.reset()
        return result.step

    def _restore_gradients(self, part: Part) -> None:
        """Gives the parameters the gradients back that the step began with, and no other."""
        for i in part.absent:
            self.flat.params[i].grad = None
        for i in part.indices:
            if (param := self.flat.params[i]).grad is None:
                param.grad = torch.zeros_like(param)
        assert self._grads is not None
        _, grads = self.flat.gradients()
        self._ops.grad_scatter(part.reals(part.params), grads, part.offsets, self._grads)

    def _complete_pair(self, closure: Closure, options: StepOptions) -> None:
        assert self._lbfgs is not None
        try:
            point = self._lbfgs.objective.evaluate(closure, options, False)
        except BaseException:
            self._lbfgs.objective.drop_pair()
            raise
        if point.finite:
            self._lbfgs.absorb_pair(point, options)
        else:
            self._lbfgs.refuse(point)

    def _options(self) -> StepOptions:
        groups = self.param_groups
        lrs = [float(group["lbfgs_lr"]) for group in groups]
        same_batch = groups[0]["same_batch_pairs"]
        # Adam moves a group whose lbfgs_lr is 0, unless its own lr is 0 as well.
        still = all(float(g["lr"]) == 0.0 for g in groups if float(g["lbfgs_lr"]) == 0.0)
        return step_options(self.flat, groups, lrs, "line_search", same_batch, zero_freezes=still)

    def new_objective(self) -> None:
        """Says that the closure is another function from the next step on.

        The pair that awaits its second gradient (``deterministic``) goes; all else stays.
        """
        if self._lbfgs is not None:
            self._lbfgs.objective.new_objective()

    def report(self) -> Report:
        """What was done, and why."""
        if self._lbfgs is None or self._adam is None or self._lbfgs.objective.outdated(self.state):
            return Report(phase=PHASE)
        fields = lbfgs_fields(LbfgsPhase(self._lbfgs), self._entry)
        fields["state_bytes"] += self._adam.nbytes
        fields["workspace_bytes"] += 0 if self._grads is None else self._grads.nbytes
        fields["loss"] = self._last_loss
        return Report(phase=PHASE, adam_steps=self._entry["n_iter"], **fields)
