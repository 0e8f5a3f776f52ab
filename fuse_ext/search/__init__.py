"""Line searches and what noise does to them, on Python numbers only.

One file per algorithm, each an ask-and-tell object of line_search.py's protocol that evaluates
nothing itself; noise.py learns how exact losses are, and one_function.py tells whether two calls
of the closure are of one function. May touch nothing but fuse_ext.checks and numbers.
"""

from fuse_ext.search.approximate_wolfe import ApproximateWolfe
from fuse_ext.search.armijo import Armijo
from fuse_ext.search.line_search import STEP_MAX, STEP_MIN, LineSearch, LineSearchOptions
from fuse_ext.search.wolfe import StrongWolfe

_SEARCHES: dict[str, type[LineSearch]] = {
    search.name: search for search in (Armijo, StrongWolfe, ApproximateWolfe)
}


def make_line_search(
    name: str | None,
    *,
    c1: float = 1e-4,
    c2: float = 0.9,
    max_evaluations: int = 25,
    step_min: float = STEP_MIN,
    step_max: float = STEP_MAX,
    xtol: float = 1e-8,
    loss_eps: float | None = None,
) -> LineSearch | None:
    """Make the line search called ``name``.

    Args:
        name: "armijo", "strong_wolfe" or "approximate_wolfe"; None or "fixed" for no search.
        c1: This and the others: see :class:`LineSearchOptions`. They are checked for every name.
        c2: Curvature.
        max_evaluations: Trials per search.
        step_min: Smallest trial step.
        step_max: Largest trial step.
        xtol: Least relative width of the bracket.
        loss_eps: Noise in the loss.

    Returns:
        The search, or None for a fixed step.

    Raises:
        ValueError: The name is unknown, or an option is out of its range.
    """
    options = LineSearchOptions(c1, c2, max_evaluations, step_min, step_max, xtol, loss_eps)
    if name is None or name == "fixed":
        return None
    if name not in _SEARCHES:
        known = ", ".join(repr(known) for known in ("fixed", *_SEARCHES))
        raise ValueError(f"line_search must be None or one of {known}, got {name!r}")
    return _SEARCHES[name](options)
