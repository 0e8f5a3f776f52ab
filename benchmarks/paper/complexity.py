"""Table I: gradient evaluations until the gradient's norm is epsilon."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.harness.cells import Cell
from benchmarks.harness.tables import number, table
from benchmarks.paper import complexity_runs as runs
from benchmarks.paper.complexity_pictures import draw
from benchmarks.paper.laws import POWER, fits
from benchmarks.paper.page import NO, PARTLY, YES, Report
from benchmarks.paper.statistics import listed, short

SECTIONS = {"table1": "Table I: complexity"}
CLAIM = (
    "Not convex: O(1/ε²) for SGD, Adam, L-BFGS and FUSE. Strongly convex: O(log 1/ε) for L-BFGS, "
    "O(max(1/ζ, log 1/ε)) for FUSE, with a constant step into a neighbourhood only; without "
    "stochasticity O(max(log 1/ζ, log log 1/ε)) (Remark 1)."
)
SIZE = {True: 200, False: 600}  # images
BUDGET = {True: 300, False: 10_000}  # evaluations on all images
BATCH_BUDGET = {True: 200, False: 8_000}  # on batches
SEEDS = {True: 1, False: 5}
TUNING_SEED = 1000
ADAM_GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # also of L-BFGS's fixed step
SGD_GRID = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)
FULL = ("SGD", "Adam", "L-BFGS", "FUSE")
WHOLE = "FUSE, then all images"
# Title of each setting, and its methods.
SETTINGS = {
    "convex": ("strongly convex, all images", FULL),
    "non-convex": ("not convex, all images", FULL),
    "constant": ("strongly convex, batches, constant steps", (*FULL, WHOLE)),
    "shrinking": ("strongly convex, batches, shrinking steps", FULL),
}
VERDICTS = {True: "Holds", False: "**Does not hold**", None: "**Not shown**"}
WITHOUT_RATE = ("L-BFGS",)  # with a line search


# --- cells ----------------------------------------------------------------------------------


def cells(name: str, quick: bool, data: str | None, done: dict[str, Any]) -> list[Cell]:
    """Tuning, then the runs that are reported."""
    found = []
    for setting, (_, methods) in SETTINGS.items():
        for method in methods:
            options = _options(setting, quick)
            grid = _grid(setting, method, done)
            if grid is not None and len(grid) > 1:
                grid = grid[::3] if quick else grid
                found.append(
                    _cell("tune", setting, method, grid=grid, seeds=[TUNING_SEED], **options)
                )
            lrs = chosen(setting, method, done)
            if lrs is not None:
                seeds = list(range(SEEDS[quick]))
                found.append(_cell("run", setting, method, lrs=lrs, seeds=seeds, **options))
    return found


def _key(setting: str, method: str, of: str) -> str:
    return f"complexity/{setting}/{method.replace(', ', '-').replace(' ', '-')}-{of}"


def _cell(of: str, setting: str, method: str, **options: Any) -> Cell:
    options["method"] = method
    return Cell(_key(setting, method, of), f"{runs.__name__}:{of}", options)


def _options(setting: str, quick: bool) -> dict[str, Any]:
    if setting in runs.WIDTHS:
        options = {"sees": "all", "kind": setting, "budget": BUDGET[quick]}
    else:
        options = {"sees": "batches", "kind": "convex", "budget": BATCH_BUDGET[quick]}
        options["shrink"] = setting == "shrinking"
    return {**options, "size": SIZE[quick]}


def _grid(setting: str, method: str, done: dict[str, Any]) -> list[list[float]] | None:
    """The learning rates to try; None where they depend on cells that have not run."""
    full = setting in runs.WIDTHS
    if method in WITHOUT_RATE and full:
        return [[]]
    if method == "FUSE" and not full:  # takes over Adam's, and has as many for L-BFGS's step
        adam = chosen(setting, "Adam", done)
        return None if adam is None else [[*adam, lr] for lr in ADAM_GRID]
    return [[lr] for lr in (SGD_GRID if method == "SGD" else ADAM_GRID)]


def chosen(setting: str, method: str, done: dict[str, Any]) -> list[float] | None:
    """The learning rates that reach the least epsilon on the tuning start, and first."""
    if setting in runs.WIDTHS and method in WITHOUT_RATE:
        return []
    tried = done.get(_key(setting, method, "tune"))
    if tried is None:
        return None

    def rank(entry: dict[str, Any]) -> tuple[float, float, float]:
        (run,) = entry["runs"]
        hits = [n for n in run["reached"] if n is not None]
        return -len(hits), hits[-1] if hits else 0, run["least"]

    lrs: list[float] = min(tried, key=rank)["lrs"]
    return lrs


# --- report ---------------------------------------------------------------------------------


def report(name: str, results: dict[str, Any], quick: bool) -> Report:
    """The section: tables, sentences, pictures."""
    found = {
        setting: {method: summary(setting, method, results) for method in methods}
        for setting, (_, methods) in SETTINGS.items()
    }
    hoods = neighbourhoods(results)
    checks = judge(found, hoods)
    verdicts = [entry["holds"] for entry in checks]
    outcome = YES if all(verdicts) else PARTLY if any(verdicts) else NO
    sentence = f"{verdicts.count(True)} of {len(checks)} statements hold"
    for verdict, words in ((False, "what does not"), (None, "not shown")):
        if of := [entry["statement"] for entry in checks if entry["holds"] is verdict]:
            sentence += f"; {words}: {'; '.join(of)}"
    sentence += "."
    counts = {name: found["convex"][name]["reached"][-1] for name in FULL}
    sentence += (
        f" Evaluations to {runs.EPSILONS[-1]:.0e}, strongly convex, all images: "
        + ", ".join(
            f"{name} {'not reached' if count is None else f'{count:g}'}"
            for name, count in counts.items()
        )
    )
    sentence += "."
    listing = "\n".join(
        f"- {VERDICTS[entry['holds']]}: {entry['statement']}. {entry['measured']}"
        for entry in checks
    )
    text = "\n\n".join(
        [
            listing,
            conditions(quick),
            *(
                f"**{title[0].upper()}{title[1:]}**\n\n{as_table(found[setting])}"
                for setting, (title, _) in SETTINGS.items()
            ),
        ]
    )
    data = {
        "epsilons": list(runs.EPSILONS),
        "size": SIZE[quick],
        "budget": {"all images": BUDGET[quick], "batches": BATCH_BUDGET[quick]},
        "seeds": SEEDS[quick],
        "statements": checks,
        "settings": found,
        "neighbourhoods": hoods,
        "tuning": {
            f"{setting}, {method}": results[key]
            for setting, (_, methods) in SETTINGS.items()
            for method in methods
            if (key := _key(setting, method, "tune")) in results
        },
    }
    titles = {setting: title for setting, (title, _) in SETTINGS.items()}
    figure = draw(found, hoods, titles)
    return Report(CLAIM, outcome, sentence, text, short(data, 4), {"": figure})


def summary(setting: str, method: str, results: dict[str, Any]) -> dict[str, Any]:
    """Medians over the seeds, and what law they follow."""
    found = results[_key(setting, method, "run")]
    medians = []
    for counts in zip(*(run["reached"] for run in found), strict=True):
        middle = statistics.median_high([math.inf if n is None else n for n in counts])
        medians.append(None if math.isinf(middle) else middle)
    return {
        "lrs": chosen(setting, method, results),
        "reached": medians,
        "fits": fits(runs.EPSILONS, medians),
        "after": fits(runs.EPSILONS, after_switch(found)),
        "level": statistics.median(run["level"] for run in found),
        "evaluations": [run["evaluations"] for run in found],
        "switch": [run["switch"] for run in found],
        "first run": {name: found[0][name] for name in ("at", "norms")},
    }


def after_switch(found: list[dict[str, Any]]) -> list[int | None]:
    """Medians of the evaluations since each run's own switch (its start where it has none).

    None where not more than half of the runs reach an ε after it.
    """
    medians: list[int | None] = []
    for counts in zip(*(run["reached"] for run in found), strict=True):
        switches = [run["switch"] or 0 for run in found]
        since = [n - at for n, at in zip(counts, switches, strict=True) if n is not None and n > at]
        medians.append(statistics.median_high(since) if 2 * len(since) > len(found) else None)
    return medians


def neighbourhoods(results: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Step and the level where a run on batches with it ends, on the tuning start."""
    return {
        method: [
            [entry["lrs"][-1], entry["runs"][0]["level"]]
            for entry in results[_key("constant", method, "tune")]
        ]
        for method in FULL
    }


