"""Which runs are compared, with which learning rates, and who wins."""

import math
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from matplotlib import pyplot as plt

from benchmarks.harness import comparison
from benchmarks.harness.comparison import METHODS, PRINTED, Outcome, Plan, Sample, verdict
from benchmarks.harness.rate_search import Search, neighbour, search
from benchmarks.paper import __main__ as paper
from benchmarks.paper import criteria, images
from benchmarks.stochastic import images as stochastic


def sample(*values):
    return Sample(values)


def test_a_win_is_more_than_a_standard_deviation():
    theirs = sample(0.8, 0.9, 1.0)  # mean 0.9, deviation 0.1
    assert theirs.mean == pytest.approx(0.9) and theirs.std == pytest.approx(0.1)
    assert verdict(sample(1.01, 1.01, 1.01), theirs) == "win"
    assert verdict(sample(1.0, 1.0, 1.0), theirs) == "draw"
    assert verdict(sample(0.8, 0.8, 0.8), theirs) == "draw"
    assert verdict(sample(0.79, 0.79, 0.79), theirs) == "loss"
    # The larger deviation counts, whoever's it is.
    assert verdict(sample(0.7, 1.0, 1.3), sample(0.9, 0.9, 0.9)) == "draw"
    assert verdict(sample(0.9, 0.9), sample(0.9, 0.9)) == "draw"
    # Losses that diverge, with the sign turned.
    diverged = sample(1.0, math.inf).negated
    assert verdict(sample(-1.0, -2.0), diverged) == "win"
    assert verdict(diverged, sample(-1.0, -2.0)) == "loss"
    assert verdict(diverged, diverged) == "draw"
    assert sample(0.5, 0.6).percent() == "55.00 ± 7.07"


def made_up(cell):
    """A result in place of a run: FusePV ends higher, the second learning rate is the best."""
    options = cell.options
    if cell.function.endswith(":describe"):
        return {
            "title": options["problem"],
            "data": "all",
            "parameters": 10,
            "batch": 5,
            "epochs": 4,
            "steps_per_epoch": 8,
        }
    optimizer, seed = options["optimizer"], options["seed"]
    ours = optimizer["name"] == "fuse_pv"
    lr = optimizer.get("sgd_lr", optimizer["lr"])
    good = {"sgd": 0.1, "adam_sgd": 0.1}.get(optimizer["name"], 0.003)
    end = 0.5 + 0.2 * (lr == good) + 0.1 * ours + 0.001 * (seed % 7)
    accuracies = [0.1, 0.2, 0.3, 0.4, end]
    spent = 8.0 if ours else 4.0
    later = {"test_accuracy": end + 0.2, "train_loss": 0.1}
    return {
        "epochs": 4,
        "epoch": [0, 1, 2, 3, 4],
        "steps": [0, 8, 16, 24, 32],
        "test_accuracy": accuracies,
        "train_loss": [2.0, 1.5, 1.2, 1.1, 1.0 - end / 2],
        "evaluations": [0, 1, 2, 3, spent],
        "cpu_seconds": [0, 1, 2, 3, spent],
        "switch_step": 12 + seed if ours else optimizer.get("switch_step"),
        "switch_epoch": 1.5 if ours else None,
        "switch_reason": "made up" if ours else "",
        "reached": dict.fromkeys(options.get("until", {}), later),
        "optimizer": optimizer,
    }


@pytest.fixture(scope="module")
def run():
    """All runs of a problem with both kinds of rates, made up."""
    plan = Plan()
    cells = {}

    def run_all(todo):
        cells.update({cell.key: cell for cell in todo})
        return {cell.key: made_up(cell) for cell in todo}

    def known(done):
        return [
            cell
            for kind in comparison.RATES
            for cell in comparison.cells_of("usps", kind, plan, done)
        ]

    return SimpleNamespace(plan=plan, results=comparison.staged(known, run_all), cells=cells)


