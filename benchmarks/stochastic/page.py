"""Tables of the tournament: an entry a row, a task a column."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.tables import number, table
from benchmarks.stochastic.methods import CONTROL, METHODS, TITLES, Entry
from benchmarks.stochastic.tasks import Spec
from benchmarks.stochastic.tournament import Standing, Tournament

Played = list[tuple[Spec, dict[Entry, Standing]]]


def how(seeds: set[int]) -> str:
    """The terms, in words; ``seeds``: how many the tournaments compare."""
    listed = ", ".join(f"{name}={found!r}" for name, found in CONTROL.items())
    return (
        "Each method runs with each schedule. Its learning rate is the best of a grid in steps of "
        "about 3 times that grows until the best is inside it, on a tenth of the training set "
        f"held out and other seeds; {_numbers(seeds)} seeds are compared. All take the same "
        "batches from the same start, with the same betas (SOAP has its own) and the same "
        "decoupled weight decay. At equal gradients and equal CPU time a rival has as many steps "
        "as FusePV's cost allows, and its schedule over those. FusePV in Adam's metric is "
        f"`FusePV({listed})`. FusePV and Schedule-Free are judged by the means of weights that "
        "their `eval` puts in place. A win is a mean that is better by more than one standard "
        "deviation, the larger one of the two."
    )


def _numbers(found: set[int]) -> str:
    return " or ".join(str(value) for value in sorted(found))


def edges(played: Played) -> str:
    """Whether a best learning rate lies at the edge of what was tried."""
    found = [
        f"{entry.title} on {spec.title} ({standing.search.best:g})"
        for spec, standings in played
        for entry, standing in standings.items()
        if standing.search.at_edge
    ]
    if not found:
        return "No best learning rate is at the edge of what was tried."
    return f"Best learning rates at the edge of what was tried: {'; '.join(found)}."


def conditions(tournaments: Sequence[Tournament]) -> str:
    """Data and budgets: a line a task."""
    lines = []
    for of in tournaments:
        about = of.about
        if about is not None:
            size = f"{about['parameters']:,} parameters, {about['steps']:,} steps"
            batch = of.spec.options["batch"]
            lines.append(f"- {of.spec.title}: {size} of {batch}; {about['data']}.")
    return "\n".join(lines)


def results(played: Played) -> str:
    """What every entry came to at equal steps, with its learning rate."""
    entries = dict.fromkeys(entry for _, standings in played for entry in standings)
    ordered = sorted(entries, key=lambda entry: [*METHODS].index(entry.method))
    rows = []
    for i, entry in enumerate(ordered):
        new = i == 0 or ordered[i - 1].method != entry.method
        row = [METHODS[entry.method].title if new else "", TITLES[entry.schedule]]
        for _, standings in played:
            row.append(_shown(standings[entry]) if entry in standings else "")
        rows.append(row)
    heads = [
        f"{spec.title}, {'nats' if spec.measure == 'loss' else '%'} (rate)" for spec, _ in played
    ]
    return table(["", "schedule", *heads], rows)


def _shown(standing: Standing) -> str:
    found = standing.sample()
    text = found.negated.show() if standing.measure == "loss" else found.percent()
    return f"{text} ({standing.search.best:g})"


def costs(played: Played) -> str:
    """Milliseconds a step, and gradients; steps at equal CPU time where there are others."""
    rows = []
    names = dict.fromkeys(entry.method for _, standings in played for entry in standings)
    for name in sorted(names, key=[*METHODS].index):
        row = [METHODS[name].title]
        for _, standings in played:
            of = [standing for entry, standing in standings.items() if entry.method == name]
            row.append(_cost(of[0]) if of else "")
        rows.append(row)
    heads = [spec.title for spec, _ in played]
    return table(["ms and gradients a step; steps in FusePV's time", *heads], rows)


def _cost(standing: Standing) -> str:
    steps = standing.runs[0]["steps"]
    seconds = 1000 * standing.spent("cpu_seconds") / steps
    text = f"{number(seconds, 3)}, {number(standing.spent('gradients') / steps, 3)}"
    longer = standing.at_cost.get("cpu_seconds")
    return f"{text}; {longer[0]['steps']:,}" if longer else text