def judge(
    found: dict[str, dict[str, Any]], hoods: dict[str, list[list[float]]]
) -> list[dict[str, Any]]:
    """The statements of Table I and of Remark 1, each with what was measured."""
    return [
        _bounded(found["non-convex"]),
        _logarithmic(found["convex"]),
        _fewer(found),
        _double_logarithmic(found["convex"]["FUSE"]["after"]["misfit"]),
        _neighbourhood(found, hoods),
    ]


def _bounded(methods: dict[str, Any]) -> dict[str, Any]:
    exponents = {name: entry["fits"]["exponent"] for name, entry in methods.items()}
    measured = {name: p for name, p in exponents.items() if p is not None}
    phrases = [f"{number(p, 2)} ({name})" for name, p in measured.items()]
    return {
        "statement": "not convex: evaluations grow no faster than 1/ε²",
        "holds": max(measured.values()) <= 2 if len(measured) == len(exponents) else None,
        "measured": f"They grow as 1/ε to the power {listed(phrases)}."
        if phrases
        else "Too few points.",
        "exponents": exponents,
    }


def _logarithmic(methods: dict[str, Any]) -> dict[str, Any]:
    phrases, holds = [], True
    for name in ("L-BFGS", "FUSE"):
        misfit = methods[name]["after"]["misfit"]
        if not misfit:
            return {
                "statement": "strongly convex: L-BFGS and FUSE need O(log 1/ε)",
                "holds": None,
                "measured": f"Too few points for {name}.",
            }
        holds &= misfit["log 1/ε"] < min(misfit["1/ε²"], misfit[POWER])
        shares = [f"{100 * misfit[law]:.0f}%" for law in ("log 1/ε", "1/ε²", POWER)]
        phrases.append(
            f"{name}: c + a log 1/ε misses by {shares[0]}, c + a/ε² by {shares[1]}, "
            f"a power of its own by {shares[2]}"
        )
    return {
        "statement": "strongly convex: L-BFGS and FUSE need O(log 1/ε)",
        "holds": holds,
        "measured": f"{'; '.join(phrases)} (root mean square; of FUSE after the switch).",
    }


