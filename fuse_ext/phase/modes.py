"""Which L-BFGS follows Adam, and with what, where nothing is said."""

from __future__ import annotations

from typing import Any

from fuse_ext.curvature.dense import BROYDEN, matrix_nbytes
from fuse_ext.objective.step_options import MAX_LINE_SEARCH_EVALUATIONS, mixed_signs
from fuse_ext.switch.criterion import Observation, Switchover
from fuse_ext.switch.plateau import LossPlateau
from fuse_ext.switch.steps import AfterSteps, Never, WarmUp
from fuse_ext.switch.when import When
from fuse_ext.vector.flat import FlatParams, ParamGroup
from fuse_ext.vector.host.rows import lies_apart

ADAM, LBFGS = "adam", "lbfgs"  # phases
AUTO = "auto"
# How curvature pairs are made.
SAME_BATCH, CONSECUTIVE = "same_batch", "consecutive"
PAIRS = (AUTO, SAME_BATCH, CONSECUTIVE)
# The line search that "auto" means where the closure is the same function at every call.
SEARCH = "approximate_wolfe"
# Curvature test without and with noise in the gradients, by ``deterministic``.
CURVATURE_TOL = {True: 1e-8, False: 1e-4}
# Adam steps before the phase on minibatches: two spans of the averaged gradient at beta1 = 0.9.
# Later ones gain nothing (python -m benchmarks.stochastic), and rates that suit the next phase can
# be too long for Adam.
FIRST_STEPS = 20
# Curvature pairs if nothing is said. On one function more are better, as long as they are cheap.
LEAST_PAIRS, MOST_PAIRS = 10, 500
# With the Broyden update, which has more out of each: a network of 4,417 parameters ends after
# 1,500 evaluations at 2.8e-5 (Burgers) and 1.5e-10 (Poisson) with 200 pairs, at 4.2e-5 and 4.9e-10
# with 500, at 3.2e-4 and more with 100; with BFGS and 500 at 3.1e-3.
BROYDEN_PAIRS = 200
HISTORY_BYTES = 64 * 2**20
# What inverse Hessian L-BFGS keeps: a matrix, or pairs.
DENSE, IN_PAIRS = "dense", "pairs"
CURVATURES = (AUTO, DENSE, IN_PAIRS)
# The largest matrix if nothing is said: 11,576 parameters on a CPU, 16,376 on a GPU, which reads
# that much in less than a millisecond. A network of 9,873 parameters on Poisson's equation ends at
# an error of 3.7e-9 with a matrix, at 4.3e-7 with pairs; it takes twice the time for as many
# evaluations (900 points on one core), and is 7 times ahead at equal time (python -m
# benchmarks.published --rows poisson-deep). Beyond that a pass takes ten times such a closure.
MATRIX_BYTES = {"cpu": 512 * 2**20, "cuda": 1024 * 2**20}
# With fewer of them self-scaling costs some 5% more evaluations (python -m benchmarks.robustness).
SCALING_PAIRS = 100


def living(group: ParamGroup) -> bool:
    """Whether Adam is to be followed by the phase for minibatches, in a living metric.

    It is where nothing else was asked for.
    """
    asked = group["pairs"] != AUTO or group["line_search"] != AUTO or group["max_iter"] != 1
    return not (asked or group["deterministic"])


def closure_wanted(group: ParamGroup) -> str:
    """The option for whose sake the phase after Adam needs a closure; empty if it needs none."""
    if living(group) or (group["line_search"] is None and group["max_iter"] == 1):
        return ""
    if group["line_search"] not in (AUTO, None):
        return f"line_search={group['line_search']!r}"
    return "deterministic=True" if group["deterministic"] else f"max_iter={group['max_iter']}"


def finds_out(group: ParamGroup) -> bool:
    """Whether the closure will be watched to learn if it is the same function at every call."""
    return living(group) and group["deterministic"] is None


def watches_searches(group: ParamGroup) -> bool:
    """Whether steps with a line search are held against each other to learn the same."""
    return group["deterministic"] is None


def default_switch(group: ParamGroup) -> Switchover:
    """When to leave Adam if nothing is said."""
    if living(group):
        return AfterSteps(FIRST_STEPS)
    if group["deterministic"]:
        return WarmUp() | LossPlateau()
    return LossPlateau()


def fill_in(given: dict[str, Any]) -> set[str]:
    """Puts numbers where FusePV's constructor was given None; what more may be known of later."""
    unsaid = {name for name in ("history_size", "curvature_tol") if given[name] is None}
    if given["curvature_tol"] is None:
        given["curvature_tol"] = CURVATURE_TOL[bool(given["deterministic"])]
    if given["max_eval"] is None and isinstance(given["max_iter"], int):
        given["max_eval"] = 1 + MAX_LINE_SEARCH_EVALUATIONS * max(given["max_iter"], 1)
    if given["curvature"] == AUTO and (given["history_size"] or given["history_dtype"]):
        given["curvature"] = IN_PAIRS  # which is what these are of
    if given["history_size"] is None:
        given["history_size"] = LEAST_PAIRS
    return unsaid


