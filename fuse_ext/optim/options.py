"""The table of options: what each is, where it may lie, what it means for, what goes with what.

Constructors, ``add_param_group``, ``load_state_dict`` and docs/options.md read this one table.
Defaults stand in the constructors' signatures, where users look for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fuse_ext.checks import (
    FLOATING,
    check_betas,
    check_integer,
    check_number,
    check_tolerance,
)
from fuse_ext.curvature.dense import BFGS, BROYDEN
from fuse_ext.objective.step_options import check_line_search, least_evaluations
from fuse_ext.phase.living.metric.state import METRICS
from fuse_ext.phase.modes import (
    ADAM,
    AUTO,
    CURVATURES,
    DENSE,
    LBFGS,
    PAIRS,
    SAME_BATCH,
    check_capturable,
)
from fuse_ext.switch.criterion import Switchover
from fuse_ext.switch.known_optimum import NearSolution
from fuse_ext.vector.flat import ParamGroup

HISTORY_DTYPES = (*FLOATING, torch.int8)


@dataclass(frozen=True)
class Option:
    """An entry of a parameter group.

    Attributes:
        name: What it is called.
        takes: Type and range in words.
        phases: Which phases it means something for: "Adam", "L-BFGS" or both.
        check: Raises for a value out of range; None where any value has a meaning. What it
            returns, if anything, takes the value's place.
        shared: Whether all groups must agree.
        of_process: Whether it says how this process runs: a checkpoint does not say it.
        state: Whether it is no option but state that is saved with the groups.
    """

    name: str
    takes: str
    phases: str
    check: Callable[[str, Any], Any] | None = None
    shared: bool = False
    of_process: bool = False
    state: bool = False


def _at_least(low: float, high: float | None = None) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if high is None:
            check_number(name, value, low)
        else:
            check_number(name, value, low, high)

    return check


def _integer(low: int, or_none: bool = False) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not (or_none and value is None):
            check_integer(name, value, low)

    return check


def _yes_no_or_none(name: str, value: Any) -> None:
    if value not in (True, False, None):
        raise TypeError(f"{name} must be True, False or None, got {value!r}")


def _yes_no(name: str, value: Any) -> None:
    if value not in (True, False):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _betas(name: str, value: Any) -> tuple[float, float]:
    return check_betas(value)


def _moment_dtype(name: str, value: Any) -> None:
    if value not in (None, torch.bfloat16):
        raise ValueError(f"moment_dtype must be None or torch.bfloat16, got {value!r}")


def _history_dtype(name: str, value: Any) -> None:
    if value is not None and value not in HISTORY_DTYPES:
        raise ValueError(f"history_dtype must be None or one of {HISTORY_DTYPES}, got {value!r}")


def _history_device(name: str, value: Any) -> None:
    if value not in (None, "cpu"):
        raise ValueError(f"history_device must be None or 'cpu', got {value!r}")


def _not_supported(name: str, value: Any) -> None:
    if value:
        raise ValueError(f"{name}=True is not supported: the step is one fused kernel")


def _line_search(name: str, value: Any) -> None:
    check_line_search(name, value)


def _line_search_or_auto(name: str, value: Any) -> None:
    if value != AUTO:
        check_line_search(name, value)


def _errors(name: str, value: Any) -> tuple[type[BaseException], ...] | None:
    """One class or several, always as a tuple."""
    classes = (value,) if isinstance(value, type) else value
    if not isinstance(classes, (tuple, list)) or not all(
        isinstance(error, type) and issubclass(error, Exception) for error in classes
    ):
        raise TypeError(f"{name} must be a tuple of exception classes, got {value!r}")
    return tuple(classes)


def _phase(name: str, value: Any) -> None:
    if value not in (ADAM, LBFGS):
        raise ValueError(f"phase must be {ADAM!r} or {LBFGS!r}, got {value!r}")


def _any_of(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _one_of(*names: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value not in names:
            raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")

    return check


def in_words(group: ParamGroup) -> ParamGroup:
    """A group as it is saved: torch.distributed.checkpoint gathers no dtypes or classes."""
    words = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in group.items()}
    if "trial_errors" in words:
        words["trial_errors"] = ()
    return words


def out_of_words(group: ParamGroup) -> ParamGroup:
    """A saved group with its dtypes, which older ones hold as such."""
    known = {str(dtype): dtype for dtype in HISTORY_DTYPES}
    return {k: known.get(str(v), v) if k.endswith("_dtype") else v for k, v in group.items()}


_BOTH, _FIRST, _SECOND = "both", "Adam", "L-BFGS"
_SEARCHES = '"strong_wolfe", "approximate_wolfe", "armijo" or None'
_OPTIONS = (
    Option("lr", "a number >= 0, or a tensor with one element", _BOTH, _at_least(0.0)),
    Option("betas", "two numbers in [0, 1)", _BOTH, _betas),
    Option("eps", "a number >= 0", _FIRST, _at_least(0.0)),
    Option("weight_decay", "a number >= 0", _BOTH, _at_least(0.0)),
    Option("amsgrad", "a bool", _FIRST),
    Option("maximize", "a bool", _BOTH),
    Option("foreach", "a bool or None; accepted for torch's sake", _FIRST),
    Option("fused", "a bool or None; accepted for torch's sake", _FIRST),
    Option("differentiable", "False", _FIRST, _not_supported),
    Option("decoupled_weight_decay", "a bool", _BOTH),
    Option("eps_inside_root", "a bool", _FIRST),
    Option("moment_dtype", "None or torch.bfloat16", _FIRST, _moment_dtype, True, True),
    Option("master_weights", "a bool", _BOTH, shared=True, of_process=True),
    Option("shard_state", "a bool", _BOTH, _yes_no, shared=True, of_process=True),
    Option("lbfgs_lr", "a number >= 0", _SECOND, _at_least(0.0)),
    Option("max_iter", "an int >= 1", _SECOND, _integer(1), shared=True),
    Option("max_eval", "an int >= 1, or None", _SECOND, _integer(1, True), shared=True),
    Option("tolerance_grad", "a number >= 0 or +-inf", _SECOND, check_tolerance, shared=True),
    Option("tolerance_change", "a number >= 0 or +-inf", _SECOND, check_tolerance, shared=True),
    Option("rtol", "a number >= 0", _SECOND, _at_least(0.0), shared=True),
    Option("history_size", "an int >= 1", _SECOND, _integer(1), shared=True),
    Option("curvature_tol", "a number in [0, 1]", _SECOND, _at_least(0.0, 1.0), shared=True),
    Option("history_dtype", "None, a float dtype or torch.int8", _SECOND, _history_dtype, True),
    Option("history_device", 'None or "cpu"', _SECOND, _history_device, True, True),
    Option("pairs", _any_of(PAIRS), _SECOND, _one_of(*PAIRS), shared=True),
    Option("metric", _any_of(METRICS), _SECOND, _one_of(*METRICS), shared=True),
    Option("line_search", f'"auto", {_SEARCHES}', _SECOND, _line_search_or_auto, shared=True),
    Option("line_search_fn", _SEARCHES, _SECOND, _line_search, shared=True),
    Option("deterministic", "True, False or None", _SECOND, _yes_no_or_none, shared=True),
    Option("self_scaling", "True, False or None", _SECOND, _yes_no_or_none, shared=True),
    Option("curvature", _any_of(CURVATURES), _SECOND, _one_of(*CURVATURES), shared=True),
    Option("update", '"broyden" or "bfgs"', _SECOND, _one_of(BROYDEN, BFGS), shared=True),
    Option("trial_errors", "a tuple of exception classes", _SECOND, _errors, True, True),
    Option("same_batch_pairs", "a bool", _SECOND, shared=True),
    Option("average_weights", "a bool", _SECOND, _yes_no, shared=True),
    Option("step_cap", "a number >= 0", _SECOND, _at_least(0.0), shared=True),
    Option("check_finite", "a bool", _FIRST, shared=True),
    Option("capturable", "a bool", _BOTH, shared=True, of_process=True),
    Option("phase", '"adam" or "lbfgs"', _BOTH, _phase, shared=True, state=True),
    Option("lr_at_switch", "a number or None", _SECOND, state=True),
)
OPTIONS = {option.name: option for option in _OPTIONS}


# --- what goes with what --------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What options of one group have to keep together.

    Attributes:
        says: In words.
        check: Raises ValueError for a group that does not keep it.
    """

    says: str
    check: Callable[[ParamGroup], None]