def test_all_get_the_same_tuning(run):
    tuned = {}
    for key, cell in run.cells.items():
        if "/tuning/" in key:
            method = key.split("/")[3].rpartition("-")[0]
            tuned.setdefault(method, []).append(cell)
    seeds = comparison.TUNING_SEEDS
    assert {m: len(of) for m, of in tuned.items()} == dict.fromkeys(PRINTED, 4 * len(seeds))
    for of in tuned.values():
        assert all(cell.options["held_out"] for cell in of)
        assert [cell.options["seed"] for cell in of] == [*seeds] * 4
    assert set(seeds).isdisjoint(run.plan.seeds)
    rates = comparison.rates_of("usps", "tuned", run.plan, run.results)
    assert rates == {
        "sgd": 0.1,
        "adam": 0.003,
        "adam_sgd": 0.1,
        "fuse_pv": 0.003,
        "adam_cosine": 0.003,
        "adam_averaged": 0.003,
    }
    assert comparison.rates_of("usps", "printed", run.plan, run.results) == PRINTED


def test_baselines_have_what_fuse_pv_had(run):
    for kind in comparison.RATES:
        for seed in range(5):
            ours = run.cells[f"minibatch/usps/{kind}/fuse_pv/{seed}"].options
            assert "until" not in ours and "held_out" not in ours
            for method in comparison.methods(kind):
                options = run.cells[f"minibatch/usps/{kind}/{method}/{seed}"].options
                assert options["seed"] == seed
                if method == "fuse_pv":
                    continue
                assert options["until"] == {"evaluations": 8.0, "cpu_seconds": 8.0}
                if method not in (
                    "sgd",
                    "adam",
                    "adam_cosine",
                    "adam_averaged",
                ):  # they leave Adam where FusePV does
                    assert options["optimizer"]["switch_step"] == 12 + seed
    assert "minibatch/usps/printed/torch_20/0" in run.cells
    assert "minibatch/usps/tuned/torch_20/0" not in run.cells


def test_without_a_switch_the_others_leave_adam_half_way():
    never = {"switch_step": None, "epochs": 4, "steps": [0, 8, 16, 24, 32]}
    assert comparison.switch_step(never) == 16
    assert comparison.switch_step({**never, "switch_step": 5, "switch_epoch": 0.6}) == 5


def test_outcomes(run):
    outcome = Outcome.of("usps", "tuned", run.plan, run.results)
    assert outcome.accuracies("fuse_pv").mean == pytest.approx(0.802)
    assert outcome.accuracies("adam").mean == pytest.approx(0.702)
    assert outcome.accuracies("adam", "evaluations").mean == pytest.approx(0.902)
    assert outcome.verdict("adam") == "win" and outcome.verdict("adam", "evaluations") == "loss"
    assert outcome.loss_later("adam").mean == pytest.approx(0.1)
    targets = outcome.targets()
    assert [row["met"] for row in targets] == [True, True, True, False, False]
    assert [row["verdict"] for row in targets] == ["win"] * 3 + ["loss"] * 2
    found = outcome.json()["methods"]
    assert set(found) == set(METHODS) - {"torch_20"} and "verdict" not in found["fuse_pv"]
    text = stochastic.outcome_text([outcome])
    assert "90.20 ± 0.16, loss" in text and "**80.20 ± 0.16**" in text
    assert "3 of 5 targets met" in stochastic.target_text(targets)
    counted = stochastic.count_text([outcome])
    assert "| Adam | 1 / 0 / 0 | 0 / 0 / 1 | 0 / 0 / 1 |" in counted


def test_edges_of_grids_are_told(run):
    outcome = Outcome.of("usps", "tuned", run.plan, run.results)
    assert comparison.at_the_edge([outcome]).startswith("No tuned learning rate")
    outcome.searches["adam"] = Search((0.001, 0.003), 0.003)
    told = "Tuned learning rates at the edge of what was tried: Adam on usps (0.003)."
    assert comparison.at_the_edge([outcome]) == told


