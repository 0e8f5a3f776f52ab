"""FusePV on minibatches of images beside SGD, Adam, Adam+SGD and torch's L-BFGS after Adam.

Test accuracy at equal epochs, gradient evaluations and CPU time, with printed and tuned rates.
"""

from __future__ import annotations

from collections import Counter

from benchmarks.harness.cells import Cell
from benchmarks.harness.comparison import (
    BASES,
    METHODS,
    RATES,
    Outcome,
    Plan,
    Results,
    cells_of,
    methods,
)
from benchmarks.harness.tables import number, table


def cells(problems: tuple[str, ...], plan: Plan, done: Results) -> list[Cell]:
    """The runs, as far as they are known."""
    known: dict[str, Cell] = {}
    for problem in problems:
        for kind in RATES:
            known |= {cell.key: cell for cell in cells_of(problem, kind, plan, done)}
    return list(known.values())


def collect(problems: tuple[str, ...], plan: Plan, results: Results) -> list[Outcome]:
    """The outcomes of the problems that have all their runs."""
    there = [p for p in problems if all(c.key in results for c in cells((p,), plan, results))]
    return [Outcome.of(problem, kind, plan, results) for kind in RATES for problem in there]


def outcome_text(outcomes: list[Outcome]) -> str:
    """Test accuracies of one kind of learning rates."""
    rows = []
    for outcome in outcomes:
        for i, method in enumerate(methods(outcome.kind)):
            ours = method == "fuse_pv"
            row = [
                outcome.about["title"] if i == 0 else "",
                METHODS[method],
                _rate(outcome, method),
            ]
            for basis in BASES:
                text = outcome.accuracies(method, basis).percent()
                if ours:
                    text = f"**{text}**" if basis == "epochs" else ""
                row.append(text if ours else f"{text}, {outcome.verdict(method, basis)}")
            for quantity in ("evaluations", "cpu_seconds"):
                row.append(number(outcome.at_end(method, quantity).mean, 3))
            row.append(number(outcome.at_end(method, "train_loss").mean, 4))
            rows.append(row)
    headers = ["problem", "optimizer", "lr", *BASES.values(), "evaluations", "CPU s", "train loss"]
    return table(headers, rows)


def _rate(outcome: Outcome, method: str) -> str:
    rates = outcome.rates
    if method in ("sgd", "adam", "adam_cosine", "adam_averaged", "fuse_pv"):
        return f"{rates[method]:g}"
    second = f"{rates['adam_sgd']:g}" if method == "adam_sgd" else "1"
    return f"{rates['adam']:g}, {second}"


def count_text(outcomes: list[Outcome]) -> str:
    """How often FusePV wins, draws and loses, by baseline."""
    rows = []
    for method in [name for name in outcomes[0].runs if name != "fuse_pv"]:
        row = [METHODS[method]]
        for basis in BASES:
            found = Counter(outcome.verdict(method, basis) for outcome in outcomes)
            row.append(" / ".join(str(found[name]) for name in ("win", "draw", "loss")))
        rows.append(row)
    return table(["won / drawn / lost against", *BASES.values()], rows)


def target_text(targets: list[Results]) -> str:
    """How many targets are met, and those that are not."""
    missed = [row for row in targets if not row["met"]]
    text = f"{len(targets) - len(missed)} of {len(targets)} targets met."
    if not missed:
        return text
    rows = [
        [
            f"{row['problem']}, {row['learning rates']} rates",
            f"{row['baseline']} at {row['at']}",
            row["wanted"],
            f"{100 * row['difference']:+.2f}",
            row["verdict"],
        ]
        for row in missed
    ]
    headers = ["missed", "baseline", "wanted", "difference, %", "verdict"]
    return f"{text}\n\n{table(headers, rows)}"


def conditions(outcomes: list[Outcome], plan: Plan) -> str:
    """Data and budgets."""
    lines = []
    for outcome in outcomes:
        about = outcome.about
        lines.append(
            f"- {about['title']}, {about['parameters']:,} parameters, batches of {about['batch']}, "
            f"{about['epochs']} epochs of {about['steps_per_epoch']} steps; {about['data']}."
        )
    first = (
        f"{len(plan.seeds)} seeds, means ± standard deviations. FusePV is {plan.setting}, judged "
        "by the mean of its weights that `eval` puts in place; "
        f'"{METHODS["adam_averaged"]}" is torch\'s Adam, judged by a mean that is made in the '
        "same way."
    )
    return "\n".join([first, "", *dict.fromkeys(lines)])
