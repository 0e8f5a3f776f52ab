"""Fig. 1-4: Rosenbrock, Rastrigin, Ackley and Himmelblau in two dimensions."""

from __future__ import annotations

import statistics
from itertools import product
from typing import Any

from benchmarks.harness.cells import Cell
from benchmarks.harness.tables import number, table
from benchmarks.paper import landscape_runs as runs
from benchmarks.paper.landscape_pictures import draw
from benchmarks.paper.page import NO, PARTLY, YES, Report
from benchmarks.paper.statistics import interval, listed, short, sign_test, split, verdict

FUNCTIONS = {"fig1": "Rosenbrock", "fig2": "Rastrigin", "fig3": "Ackley", "fig4": "Himmelblau"}
SECTIONS = {
    name: f"Fig. {name[-1]}: 2-D {function} function" for name, function in FUNCTIONS.items()
}
STUCK = ("fig2", "fig4")  # where the paper sees first-order methods in poor local minima
STARTS = {True: 6, False: 100}
TUNING_STARTS = {True: 4, False: 30}
BUDGET = {True: 250, False: 2000}  # gradient evaluations, for every run
SGD_GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
ADAM_GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
PRINTED = {"SGD": [0.01], "Adam": [0.001], "Adam+SGD": [0.001, 0.01], "FUSE": [0.001]}
RIVALS = ("SGD", "Adam", "Adam+SGD")
OURS = "FUSE"
ALONE = "L-BFGS"  # not in the paper; it has no learning rate
KINDS = ("printed", "tuned")
# By the sign of FUSE's advantage in the last loss, and in evaluations where losses are the same.
WORDS = {
    (1, 1): "ahead of",
    (1, 0): "ahead of",
    (0, 1): "ahead of",
    (1, -1): "lower but later than",
    (0, 0): "level with",
    (-1, 1): "sooner but higher than",
    (0, -1): "behind",
    (-1, 0): "behind",
    (-1, -1): "behind",
}
AHEAD = "ahead of"


# --- cells ----------------------------------------------------------------------------------


def cells(name: str, quick: bool, data: str | None, done: dict[str, Any]) -> list[Cell]:
    """Tuning, then the runs that are reported."""
    function = FUNCTIONS[name]

    def cell(of: str, method: str, kind: str, count: int, **options: Any) -> Cell:
        options |= {"function": function, "method": method, "count": count, "budget": BUDGET[quick]}
        return Cell(_key(function, method, kind), f"{runs.__name__}:{of}", options)

    def tune(method: str, *grids: tuple[float, ...]) -> Cell:
        rates = [grid[::3] if quick else grid for grid in grids]
        grid = [list(pair) for pair in product(*rates)]
        return cell("tune", method, "tuning", TUNING_STARTS[quick], grid=grid)

    def run(method: str, kind: str, lrs: list[float]) -> Cell:
        return cell("run", method, kind, STARTS[quick], lrs=lrs)

    found = [tune("SGD", SGD_GRID), tune("Adam+SGD", ADAM_GRID, SGD_GRID)]
    found += [tune(method, ADAM_GRID) for method in ("Adam", OURS)]
    found += [run(method, "printed", lrs) for method, lrs in PRINTED.items()]
    found.append(run(ALONE, "printed", []))
    for method in PRINTED:
        tried = done.get(_key(function, method, "tuning"))
        if tried is not None:
            found.append(run(method, "tuned", best(tried)))
    return found


def best(tried: list[dict[str, Any]]) -> list[float]:
    """Most starts in a global minimum; of equals the least median loss, then the soonest."""

    def rank(entry: dict[str, Any]) -> tuple[float, float, float]:
        return -entry["near"], round(entry["losses"] / runs.SAME), entry["settled"]

    lrs: list[float] = min(tried, key=rank)["lrs"]
    return lrs


def _key(function: str, method: str, kind: str) -> str:
    return f"landscapes/{function}/{method.replace('+', '-then-')}-{kind}"


# --- report ---------------------------------------------------------------------------------


