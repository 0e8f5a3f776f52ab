"""LBFGS, drop-in for ``torch.optim.LBFGS``."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fuse_ext.checks import FLOATING, check_integer, check_number, check_tolerance
from fuse_ext.kernels.fixed_step import PLACES
from fuse_ext.kernels.hooks import without_grad
from fuse_ext.kernels.reference.memory import SCALE_BLOCK
from fuse_ext.kernels.scalars import layout
from fuse_ext.objective.step_options import LbfgsOptions, spread_lr
from fuse_ext.objective.trials import MAX_LINE_SEARCH_EVALUATIONS
from fuse_ext.optim.flat_optimizer import FlatOptimizer
from fuse_ext.phase.capture import check_capturable, shared_lr
from fuse_ext.phase.device import CapturedLbfgs, make_lbfgs
from fuse_ext.phase.iteration import LbfgsEngine
from fuse_ext.search import make_line_search
from fuse_ext.search.one_function import Values
from fuse_ext.tell.report import Report, lbfgs_fields
from fuse_ext.vector.flat import Closure, FlatParams, ParamGroup, memory_order

HISTORY_DTYPES = (*FLOATING, torch.int8)


def check_lbfgs_group(group: ParamGroup) -> None:
    """Raises for an option of L-BFGS out of range."""
    check_number("weight_decay", group["weight_decay"], 0.0)
    check_integer("max_iter", group["max_iter"], 1)
    if group["max_eval"] is not None:
        check_integer("max_eval", group["max_eval"], 1)
    check_tolerance("tolerance_grad", group["tolerance_grad"])
    check_tolerance("tolerance_change", group["tolerance_change"])
    check_number("rtol", group["rtol"], 0.0)
    check_integer("history_size", group["history_size"], 1)
    check_number("curvature_tol", group["curvature_tol"], 0.0, 1.0)
    dtype = group["history_dtype"]
    if dtype is not None and dtype not in HISTORY_DTYPES:
        raise ValueError(f"history_dtype must be None or one of {HISTORY_DTYPES}, got {dtype!r}")


def least_evaluations(searches: bool, evaluates_end: bool) -> int:
    """Evaluations that an iteration cannot do without: where it begins, and a trial or its end."""
    return 2 if searches or evaluates_end else 1


def default_evaluations(max_iter: int, searches: bool, evaluates_end: bool) -> int:
    """``max_eval`` of LBFGS if nothing is said: torch's, or what one line search may need."""
    least = least_evaluations(searches, evaluates_end)
    whole_search = 1 + MAX_LINE_SEARCH_EVALUATIONS if searches else least
    return max(max_iter * 5 // 4, whole_search)


def check_max_eval(group: ParamGroup, searches: bool, evaluates_end: bool) -> None:
    """Raises ValueError for a budget that no iteration could keep."""
    least = least_evaluations(searches, evaluates_end)
    if group["max_eval"] is not None and group["max_eval"] < least:
        what = "a trial of the line search" if searches else "its end"
        raise ValueError(
            f"max_eval must be at least {least}, for the point where a step begins and {what}, "
            f"got {group['max_eval']}"
        )


def with_possible_max_eval(group: ParamGroup, search_name: str) -> ParamGroup:
    """The group of a checkpoint, with a budget that can be kept.

    Where max_iter=1 torch's default of ``max_iter * 5 // 4`` was saved beside a line search that
    did not keep it.
    """
    if group.get("max_eval") != 1 or group.get(search_name) in (None, "fixed"):
        return group
    return {**group, "max_eval": default_evaluations(1, True, False)}


def check_line_search(name: str, value: Any) -> str | None:
    """The line search's name as the engine wants it; ValueError naming the argument."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a string or None, got {value!r}")
    try:
        search = make_line_search(value)
    except ValueError as error:
        raise ValueError(str(error).replace("line_search", name, 1)) from None
    return None if search is None else search.name


def check_lbfgs_state(entry: dict[str, Any], slots: int, flat: FlatParams) -> None:
    """Raises ValueError unless a state entry holds a history of these parameters."""
    numel = flat.numel
    shapes: dict[str, Any] = {"history": (2, slots, numel), "scalars": (layout(slots)["size"],)}
    history, scalars = entry.get("history"), entry.get("scalars")
    older = (layout(slots)["size_without_sets"],)
    if isinstance(scalars, Tensor) and tuple(scalars.shape) == older:
        shapes["scalars"] = older  # History completes them
    if isinstance(history, Tensor) and history.element_size() < 4:
        shapes["grad_prev"] = (numel,)
    if "control" in entry:  # with capturable=True
        shapes |= {"grad_prev": (numel,), "control": (len(PLACES),)}
    if isinstance(history, Tensor) and history.dtype == torch.int8:
        shapes["history_scale"] = (2, slots, -(-numel // SCALE_BLOCK))
    for name, expected in shapes.items():
        if not isinstance(entry.get(name), Tensor):
            raise ValueError(
                f"state_dict is not of fuse_ext's L-BFGS: it has no tensor {name!r}, "
                f"only {sorted(map(str, entry))}"
            )
        shape = tuple(entry[name].shape)
        if shape != expected:
            raise ValueError(
                f"state_dict does not fit: {name} has shape {shape}, expected {expected} "
                f"(history_size={slots - 1}, {numel} parameters)"
            )
    ours, theirs = memory_order(flat), entry.get("strides", [])
    if ours != theirs:
        raise ValueError(
            f"state_dict does not fit: its parameters had strides {theirs or 'in row-major order'},"
            f" these have {ours or 'in row-major order'}; load it before a change of memory format"
        )
    sets, which = entry.get("sets", [[]]), entry.get("set", 0)
    known = range(len(flat.params))
    if not (
        isinstance(sets, list)
        and all(isinstance(absent, list) and set(absent) <= set(known) for absent in sets)
        and which in range(max(len(sets), 1))
    ):
        raise ValueError(
            f"state_dict does not fit: sets={sets!r} and set={which!r} name no parameters among "
            f"{len(flat.params)}"
        )
    arrival = entry.get("arrival", [])
    if not (
        isinstance(arrival, list)
        and len(arrival) in (0, len(Values._fields))
        and all(isinstance(value, float) for value in arrival)
    ):
        raise ValueError(f"state_dict does not fit: arrival is {arrival!r}")
    pair_step = entry.get("pair_step")
    if not (pair_step is None or isinstance(pair_step, float)):
        raise ValueError(f"state_dict does not fit: pair_step is {pair_step!r}, not a float")


# The options that hold for all groups and that a step reads, in the order of _make_options.
_SHARED = (
    "maximize",
    "max_iter",
    "max_eval",
    "tolerance_grad",
    "tolerance_change",
    "rtol",
    "curvature_tol",
    "deterministic",
)
_shared_values = itemgetter(*_SHARED)


def step_options(
    flat: FlatParams,
    groups: list[ParamGroup],
    lrs: list[float],
    search_name: str,
    same_batch_pairs: bool = False,
    auto: str | None = None,
    zero_freezes: bool = True,
) -> LbfgsOptions:
    """What the groups tell a step of L-BFGS; made anew only when one of their values changes.

    Args:
        flat: The groups' layout; keeps what was made.
        groups: ``Optimizer.param_groups``.
        lrs: The step size of each group.
        search_name: What the option with the line search is called.
        same_batch_pairs: See :class:`LbfgsOptions`.
        auto: The line search that "auto" stands for, where it stands for one.
        zero_freezes: See :class:`LbfgsOptions`.
    """
    first = groups[0]
    decays = [float(group["weight_decay"]) for group in groups]
    search = auto if auto and first[search_name] == "auto" else first[search_name]
    values = lrs, decays, _shared_values(first), search, bool(same_batch_pairs), zero_freezes
    if flat.memo is None or flat.memo[0] != values:
        flat.memo = values, _make_options(flat, search_name, *values)
    options: LbfgsOptions = flat.memo[1]
    return options


def _make_options(
    flat: FlatParams,
    search_name: str,
    lrs: list[float],
    decays: list[float],
    shared: tuple[Any, ...],
    search: Any,
    same_batch_pairs: bool,
    zero_freezes: bool,
) -> LbfgsOptions:
    lr, lr_scale = spread_lr(flat, lrs)
    named = dict(zip(_SHARED, shared, strict=True))
    named["deterministic"] = bool(named["deterministic"])
    ends = named["deterministic"] or same_batch_pairs
    # Too few for these options, where a search was asked for later: the constructor checks.
    if (named["max_eval"] or 0) < least_evaluations(search is not None, ends):
        named["max_eval"] = default_evaluations(named["max_iter"], search is not None, ends)
    for name in ("tolerance_grad", "tolerance_change"):
        named[name] = max(named[name], 0.0)  # -inf is never, as 0 is
    return LbfgsOptions(
        lr=lr,
        lr_scale=lr_scale,
        weight_decay=flat.per_segment(decays, 0.0),
        line_search=check_line_search(search_name, search),
        same_batch_pairs=same_batch_pairs,
        zero_freezes=zero_freezes,
        **named,
    )


class LBFGS(FlatOptimizer):
    r"""L-BFGS in two passes over the history an iteration; drop-in for ``torch.optim.LBFGS``.

    An iteration is Algorithm 1 of the paper: the direction :math:`p = -H g` by the two-loop
    recursion (Algorithm 2, its second loop from the oldest pair to the newest), a step t, and the
    pair s = t p, y = g(x + t p) - g(x). The recursion runs on dot products in float64, so that
    the history is read twice an iteration instead of about five times.

    Differences to torch: parameter groups; a parameter without a gradient, or with lr = 0, takes no
    part in a step and is not written, and pairs are used for the parameters alone that they were
    taken on; a pair is kept when
    :math:`s^T y > r \lVert s \rVert \lVert y \rVert` (torch: s.y > 1e-10, which depends on the
    scale of the loss); a trial with a NaN or infinite loss or gradient counts as too far and is
    never accepted (a fixed step is undone, where its end is evaluated); the line search is that
    of Moré and Thuente; at the end of a step the pair is closed with the gradient of the step's
    own last evaluation, so that pairs do not mix batches.

    Args:
        params: Tensors or parameter groups, all on one device.
        lr: First trial step, and the step itself without a line search. Groups may differ: the
            direction is scaled by each group's share (0 freezes a group).
        max_iter: Iterations a step.
        max_eval: Evaluations a step at most, the one where it begins included (also where
            ``deterministic`` spares it); at least 2 with a line search. None for
            ``max_iter * 5 // 4``, as in torch, but at least 26 with a line search: 25 are its
            trials at most. One that is cut short is followed by one with a shorter first trial.
        tolerance_grad: Stop when max|g| is at most this.
        tolerance_change: Stop when -g.p, max|t p| or the loss's change is at most this. These
            two are absolute, as in torch: a loss of small scale ends early (:meth:`report` says
            so) unless they are 0 (or -inf). inf ends a step where it begins.
        rtol: Stop when an iteration lowers the loss by at most this share of it.
        history_size: m, the pairs kept. torch's default of 100 holds 808 bytes a parameter; 10
            is usually as good.
        line_search_fn: None (fixed step), "strong_wolfe", "approximate_wolfe" (for the floor of
            float32) or "armijo".
        maximize: Ascend.
        weight_decay: L2 penalty weight_decay/2 \|x\|^2, part of the objective.
        history_dtype: Storage of the pairs: torch.bfloat16 for half the memory and traffic,
            torch.int8 (with one float32 scale per 128 elements) for a quarter; None for float32
            (float64 for float64 parameters).
        curvature_tol: r above; 1e-8 for full batches, about 1e-4 for minibatches.
        self_scaling: Scale the inverse Hessian before each pair (see ``FusePV``): for long runs on
            one function with a large ``history_size``.
        deterministic: Promise that the closure is the same function at every call (no minibatch,
            no dropout): a step then starts from the last evaluation instead of repeating it,
            unless parameters or gradients were touched in between (``p.data.add_(1)`` goes
            unseen). Where the loss can fall no further it evaluates once, to see whether that is
            still so.
        capturable: The step reads nothing from the device, which decides instead, so that a CUDA
            graph can repeat it. Needs ``line_search_fn=None``, ``max_iter=1`` and ``rtol=0``, and
            an ``lr`` that is a tensor is one for all groups. Parameters must not be moved between
            steps by anyone else. Of the tolerances on changes only that on -g.p counts.
        backend: "auto", "native" (C++) or "reference" (plain PyTorch).

    Memory: 2 m + 2 vectors of the history's dtype (and one of float32 if it is narrower, or with
    ``capturable``), and one or two vectors of scratch for the line search.

    Raises:
        ValueError, TypeError: An option out of range, or parameters that cannot share one vector.

    References:
        Nocedal and Wright, Numerical Optimization, 2006, Algorithms 7.4 and 7.5. FUSE,
        Algorithms 1 and 2.
    """

    _shared_options = (
        "max_iter",
        "max_eval",
        "tolerance_grad",
        "tolerance_change",
        "rtol",
        "history_size",
        "line_search_fn",
        "maximize",
        "history_dtype",
        "curvature_tol",
        "self_scaling",
        "deterministic",
        "capturable",
    )
    _required_options = ("lr", "history_size")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        rtol: float = 0.0,
        maximize: bool = False,
        weight_decay: float = 0.0,
        history_dtype: torch.dtype | None = None,
        curvature_tol: float = 1e-8,
        self_scaling: bool = False,
        deterministic: bool = False,
        capturable: bool = False,
        backend: str = "auto",
    ) -> None:
        if max_eval is None and isinstance(max_iter, int):
            searches = line_search_fn not in (None, "fixed")
            max_eval = default_evaluations(max_iter, searches, bool(deterministic))
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "rtol": rtol,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
            "maximize": maximize,
            "weight_decay": weight_decay,
            "history_dtype": history_dtype,
            "curvature_tol": curvature_tol,
            "self_scaling": self_scaling,
            "deterministic": deterministic,
            "capturable": capturable,
        }
        self._check_group(defaults)
        self._engine: LbfgsEngine | None = None
        super().__init__(params, defaults, backend)

    @staticmethod
    def _check_group(group: ParamGroup) -> None:
        check_number("lr", group["lr"], 0.0)
        check_lbfgs_group(group)
        search = check_line_search("line_search_fn", group["line_search_fn"])
        check_max_eval(group, search is not None, bool(group["deterministic"]))
        if group["capturable"]:
            check_capturable(group, "line_search_fn")

    @property
    def _entry(self) -> dict[str, Any]:
        """As in torch, the one state of the optimizer lies with its first parameter."""
        entry: dict[str, Any] = self.state[self.flat.params[0]]
        return entry

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups, state = state_dict["param_groups"], state_dict["state"]
        first, *others = (key for group in groups for key in group["params"])
        if first in state:
            check_lbfgs_state(state[first], groups[0]["history_size"] + 1, self.flat)
        for key in others:
            entry = state.get(key)
            if entry:
                raise ValueError(
                    f"state_dict is not of fuse_ext's L-BFGS: it holds {sorted(map(str, entry))} "
                    f"for parameter {key}"
                )

    def _renewed_group(self, group: ParamGroup) -> ParamGroup:
        return with_possible_max_eval(group, "line_search_fn")

    def _adopt_state(self) -> None:
        self._engine = None
        first = self.flat.params[0]
        entry = self.state.get(first)
        if not entry:
            return
        history = entry.get("history")
        if history is None or history.shape[2] != self.flat.numel:
            del self.state[first]  # a group was added: start afresh
            return
        self._engine = self._make_engine()

    def _make_engine(self) -> LbfgsEngine:
        group = self.param_groups[0]
        return make_lbfgs(self.flat, self._ops, self._entry, group, bool(group["self_scaling"]))

    def _options(self) -> LbfgsOptions:
        groups = self.param_groups
        return step_options(self.flat, groups, [float(g["lr"]) for g in groups], "line_search_fn")

    @without_grad
    def step(self, closure: Closure | None = None) -> Any:
        """Up to ``max_iter`` iterations.

        Args:
            closure: Zeroes the gradients, computes the loss and its gradients, returns the loss
                (or None, which no line search and no ``rtol`` can do with).
                May be left out for one iteration of a fixed step on the gradients at hand.

        Returns:
            The closure's loss where the step began, or None.

        Raises:
            ValueError: A line search or max_iter > 1 without a closure.
            TypeError, ValueError: The closure returns no scalar; the parameters are then where
                the last completed iteration left them, as for any error in the closure.
        """
        if self._engine is None or self._engine.outdated(self.state):
            self._renew_layout()
            self._adopt_state()
        if self.param_groups[0]["capturable"]:
            return self._captured_step(closure)
        options = self._options()
        if closure is None and (options.line_search is not None or options.max_iter > 1):
            raise ValueError(
                f"closure=None needs line_search_fn=None and max_iter=1, got "
                f"line_search_fn={options.line_search!r} and max_iter={options.max_iter}"
            )
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine.step(closure, options)

    def _captured_step(self, closure: Closure | None) -> Any:
        groups = self.param_groups
        check_capturable(groups[0], "line_search_fn")
        lr = shared_lr(groups, self.flat.device)
        lrs = [float(group["lr"]) if lr is None else 1.0 for group in groups]
        options = step_options(self.flat, groups, lrs, "line_search_fn")
        if not isinstance(self._engine, CapturedLbfgs):
            self._engine = self._make_engine()
        assert isinstance(self._engine, CapturedLbfgs)
        return self._engine.step(closure, options, lr)

    def _settle(self) -> None:
        engine = self._engine
        if isinstance(engine, CapturedLbfgs) and not engine.outdated(self.state):
            engine.settle()

    def report(self) -> Report:
        """What was done, and why it stopped."""
        self._settle()
        if self._engine is None or self._engine.outdated(self.state):
            return Report(phase="lbfgs")
        return Report(phase="lbfgs", **lbfgs_fields(self._engine, self._entry))