def fill_in_groups(
    groups: list[ParamGroup], flat: FlatParams, unsaid: set[str], found: bool
) -> None:
    """Puts numbers for what the constructor was told nothing of, where more is known.

    Args:
        groups: The parameter groups.
        flat: Their parameters.
        unsaid: "history_size", "curvature_tol", both or none of them.
        found: Whether the closure was found to be one function, though nothing was promised.

    A group that has another number than this would have put there keeps it.
    """
    numbers = {known: _numbers(groups[0], flat, known) for known in (False, True)}
    now = numbers[found or bool(groups[0]["deterministic"])]
    for group in groups:
        for name in unsaid:
            if group[name] in (numbers[False][name], numbers[True][name]):
                group[name] = now[name]


def fill_in_anew(
    groups: list[ParamGroup], before: FlatParams, flat: FlatParams, unsaid: set[str]
) -> None:
    """As :func:`fill_in_groups`, where a group has joined the parameters ``before``.

    Numbers for one function stay numbers for one function, found or promised.
    """
    promised = bool(groups[0]["deterministic"])
    kinds = [
        (_numbers(groups[0], before, known), _numbers(groups[0], flat, known))
        for known in (promised, not promised)
    ]
    for group in groups:
        for name in unsaid:
            now = (new[name] for last, new in kinds if group[name] == last[name])
            group[name] = next(now, group[name])