def report(name: str, results: dict[str, Any], quick: bool) -> Report:
    """The section: table, sentences, picture."""
    function = FUNCTIONS[name]
    found = {
        (method, kind): results[_key(function, method, kind)]
        for kind in KINDS
        for method in PRINTED
    }
    alone = results[_key(function, ALONE, "printed")]
    lrs = dict.fromkeys(found)
    for method, kind in found:
        tried = results[_key(function, method, "tuning")]
        lrs[method, kind] = PRINTED[method] if kind == "printed" else best(tried)
    comparisons = [
        {"kind": kind, "rival": rival, **compare(found[OURS, kind], found[rival, kind])}
        for kind in KINDS
        for rival in RIVALS
    ]
    against_alone = compare(found[OURS, "tuned"], alone)
    superlinear = speed(found)
    stuck = [globally(found, kind) for kind in KINDS]
    data = {
        "function": function,
        "budget": BUDGET[quick],
        "starts": STARTS[quick],
        "tuning": {
            "starts": TUNING_STARTS[quick],
            **{method: results[_key(function, method, "tuning")] for method in PRINTED},
        },
        "lrs": {f"{method}, {kind}": lrs[method, kind] for method, kind in found},
        "comparisons": comparisons,
        "against L-BFGS": against_alone,
        "global minimum": stuck,
        "superlinear": superlinear,
        "runs": {
            **{f"{method}, {kind}": result for (method, kind), result in found.items()},
            ALONE: alone,
        },
    }
    outcome, sentence = judge(name, comparisons, stuck, superlinear)
    sides = [(found[OURS, "tuned"], "FUSE (tuned)"), (alone, f"{ALONE} without Adam")]
    settled = [
        f"{label} settles after {statistics.median(result['settled']):g} evaluations, "
        f"{sum(result['near'])} in a global minimum"
        for result, label in sides
    ]
    sentence += f" In the median {'; '.join(settled)}."
    text = "\n\n".join(
        [
            conditions(quick, superlinear["smooth"]),
            as_table(found, alone, lrs, comparisons),
            more(function, found, alone, against_alone, results),
        ]
    )
    claims = "FUSE is superior to SGD, Adam and Adam+SGD, and converges superlinearly"
    if name in STUCK:
        claims += "; first-order methods get stuck in poor local minima or make no progress"
    figure = draw(function, found, alone, lrs, STARTS[quick])
    return Report(f"{claims}.", outcome, sentence, text, short(data), {"": figure})


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Last losses, start by start; where they are the same, evaluations until they were that."""
    losses = split(ours["losses"], theirs["losses"], runs.SAME)
    equal = [
        (a, b)
        for a, b, x, y in zip(
            ours["settled"], theirs["settled"], ours["losses"], theirs["losses"], strict=True
        )
        if abs(x - y) <= runs.SAME
    ]
    sooner = split([a for a, _ in equal], [b for _, b in equal], 0.0)
    return {
        "loss": losses,
        "evaluations where the same": sooner,
        "medians where the same": [statistics.median(side) for side in zip(*equal, strict=True)],
        "FUSE is": WORDS[verdict(losses), verdict(sooner)],
    }


def globally(found: dict[Any, dict[str, Any]], kind: str) -> dict[str, Any]:
    """Starts from which FUSE and the best first-order method end in a global minimum."""
    rival = max(RIVALS, key=lambda method: sum(found[method, kind]["near"]))
    ours, theirs = found[OURS, kind]["near"], found[rival, kind]["near"]
    only_ours = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    p = sign_test(only_ours, only_theirs)
    word = "as often, but for chance,"
    if p < 0.05:
        word = "more often" if only_ours > only_theirs else "less often"
    return {
        "kind": kind,
        "rival": rival,
        "ours": sum(ours),
        "theirs": sum(theirs),
        "only ours": only_ours,
        "only theirs": only_theirs,
        "p": p,
        "word": word,
    }


def speed(found: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """Median ratios of successive errors after FUSE's switch, far from the minimum and near it.

    Far is the largest error below 0.1 whose decade has enough pairs, near the smallest.
    """
    kind = max(KINDS, key=lambda kind: len(found[OURS, kind]["ratios"]))
    decades = [entry for entry in found[OURS, kind]["ratios"] if entry["decade"] <= -2]
    measured = len(decades) >= 2
    far, near = (decades[-1], decades[0]) if measured else (None, None)
    holds = measured and near["median"] < 0.1 and near["median"] < far["median"] / 3
    smooth = found[OURS, kind]["smooth"]
    return {"lr": kind, "smooth": smooth, "far": far, "near": near, "holds": holds}


def judge(
    name: str,
    comparisons: list[dict[str, Any]],
    stuck: list[dict[str, Any]],
    superlinear: dict[str, Any],
) -> tuple[str, str]:
    """The verdict, and why."""
    parts, checks = [], []
    for kind in KINDS:
        of_kind = [entry for entry in comparisons if entry["kind"] == kind]
        checks.append(all(entry["FUSE is"] == AHEAD for entry in of_kind))
        phrases = []
        for word in dict.fromkeys(WORDS.values()):
            rivals = [entry["rival"] for entry in of_kind if entry["FUSE is"] == word]
            if rivals:
                phrases.append(f"{word} {listed(rivals)}")
        parts.append(f"{listed(phrases)} at {kind} learning rates")
    text = f"FUSE is {'; '.join(parts)}."
    if name in STUCK:
        checks.append(all(entry["word"] == "more often" for entry in stuck))
    phrases = [
        f"{entry['ours']} against {entry['theirs']} ({entry['kind']}; {entry['rival']})"
        for entry in stuck
    ]
    text += f" Starts that end in a global minimum, FUSE against the best rival: {listed(phrases)}."
    checks.append(superlinear["holds"])
    near, far = superlinear["near"], superlinear["far"]
    if near is None:
        text += " Too few iterations to measure the rate."
    else:
        word = "Superlinear" if superlinear["holds"] else "Not superlinear"
        text += (
            f" {word} after the switch: an iteration leaves {number(far['median'], 2)} of an error "
            f"of 1e{far['decade']} to 1e{far['decade'] + 1}, {number(near['median'], 2)} of one of "
            f"1e{near['decade']} to 1e{near['decade'] + 1} (medians)."
        )
    return YES if all(checks) else PARTLY if any(checks) else NO, text


def conditions(quick: bool, smooth: int) -> str:
    """What the table's columns mean."""
    return (
        f"{STARTS[quick]} starts drawn once from the window of the picture, "
        f"{BUDGET[quick]} gradient evaluations for every method (a line search's count), float64. "
        f"FUSE is `FusePV(params, lr, deterministic=True)`, all else by default; Adam+SGD leaves "
        f"Adam after {runs.SWITCH} steps, as FUSE does. SGD, Adam and FUSE are tuned on a grid of "
        f"{len(SGD_GRID[::3]) if quick else len(SGD_GRID)} learning rates each (Adam+SGD on all "
        f"pairs), on {TUNING_STARTS[quick]} other starts, for the "
        "most that end in a global minimum, then the least median loss. A run is in a global "
        f"minimum if it ends within {runs.NEAR:g} of one, in brackets Wilson's 95% interval; it "
        f"has settled when its loss stays within {runs.SAME:g} of its last. The last two columns "
        f"compare FUSE with that method at the same kind of learning rate, start by start: last "
        f"losses (the same: within {runs.SAME:g}), and where they are the same, median evaluations "
        "until settled. Ahead means lower or sooner, and neither higher nor later, in more "
        "starts than chance allows (sign tests, p < 0.05)."
    )