def _max_eval_suffices(
    searches: Callable[[ParamGroup], bool], evaluates_end: Callable[[ParamGroup], bool]
) -> Callable[[ParamGroup], None]:
    def check(group: ParamGroup) -> None:
        search = searches(group)
        least = least_evaluations(search, evaluates_end(group))
        if group["max_eval"] is not None and group["max_eval"] < least:
            what = "a trial of the line search" if search else "its end"
            raise ValueError(
                f"max_eval must be at least {least}, for the point where a step begins and {what}, "
                f"got {group['max_eval']}"
            )

    return check


def _matrix_on_host(group: ParamGroup) -> None:
    if group["curvature"] == DENSE and group["capturable"]:
        raise ValueError("curvature='dense' does not go with capturable=True")


def _rows_on_host(group: ParamGroup) -> None:
    if group["history_device"] is None:
        return
    for name, not_with in (("capturable", True), ("curvature", DENSE)):
        if group.get(name) == not_with:
            raise ValueError(f"history_device='cpu' does not go with {name}={not_with!r}")


def check_switch(switch: Switchover, capturable: bool) -> None:
    """Raises ValueError for one that reads the device, where a graph is to repeat Adam's steps."""
    reads = switch.needs_loss or switch.needs_grad_norm
    if not capturable:
        return
    if reads or any(isinstance(leaf, NearSolution) for leaf in switch._leaves()):
        raise ValueError(
            f"capturable=True needs a switch that reads nothing from the device, got {switch!r}; "
            "AfterSteps, AfterEpochs, AtOnce and Never do not, nor does When(..., "
            "needs_loss=False, needs_grad_norm=False), and switch_now() switches by hand"
        )