def test_grids_grow_until_the_best_is_inside():
    def peak(at, far=math.inf):
        return lambda rate: -abs(math.log(rate / at)) if rate < far else -math.inf

    start = (0.001, 0.003, 0.01)
    assert search(start, peak(0.003), 9) == Search(start, 0.003)
    found = search(start, peak(0.3), 9)
    assert found.best == 0.3 and found.tried == (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    found = search(start, peak(3e-5), 9)
    assert found.best == 3e-5 and found.tried[0] == 1e-5 and not found.at_edge
    # Not for ever, and it says so; all that diverges is no reason to go on upwards.
    assert search(start, peak(0.3), 2).at_edge
    assert search(start, lambda rate: -math.inf, 99).tried[-1] == 0.01
    # What is missing is asked for.
    done = {0.001: 1.0, 0.003: 2.0, 0.01: 3.0}
    assert search(start, done.get, 9) == Search((*start, 0.03), None)
    assert [neighbour(0.003, d) for d in (-1, 1)] == [0.001, 0.01]
    assert [neighbour(1.0, d) for d in (-1, 1)] == [0.3, 3.0]


def test_cells_without_a_result_are_not_asked_for_again():
    cells = [comparison.Plan().describe(problem) for problem in ("usps", "mnist")]
    assert comparison.staged(lambda done: cells, lambda todo: {}) == {}


def made_up_section(module, name, change=None):
    """A section's report from made-up runs."""
    results = {}
    while True:
        cells = module.cells(name, False, None, results)
        todo = [cell for cell in cells if cell.key not in results]
        if not todo:
            return module.report(name, results, False)
        plt.close("all")
        for cell in todo:
            results[cell.key] = made_up(cell)
            if change is not None:
                change(cell, results[cell.key])


def weaken(cell, result):
    """FusePV ends with the others' accuracy and loss, or below."""
    if cell.options.get("optimizer", {}).get("name") == "fuse_pv":
        result["test_accuracy"][-1] -= 0.15
        result["train_loss"][-1] += 0.5


@pytest.mark.parametrize("name", images.SECTIONS)
def test_sections_can_say_yes_and_no(name):
    report = made_up_section(images, name)
    problems = len(images.PAPER if name == "table2" else images.PROBLEMS)
    assert report.verdict == "reproduces" and f" on {problems} of {problems} " in report.sentence
    report = made_up_section(images, name, weaken)
    assert report.verdict == "does not reproduce" and " on 0 of " in report.sentence


def test_table_2_stands_beside_the_published_one():
    report = made_up_section(images, "table2")
    assert "| SGD | 78.6 ± ~0 |" in report.text and "| FusePV | 91.2 ± 0.91 |" in report.text
    assert report.data["published"]["cifar10"]["fuse_pv"] == [36.6, 1.0]
    # The other bases are counted too, and lost here.
    won = {"epochs": 4, "evaluations": 0, "cpu_seconds": 0}
    assert report.data["problems_won"] == {"printed": won, "tuned": won}


def test_criteria_are_chosen_and_compared():
    def by_value(cell, result):
        switch = cell.options.get("optimizer", {}).get("switch")
        if isinstance(switch, float):  # epochs
            result["train_loss"][-1] = 0.5 + 0.1 * (switch != 2.0) + 0.001 * cell.options["seed"]
        elif isinstance(switch, dict):
            result["train_loss"][-1] = 0.9 + 0.001 * cell.options["seed"]

    report = made_up_section(criteria, "fig5", by_value)
    assert report.verdict == "reproduces" and report.data["chosen"]["epochs"] == 0.5
    assert report.data["verdicts_for_epochs"]["loss"] == "win"

    def other_way(cell, result):
        by_value(cell, result)
        if isinstance(cell.options.get("optimizer", {}).get("switch"), dict):
            result["train_loss"][-1] -= 0.5

    assert made_up_section(criteria, "fig5", other_way).verdict == "does not reproduce"


def test_sections_run_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "PROBLEMS", ("kmnist",))
    places = ["--out", str(tmp_path / "out"), "--cells", str(tmp_path / "cells"), "--workers", "0"]
    paper.main([*places, "--quick", "--only", "table2,fig5,fig6,fig7"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "digits: 320 of the 1,437 training" in text and "switches after 1 epoch" in text
    for name in ("fig5", "fig6", "fig7"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    assert "Table II: test accuracy on image data: " in capsys.readouterr().out