def as_table(
    found: dict[Any, dict[str, Any]],
    alone: dict[str, Any],
    lrs: dict[Any, Any],
    comparisons: list[dict[str, Any]],
) -> str:
    """A row a method."""
    beside = {(entry["rival"], entry["kind"]): entry for entry in comparisons}
    rows = []
    for (method, kind), result in [*found.items(), ((ALONE, ""), alone)]:
        count = len(result["near"])
        hits = sum(result["near"])
        low, high = interval(hits, count)
        entry = beside.get((method, kind))
        losses = entry["loss"] if entry else {}
        medians = entry["medians where the same"] if entry else []
        rows.append(
            [
                f"{method}, {kind}" if kind else method,
                ", ".join(f"{lr:g}" for lr in lrs.get((method, kind), [])),
                f"{hits} ({100 * low:.0f}-{100 * high:.0f}%)",
                str(sum(result["exact"])),
                loss(statistics.median(result["losses"])),
                str(result["diverged"]),
                f"{statistics.median(result['settled']):g}",
                f"{losses['lower']} / {losses['same']} / {losses['higher']}" if entry else "",
                " / ".join(f"{value:g}" for value in medians),
            ]
        )
    heads = ["", "lr", "in a global minimum", f"within {runs.EXACT:g}", "median loss", "diverged"]
    heads += ["settled after", "FUSE lower / same / higher", "settled, FUSE / this"]
    return table(heads, rows)


def loss(value: float) -> str:
    """A loss, or that there is none."""
    return "diverged" if value >= runs.LARGEST else "0" if value == 0 else f"{value:.1e}"


def more(
    function: str,
    found: dict[Any, dict[str, Any]],
    alone: dict[str, Any],
    against_alone: dict[str, Any],
    results: dict[str, Any],
) -> str:
    """What a reader should know besides."""
    lines = []
    words = {kind: statistics.median(found[OURS, kind]["evaluations"]) for kind in KINDS}
    budget = max(found["SGD", "printed"]["evaluations"])
    lines.append(
        f"FUSE stops by itself: it used {words['printed']:g} (printed) and {words['tuned']:g} "
        f"(tuned) of the {budget} evaluations in the median, the first-order methods all."
    )
    losses, both = against_alone["loss"], against_alone["medians where the same"]
    text = (
        "Beside L-BFGS from the very start, which the paper leaves out, FUSE (tuned) is "
        f"{against_alone['FUSE is']} it: its last loss is lower from {losses['lower']} starts, the "
        f"same from {losses['same']} and higher from {losses['higher']}"
    )
    if both:
        text += f"; there FUSE settles after {both[0]:g} evaluations and L-BFGS after {both[1]:g}"
    lines.append(f"{text}.")
    edges = []
    for method in PRINTED:
        tried = results[_key(function, method, "tuning")]
        for chosen, grid in zip(
            best(tried), zip(*(entry["lrs"] for entry in tried), strict=True), strict=True
        ):
            if chosen in (min(grid), max(grid)):
                edges.append(f"{method} ({chosen:g})")
    if edges:
        lines.append(f"The best learning rate is at the edge of its grid for {listed(edges)}.")
    fallbacks = [found[OURS, kind]["fallbacks"] for kind in KINDS]
    smooth = found[OURS, "printed"]["smooth"]
    lines.append(
        f"The rate is measured on the {smooth} runs (printed) that end in a smooth minimum x\\*, "
        f"as e = |x - x\\*| / max(1, |x\\*|), down to {runs.FLOOR:g}. FUSE went back to Adam "
        f"{sum(fallbacks)} times."
    )
    return "\n".join(f"- {line}" for line in lines)