def _fewer(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    phrases, holds = [], True
    for setting in runs.WIDTHS:
        ours = found[setting]["FUSE"]["reached"]
        for rival in ("SGD", "Adam", "L-BFGS"):
            theirs = found[setting][rival]["reached"]
            both = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a and b]
            if not both:
                holds = False
                continue
            i = both[-1]
            holds &= rival == "L-BFGS" or ours[i] < theirs[i]
            phrases.append(
                f"{ours[i]} against {theirs[i]} of {rival} to {runs.EPSILONS[i]:.0e} ({setting})"
            )
    return {
        "statement": "FUSE needs fewer evaluations than SGD and Adam to the least ε both reach",
        "holds": holds,
        "measured": f"{listed(phrases)}." if phrases else "No ε was reached by both.",
    }


def _double_logarithmic(misfit: dict[str, float]) -> dict[str, Any]:
    statement = "without stochasticity FUSE is as fast as log log 1/ε (Remark 1)"
    if not misfit:
        return {"statement": statement, "holds": None, "measured": "Too few points."}
    double, single = misfit["log log 1/ε"], misfit["log 1/ε"]
    return {
        "statement": statement,
        "holds": double < single,
        "measured": f"After the switch c + a log log 1/ε misses by {100 * double:.1f}%, "
        f"c + a log 1/ε by {100 * single:.1f}%.",
    }