def _numbers(group: ParamGroup, flat: FlatParams, one_function: bool) -> dict[str, Any]:
    """Pairs and curvature test where nothing is said."""
    size = LEAST_PAIRS
    if may_scale({**group, "deterministic": one_function}):
        dtype = group["history_dtype"] or flat.dtype
        numel = max(flat.usual, 1)  # all ranks must come to the same number
        most = BROYDEN_PAIRS if updates_as_broyden(group, flat) else MOST_PAIRS
        fit = min(HISTORY_BYTES // (2 * dtype.itemsize * numel), max(flat.total, 1), most)
        size = max(fit, LEAST_PAIRS)
    return {"history_size": size, "curvature_tol": CURVATURE_TOL[one_function]}


def may_scale(group: ParamGroup) -> bool:
    """Whether self-scaling is asked for, or could pay: on one function with a line search."""
    if group["self_scaling"] is not None:
        return bool(group["self_scaling"])
    return bool(group["deterministic"]) and group["line_search"] is not None


def takes_matrix(group: ParamGroup, flat: FlatParams) -> bool:
    """Whether a dense matrix takes the place of pairs: asked for, or small on one function."""
    if group.get("curvature", IN_PAIRS) != AUTO:
        return bool(group.get("curvature") == DENSE)
    # No rank has all of the vectors that a matrix is made of; nor is a matrix kept on the host.
    if flat.spread or lies_apart(group.get("history_device"), flat):
        return False
    one_function = group["deterministic"] and group["line_search"] is not None
    most = MATRIX_BYTES.get(flat.device.type, MATRIX_BYTES["cpu"])
    return bool(one_function and not group["capturable"]) and matrix_nbytes(flat.numel) <= most


def self_scales(group: ParamGroup) -> bool:
    """Whether L-BFGS scales itself."""
    if group["self_scaling"] is not None:
        return bool(group["self_scaling"])
    return may_scale(group) and group["history_size"] >= SCALING_PAIRS


def updates_as_broyden(group: ParamGroup, flat: FlatParams) -> bool:
    """Whether pairs make the Broyden update where they scale themselves.

    Not with rows narrower than float32: products of steps, which it needs, are had from how they
    were made, and those that are stored would be others.
    """
    dtype = group["history_dtype"] or flat.dtype
    wide = dtype.is_floating_point and dtype.itemsize >= 4
    return bool(group["update"] == BROYDEN and wide and not group["capturable"])


def will_scale(group: ParamGroup, flat: FlatParams, unsaid: set[str]) -> bool:
    """Whether L-BFGS would scale itself if its closure were found to be one function.

    With one iteration a step its first pair alone is made before the second call tells, and that
    one scales nothing.
    """
    if group["deterministic"] is not None or group["max_iter"] != 1:
        return False
    found = {**group, "deterministic": True}
    if "history_size" in unsaid:
        found["history_size"] = _numbers(group, flat, True)["history_size"]
    return self_scales(found)


def second_phase(group: ParamGroup, flat: FlatParams, kind: str) -> str:
    """Which kind of phase follows Adam, or is at work, and why, in words.

    Args:
        group: The first parameter group.
        flat: The parameters.
        kind: "dense", "pairs", "kronecker" or "diagonal", as the phase at work keeps its
            curvature; empty before there is one.
    """
    if not kind:
        if living(group):
            watch = ", unless the closure is found to be one function" * finds_out(group)
            return f"will be Adam's averages in a metric that grows, for minibatches{watch}"
        kind = DENSE if takes_matrix(group, flat) else IN_PAIRS
        return f"will be {second_phase(group, flat, kind)}"
    if kind not in (DENSE, IN_PAIRS):
        metric = "a Kronecker-factored metric" if kind == "kronecker" else "Adam's diagonal metric"
        unsaid = group["deterministic"] is None
        known = "the closure is not known to be one function" if unsaid else "deterministic=False"
        return f"Adam's averages in {metric}, for minibatches: {known}"
    one_function = "deterministic=True" if group["deterministic"] else "found to be one function"
    size = f"{flat.numel:,} parameters"
    if kind == DENSE:
        asked = "curvature='dense'" if group["curvature"] == DENSE else one_function
        needs = matrix_nbytes(flat.numel) / 2**20
        return f"a dense inverse Hessian ({group['update']}): {asked}; {size}, {needs:.3g} MiB"
    search = SEARCH if group["line_search"] == AUTO else group["line_search"]
    step = "a fixed step" if search is None else search
    if group["capturable"] or search is None or group["curvature"] == IN_PAIRS:
        why = f"as was asked for; {size}"
    elif takes_matrix({**group, "deterministic": True}, flat):
        why = f"the closure is not known to be one function; {size}"
    else:
        why = f"{size} are too many for a matrix ({matrix_nbytes(flat.numel) / 2**20:,.0f} MiB)"
    scales = search is not None and self_scales({**group, "deterministic": True})
    how = " (broyden)" * (scales and updates_as_broyden(group, flat))
    return f"L-BFGS with up to {group['history_size']} pairs{how} and {step}: {why}"


def check_signs(groups: list[ParamGroup]) -> None:
    """Raises ValueError for groups of both signs, which L-BFGS cannot have."""
    if mixed_signs(groups):
        raise ValueError(
            "maximize must be the same in all parameter groups, got "
            f"{[group['maximize'] for group in groups]}: ascent in one group and descent in "
            "another have no common objective for a line search or a fixed step; in the default "
            "phase on minibatches and with switch=Never() each group has its own sign"
        )


def check_signs_to_come(groups: list[ParamGroup], switch: Switchover) -> None:
    """As :func:`check_signs`, unless L-BFGS will never begin."""
    if not isinstance(switch, Never) and (switch.at_once or not living(groups[0])):
        check_signs(groups)


# Why a criterion that says nothing here switches all the same.
ON_ANOTHER_RANK = "a criterion says so on another rank"


def compares_losses(group: ParamGroup) -> bool:
    """Whether how often a step calls the closure depends on the losses that it returns."""
    name = "line_search_fn" if "line_search_fn" in group else "line_search"
    search = group.get(name)
    if search == AUTO:
        return not living(group)
    return search not in (None, "fixed") or bool(group.get("deterministic"))


def check_ranks(group: ParamGroup, flat: FlatParams) -> None:
    """Raises where options do not go with parameters that several ranks hold, or may hold.

    Raises:
        ValueError: A matrix of vectors of which no rank has all; a graph that would have to talk;
            pairs on the host, whose sums are not told to others.
        RuntimeError: A line search among ranks of which nobody has said if they step together.
    """
    if flat.spread and group.get("curvature") == DENSE:
        raise ValueError(
            "curvature='dense' goes with neither DTensors nor shard_state=True: no rank has all of "
            "a vector"
        )
    if flat.together is not None and group.get("capturable") and "history_size" in group:
        raise ValueError(
            f"capturable=True does not go with a step of {flat.together.size} ranks, which the "
            "host decides"
        )
    if flat.rows is not None and group.get("capturable"):
        raise ValueError("capturable=True does not go with shard_state=True, whose steps talk")
    if flat.together is not None and group.get("history_device"):
        raise ValueError(
            f"history_device='cpu' does not go with a step of {flat.together.size} ranks"
        )
    if flat.unsaid and compares_losses(group):
        raise RuntimeError(
            "there are other ranks, and with a line search or deterministic=True each would go its "
            "own way where their losses differ, and wait for the others for ever: pass "
            "process_group=torch.distributed.group.WORLD if they train one model "
            '(DistributedDataParallel), or process_group="local" if each trains its own'
        )


def agreed(switch: Switchover, seen: Observation, flat: FlatParams) -> bool:
    """What a criterion says on any rank; ours say the same on all, for they see the same."""
    verdict = switch.observe(seen)
    if flat.together is None:
        return verdict
    theirs = (
        isinstance(leaf, When) or not type(leaf).__module__.startswith("fuse_ext.")
        for leaf in switch._leaves()
    )
    return flat.measures.any(verdict)[0] if any(theirs) else verdict


def check_capturable(group: ParamGroup, search: str) -> None:
    """Raises ValueError where an option needs the host between two launches.

    Args:
        group: The parameter group.
        search: What the option with the line search is called.
    """
    wants = ((search, None), ("max_iter", 1), ("rtol", 0.0)) if group["capturable"] else ()
    for name, wanted in wants:
        if group[name] != wanted:
            raise ValueError(
                f"capturable=True needs {name}={wanted!r}, got {name}={group[name]!r}: "
                "the host would have to read the loss between two iterations or trials"
            )