def _capturable(search: str) -> Rule:
    return Rule(
        f"capturable=True needs {search}=None, max_iter=1 and rtol=0",
        lambda group: check_capturable(group, search),
    )


class Table:
    """The options of one optimizer.

    Args:
        names: In the order in which groups hold and constructors check them.
        required: Those without which a saved group is not of this optimizer.
        rules: What goes with what.
        one_sign: Whether all groups must ascend or descend alike.
    """

    def __init__(
        self, names: str, required: str, rules: tuple[Rule, ...] = (), one_sign: bool = False
    ) -> None:
        self.options = [OPTIONS[name] for name in names.split()]
        self.required = required.split()
        self.rules = rules
        self.shared = [
            o.name for o in self.options if o.shared or one_sign * (o.name == "maximize")
        ]
        self.of_process = [o.name for o in self.options if o.of_process]

    def defaults(self, given: dict[str, Any]) -> dict[str, Any]:
        """The options among a constructor's arguments, as torch's ``defaults``."""
        return {option.name: given[option.name] for option in self.options if option.name in given}

    def check(self, group: ParamGroup) -> None:
        """Raises ValueError or TypeError for an option out of range, or two at odds."""
        for option in self.options:
            if option.check is not None and option.name in group:
                value = option.check(option.name, group[option.name])
                if value is not None:
                    group[option.name] = value
        for rule in self.rules:
            rule.check(group)

    def check_groups(self, groups: list[ParamGroup]) -> None:
        """Raises as :meth:`check`, and ValueError where groups differ in a shared option."""
        for group in groups:
            self.check(group)
        for name in self.shared:
            for i, group in enumerate(groups):
                if group[name] != groups[0][name]:
                    raise ValueError(
                        f"{name} must be the same in all parameter groups, got "
                        f"{groups[0][name]!r} in group 0 and {group[name]!r} in group {i}"
                    )


_ROWS_ON_HOST = Rule(
    'history_device="cpu" goes with neither capturable=True nor curvature="dense"', _rows_on_host
)
ADAM_TABLE = Table(
    "lr betas eps weight_decay amsgrad maximize foreach capturable differentiable fused "
    "decoupled_weight_decay eps_inside_root moment_dtype master_weights shard_state",
    required="lr betas",
)
LBFGS_TABLE = Table(
    "lr max_iter max_eval tolerance_grad tolerance_change rtol history_size line_search_fn "
    "maximize weight_decay history_dtype history_device curvature_tol self_scaling update "
    "deterministic trial_errors capturable shard_state",
    required="lr history_size",
    rules=(
        Rule(
            "max_eval >= 2 with a line search or deterministic=True",
            _max_eval_suffices(
                lambda group: group["line_search_fn"] not in (None, "fixed"),
                lambda group: bool(group["deterministic"]),
            ),
        ),
        _capturable("line_search_fn"),
        _ROWS_ON_HOST,
    ),
    one_sign=True,
)
FUSE_TABLE = Table(
    "lr betas eps weight_decay amsgrad maximize differentiable decoupled_weight_decay "
    "eps_inside_root lbfgs_lr history_size history_dtype history_device line_search max_iter "
    "max_eval tolerance_grad tolerance_change rtol curvature_tol deterministic trial_errors "
    "same_batch_pairs shard_state",
    required="lr betas history_size",
    rules=(
        Rule(
            'line_search="auto" is FusePV\'s alone',
            lambda group: _line_search("line_search", group["line_search"]),
        ),
    ),
    one_sign=True,
)
FUSE_PV_TABLE = Table(
    "lr betas eps weight_decay amsgrad maximize differentiable decoupled_weight_decay "
    "eps_inside_root moment_dtype master_weights lbfgs_lr history_size history_dtype "
    "history_device line_search max_iter max_eval tolerance_grad tolerance_change rtol "
    "curvature_tol self_scaling curvature update deterministic trial_errors pairs metric "
    "average_weights step_cap check_finite capturable shard_state phase lr_at_switch",
    required="lr betas",
    rules=(
        Rule(
            "max_eval >= 2 with a line search, deterministic=True or pairs of one batch",
            _max_eval_suffices(
                lambda group: group["line_search"] is not None or bool(group["deterministic"]),
                lambda group: group["pairs"] in (AUTO, SAME_BATCH),
            ),
        ),
        _capturable("line_search"),
        Rule('curvature="dense" does not go with capturable', _matrix_on_host),
        _ROWS_ON_HOST,
    ),
)