def _neighbourhood(
    found: dict[str, dict[str, Any]], hoods: dict[str, list[list[float]]]
) -> dict[str, Any]:
    constant, shrinking = found["constant"], found["shrinking"]
    levels = [f"{number(constant[name]['level'], 2)} ({name})" for name in FULL]
    shrunk = [f"{number(shrinking[name]['level'], 2)} ({name})" for name in FULL]
    least = {name: min(level for _, level in hoods[name]) for name in FULL}
    steps = [f"{number(level, 2)} ({name})" for name, level in least.items()]
    powers = {name: _growth(hoods[name]) for name in FULL}
    growth = [f"{number(p, 2)} ({name})" for name, p in powers.items() if p is not None]
    whole = constant[WHOLE]["reached"][-1]
    reached = "does not get" if whole is None else f"gets after {whole} evaluations"
    stays = all(constant[name]["reached"][-1] is None for name in FULL)
    return {
        "statement": "batches, constant steps: only a neighbourhood is reached",
        "holds": stays and min(least.values()) > 100 * runs.EPSILONS[-1],
        "measured": f"In the last tenth of the evaluations the whole gradient's norm is "
        f"{listed(levels)}, and with no step of the grid below {listed(steps)}; above the best "
        f"step it grows as the step to the power {listed(growth) if growth else '?'}; with "
        f"shrinking steps it is {listed(shrunk)}. FUSE with all images in the L-BFGS "
        f"phase {reached} to {runs.EPSILONS[-1]:.0e}.",
        "growth with the step": powers,
    }


def _growth(points: list[list[float]]) -> float | None:
    """Slope of the level against the step in log-log, from the least level on."""
    lowest = min(range(len(points)), key=lambda i: points[i][1])
    rest = [(math.log(step), math.log(level)) for step, level in points[lowest:]]
    return statistics.linear_regression(*zip(*rest, strict=True)).slope if len(rest) > 1 else None


def conditions(quick: bool) -> str:
    """How it was measured."""
    count = SIZE[quick]
    seeds = SEEDS[quick]
    rates = len(ADAM_GRID[::3]) if quick else len(ADAM_GRID)
    return (
        f"The first {count} of scikit-learn's digits, float64, penalty {runs.DECAY:g}/2 |x|². "
        f"Strongly convex: softmax regression (650 variables); not convex: a 64-16-10 tanh "
        f"network (1,210). Medians over {seeds} starts of the gradient evaluations until the norm "
        f"of the whole gradient is at most ε, at most {BUDGET[quick]} on all images and "
        f"{BATCH_BUDGET[quick]} on batches of {runs.BATCH}. On all images every evaluation of a "
        "line search counts and is looked at; L-BFGS and FUSE are `FusePV(deterministic=True, "
        "self_scaling=False)`, all else by default. On batches L-BFGS takes fixed steps (two "
        "evaluations each, both on one batch), the whole gradient is looked at every "
        f"{runs.LOOK} steps, uncounted, and an evaluation on all images counts "
        f"{count / runs.BATCH:g}; step k of the shrinking ones is "
        "1 / (1 + 20 k / budget) times as long. Every method has the best of "
        f"{rates} learning rates on another start (most ε reached, then soonest; FUSE on batches "
        "takes over Adam's and has as many for L-BFGS's step); L-BFGS with a line search has none. "
        "Laws have two free numbers each and are fitted by least squares of the relative error to "
        "quarter decades of ε. The paper counts until the mean square of the norm is ε; in that "
        "measure all exponents are half as large."
    )


def as_table(methods: dict[str, Any]) -> str:
    """A row a method: evaluations to each decade, and the laws."""
    decades = range(1, 9)
    heads = [
        "",
        "lr",
        *(f"1e-{k}" for k in decades),
        "power",
        "best law",
        "switch",
        "norm, last tenth",
    ]
    rows = []
    for name, entry in methods.items():
        counts = [entry["reached"][4 * (k - 1)] for k in decades]
        found = entry["fits"]
        best = found["best"]
        law = "" if best is None else f"{best} ({100 * found['misfit'][best]:.0f}%)"
        switches = [step for step in entry["switch"] if step is not None]
        rows.append(
            [
                name,
                ", ".join(f"{lr:g}" for lr in entry["lrs"]),
                *("" if count is None else f"{count:g}" for count in counts),
                "" if found["exponent"] is None else number(found["exponent"], 2),
                law,
                f"{statistics.median(switches):g}" if switches else "",
                f"{entry['level']:.0e}",
            ]
        )
    return table(heads, rows)
