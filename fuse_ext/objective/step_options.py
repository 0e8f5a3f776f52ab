"""What one step of L-BFGS is told, and how the parameter groups say it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from typing import Any

from fuse_ext.search import make_line_search
from fuse_ext.vector.flat import FlatParams, ParamGroup

# Trials of one line search at most, as in torch.optim.LBFGS.
MAX_LINE_SEARCH_EVALUATIONS = 25


@dataclass(frozen=True)
class StepOptions:
    """What one step needs to know; see :class:`fuse_ext.LBFGS` for the meanings.

    Attributes:
        lr: First trial step (the step itself without a line search).
        lr_scale: Share of each parameter in a step; empty for 1.
        weight_decay: L2 coefficient of each parameter; empty for 0.
        maximize: Ascend.
        max_iter, max_eval: Budget of one call of ``step``. Where it begins counts as one
            evaluation, made or remembered.
        tolerance_grad, tolerance_change, rtol: When to stop; 0 for never.
        line_search: Name, or None for a fixed step.
        curvature_tol: Pairs need s.y > curvature_tol |s| |y|.
        deterministic: The closure is the same function at every call.
        seen: That it is has not been promised but seen, and may turn out to be wrong.
        same_batch_pairs: Without a line search, evaluate the closure once more after the last
            step, so that no pair mixes two batches.
        pairs_elsewhere: The caller completes the pairs.
        zero_freezes: A parameter with share 0 takes no part in a step, as if it had no gradient.
            False where something else moves it as well (Fuse).
        trial_errors: What the closure may raise at a trial, whose loss is infinite then.
    """

    lr: float = 1.0
    lr_scale: list[float] = field(default_factory=list)
    weight_decay: list[float] = field(default_factory=list)
    maximize: bool = False
    max_iter: int = 1
    max_eval: int = 25
    tolerance_grad: float = 0.0
    tolerance_change: float = 0.0
    rtol: float = 0.0
    line_search: str | None = "strong_wolfe"
    curvature_tol: float = 1e-8
    deterministic: bool = False
    seen: bool = False
    same_batch_pairs: bool = True
    pairs_elsewhere: bool = False
    zero_freezes: bool = True
    trial_errors: tuple[type[Exception], ...] = ()

    @cached_property
    def promised(self) -> StepOptions:
        """The same for a closure that is known to be one function."""
        return replace(self, deterministic=True, seen=True)

    @cached_property
    def promises(self) -> bool:
        """Whether the user has said that the closure is one function."""
        return self.deterministic and not self.seen

    @cached_property
    def compares(self) -> bool:
        """Whether steps are compared with each other; a fixed step goes on as torch's does."""
        return self.deterministic or self.line_search is not None

    @cached_property
    def freezing(self) -> list[float] | None:
        """Shares of which those that are 0 freeze a parameter; None where none is.

        With lr = 0 for all nothing moves, and nothing else changes.
        """
        freezes = self.zero_freezes and self.lr != 0.0 and 0.0 in self.lr_scale
        return self.lr_scale if freezes else None

    @cached_property
    def needs_loss(self) -> str:
        """What needs the closure's loss, in words; empty where nothing does."""
        if self.line_search is not None:
            return f"the line search {self.line_search!r}"
        return f"rtol={self.rtol:g}" if self.rtol else ""

    @cached_property
    def objective(self) -> tuple[Any, ...]:
        """The options that the objective depends on."""
        frozen = None if self.freezing is None else [share == 0.0 for share in self.freezing]
        return self.maximize, self.weight_decay, frozen


def spread_lr(flat: FlatParams, lrs: list[float]) -> tuple[float, list[float]]:
    """One step length for all groups, and each parameter's share of it."""
    largest = max(lrs)
    shares = [lr / largest if largest > 0.0 else 0.0 for lr in lrs]
    return largest, flat.per_segment(shares, 1.0)


def least_evaluations(searches: bool, evaluates_end: bool) -> int:
    """Evaluations that an iteration cannot do without: where it begins, and a trial or its end."""
    return 2 if searches or evaluates_end else 1


def default_evaluations(max_iter: int, searches: bool, evaluates_end: bool) -> int:
    """``max_eval`` of LBFGS if nothing is said: torch's, or what one line search may need."""
    least = least_evaluations(searches, evaluates_end)
    whole_search = 1 + MAX_LINE_SEARCH_EVALUATIONS if searches else least
    return max(max_iter * 5 // 4, whole_search)


def check_line_search(name: str, value: Any) -> str | None:
    """The line search's name as a step takes it; ValueError naming the argument."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a string or None, got {value!r}")
    try:
        search = make_line_search(value)
    except ValueError as error:
        raise ValueError(str(error).replace("line_search", name, 1)) from None
    return None if search is None else search.name


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
    "trial_errors",
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
) -> StepOptions:
    """What the groups tell a step of L-BFGS; made anew only when one of their values changes.

    Args:
        flat: The groups' layout; keeps what was made.
        groups: ``Optimizer.param_groups``.
        lrs: The step size of each group.
        search_name: What the option with the line search is called.
        same_batch_pairs: See :class:`StepOptions`.
        auto: The line search that "auto" stands for, where it stands for one.
        zero_freezes: See :class:`StepOptions`.
    """
    first = groups[0]
    decays = [float(group["weight_decay"]) for group in groups]
    search = auto if auto and first[search_name] == "auto" else first[search_name]
    values = lrs, decays, _shared_values(first), search, bool(same_batch_pairs), zero_freezes
    if flat.memo is None or flat.memo[0] != values:
        flat.memo = values, _make_options(flat, search_name, *values)
    options: StepOptions = flat.memo[1]
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
) -> StepOptions:
    lr, lr_scale = spread_lr(flat, lrs)
    named = dict(zip(_SHARED, shared, strict=True))
    named["deterministic"] = bool(named["deterministic"])
    ends = named["deterministic"] or same_batch_pairs
    # Too few for these options, where a search was asked for later: the constructor checks.
    if (named["max_eval"] or 0) < least_evaluations(search is not None, ends):
        named["max_eval"] = default_evaluations(named["max_iter"], search is not None, ends)
    for name in ("tolerance_grad", "tolerance_change"):
        named[name] = max(named[name], 0.0)  # -inf is never, as 0 is
    return StepOptions(
        lr=lr,
        lr_scale=lr_scale,
        weight_decay=flat.per_segment(decays, 0.0),
        line_search=check_line_search(search_name, search),
        same_batch_pairs=same_batch_pairs,
        zero_freezes=zero_freezes,
        **named,
    )


def mixed_signs(groups: list[ParamGroup]) -> bool:
    """Whether some groups ascend and others descend."""
    others = groups[1:]
    return bool(others) and {bool(g["maximize"]) for g in others} != {bool(groups[0]["maximize"])}
