"""The benchmarks run, in small, and say what they must. No time is judged."""

import importlib
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from benchmarks import minimize as benchmarks_minimize
from benchmarks.cost_kmd import Fit
from benchmarks.harness import limits
from benchmarks.harness.iteration_lbfgs import optimizers, set_up
from benchmarks.harness.iteration_limits import (
    Limit,
    bytes_of_iteration,
    instructions_limit,
    memory_limit,
    ops_limit,
    streams_limit,
)
from benchmarks.harness.rounds import Spread, interleaved
from benchmarks.harness.saving import rewrite
from benchmarks.harness.tables import count, number, table
from benchmarks.harness.workloads import Iterations, Quadratic, differences, split
from benchmarks.per_iteration import Condition, Target

ROOT = Path(__file__).parents[2]
SMALL = {
    "per_iteration": ["--rounds", "2", "--largest", "1e4"],
    "cost_kmd": ["--rounds", "2", "--largest", "4e3"],
    "memory": ["--largest", "1e5"],
    "time_to_loss": ["--rounds", "2", "--budget", "30"],
    "robustness": ["--budget", "40", "--largest", "4"],
    "minimize": ["--budget", "60", "--largest", "4"],
    "switching": ["--rounds", "2", "--budget", "25"],
    "stochastic": ["--workers", "0"],
    "scaling": ["--rounds", "2", "--largest", "2e3", "--fresh"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every module's results, in small; they run side by side."""
    out = tmp_path_factory.mktemp("results")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(out / "mpl")}
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out), *options],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, options in SMALL.items()
    }
    found = {}
    for name, process in running.items():
        printed, complaints = process.communicate()
        assert process.returncode == 0, complaints
        found[name] = json.loads((out / f"{name}.json").read_text())
        found[name]["printed"] = printed
        assert printed.strip() in (out / f"{name}.md").read_text()
        assert (out / f"{name}.png").stat().st_size > 10_000
    # Results that go elsewhere leave the committed tables alone.
    assert (ROOT / "benchmarks" / "README.md").read_text() == readme
    return found


@pytest.mark.parametrize("name", SMALL)
def test_results_stand_beside_their_conditions(results, name):
    machine = results[name]["machine"]
    for fact in ("cpu", "cores", "threads", "caches", "torch", "build_info", "mode", "rounds"):
        assert fact in machine
    assert machine["torch"] in results[name]["printed"]
    assert machine["mode"] == "quick" and machine["threads"] == 1


def test_every_target_has_a_line(results):
    targets = results["per_iteration"]["targets"]
    works = " ".join(target["target"] for target in targets)
    for part in ("fp32 history", "bf16 history", "8-bit history", "two passes", "1e4 in 8"):
        assert part in works
    for part in ("2e7 in 1", "1e6 in 300", "strong Wolfe, outside closures", "dense", "memory of"):
        assert part in works
    assert len(targets) == 13
    for target in targets:
        measured = target["verdict"] in ("met", "**missed**")
        assert measured or target["verdict"].startswith("not measured: ")
        assert bool(target["measured"]) == measured


def test_targets_that_are_times_have_a_bound(results):
    limits = {limit["target"]: limit for limit in results["per_iteration"]["limits"]}
    small = "L-BFGS iteration, d = 1e4 in 8 tensors, m = 10"
    assert limits.keys() == {small, "Adam step, d = 1e4 in 8 tensors"}
    for limit in limits.values():
        assert limit["bound"].startswith("ops alone") and limit["verdict"]
        assert limit["bound_seconds"]["median"] > 0
        assert limit["target"] in results["per_iteration"]["printed"]
    passes = {"lbfgs_update", "lbfgs_direction", "lbfgs_move", "lbfgs_update + lbfgs_set_out"}
    assert {"grad_stats", *passes} == set(results["per_iteration"]["lbfgs"][0]["bare_ops_seconds"])


def test_all_optimizers_did_the_same_work(results):
    rows = results["per_iteration"]["lbfgs"]
    assert rows and all(row["unequal"] == "" for row in rows)
    assert {"torch", "fp32", "bf16"} <= rows[0]["seconds"].keys()


def test_costs_are_fitted_on_every_axis(results):
    axes = {axis["axis"]: axis for axis in results["cost_kmd"]["axes"]}
    assert axes.keys() == {"K", "m", "d"}
    for axis in axes.values():
        assert {"torch", "fp32"} <= axis["fits"].keys()
        assert all(math.isfinite(fit["slope"]) for fit in axis["fits"].values())
    assert results["cost_kmd"]["crossings"][0]["break_even_batch"]["torch"]


def test_memory_is_measured_beside_the_estimate(results):
    cases = {case["label"]: case for case in results["memory"]["cases"]}
    theirs = cases["torch LBFGS, m = 10, fixed step"]
    assert theirs["state_bytes"] == pytest.approx(88 * 1e5, rel=1e-3)
    for label, case in cases.items():
        if label.startswith("torch"):
            assert case["estimate"] is None
        else:
            assert case["estimate"]["state"] == pytest.approx(case["state_bytes"], rel=0.02), label


def test_all_methods_get_the_same_budget(results):
    for methods in results["time_to_loss"]["problems"].values():
        assert {"by hand (torch)", "FusePV", "Adam (torch)", "L-BFGS (torch)"} <= methods.keys()
        for runs in methods.values():
            assert [run["seed"] for run in runs] == [0, 1]
            assert all(run["evaluations"] <= 30 for run in runs)
        # FusePV begins as Adam by hand does, from the same start.
        losses = [methods[name][0]["least_loss"] for name in ("by hand (torch)", "FusePV")]
        assert all(math.isfinite(loss) for loss in losses)


def test_every_solver_has_every_problem(results):
    for dtype in ("float64", "float32"):
        for solvers in results["robustness"]["problems"][dtype].values():
            assert {"scipy", "torch", "approximate Wolfe", "FusePV, steps of 1"} <= solvers.keys()
            assert all(0 < run["evaluations"] <= 40 for run in solvers.values())
    assert len(results["robustness"]["targets"]) == 9


def test_minimize_and_scipy_get_the_same_problems_and_budget(results):
    found = results["minimize"]
    assert found["problems"].keys() == {"free", "wide", "tight"}
    for problems in found["problems"].values():
        assert len(problems) == 16
        for case in problems.values():
            assert len(case["solvers"]) == 4
            assert all(0 < run["evaluations"] <= 60 for run in case["solvers"].values())
            assert case["least"] <= min(run["least"] for run in case["solvers"].values())
    # Three boxes, two of ours, two targets; each is met or missed by what was measured.
    assert len(found["targets"]) == 12
    for target in found["targets"]:
        if "times scipy's" in target["target"]:
            met = float(target["measured"]) <= 1.1
            assert target["verdict"] == ("met" if met else "**missed**")


def test_boxes_of_minimize_are_what_they_say():
    """A tight one keeps every other element from the solution, and a wide one nothing."""
    problem = next(p for p in benchmarks_minimize.large_problem_set() if p.name == "wood")
    solution = torch.ones(4, dtype=torch.float64)
    boxes = benchmarks_minimize.boxes_around(problem, solution)
    (low, high), (lower, upper) = boxes["wide"], boxes["tight"]
    assert (low < solution).all() and (solution < high).all()
    assert (low < problem.x0).all() and (problem.x0 < high).all()
    assert ((lower <= solution) & (solution <= upper)).tolist() == [False, True, False, True]
    assert ((lower <= problem.x0) & (problem.x0 <= upper)).all()
    run = benchmarks_minimize.Run(problem, boxes["tight"], 3)
    with pytest.raises(AssertionError, match="left the box"):
        run(solution)
    inside = (lower <= problem.x0) & (problem.x0 <= upper)
    assert inside.all() and run(problem.x0.clone()).item() == 19192.0


def test_evaluations_of_minimize_count_to_the_first_that_is_near_enough():
    problem = next(p for p in benchmarks_minimize.large_problem_set() if p.name == "wood")
    run = benchmarks_minimize.Run(problem, None, 9)
    run.losses = [101.0, math.nan, 12.0, 1.05, 60.0, 1.0]
    assert [run.reached(tau, 1.0) for tau in (1.0, 0.2, 1e-3, 1e-9)] == [1, 3, 4, 6]
    assert run.reached(1e-3, 0.5) == math.inf and run.least == 1.0


def test_every_switch_has_every_start(results):
    for methods in results["switching"]["least_losses"].values():
        assert {"FusePV, m = 10", "L-BFGS all along (torch), m = 100"} <= methods.keys()
        assert all(len(losses) == 2 for losses in methods.values())
    assert all(row["verdict"] for row in results["switching"]["comparisons"])


def test_minibatch_methods_are_compared_on_equal_terms(results):
    found = results["stochastic"]
    assert len(found["targets"]) == 10 and all("met" in row for row in found["targets"])
    for kind, methods in (("printed", 8), ("tuned", 7)):
        outcome = found["outcomes"][kind]["kmnist"]
        assert len(outcome["methods"]) == methods
        assert outcome["about"]["data"].startswith("digits: 320 of the 1,437")
        for method in outcome["methods"].values():
            for accuracy in method["test_accuracy"].values():
                assert len(accuracy["values"]) == 2 and 0 <= accuracy["mean"] <= 1
        # They leave Adam where FusePV does.
        steps = {str(outcome["methods"][name]["switch_step"]) for name in ("adam_sgd", "fuse_pv")}
        assert len(steps) == 1
    assert {"Adam's metric", "automatic switch", "Fuse, theta = 0.5"} <= found["ablation"][
        "kmnist"
    ].keys()
    assert len(found["automatic_switch"]) == 2


def test_minibatch_methods_meet_on_every_task(results):
    found = results["stochastic"]
    schedules = ("constant", "cosine", "warm-up, cosine")
    methods = ("AdamW", "FusePV", "FusePV, switch at half", "FusePV in Adam's metric")
    for section in ("schedules", "text"):
        (entries,) = found[section].values()
        wanted = {f"{method}, {schedule}" for method in methods for schedule in schedules}
        assert wanted <= entries.keys()
    assert found["robustness"].keys() == {"dropout", "noise", "batch-8"}
    for section in ("schedules", "robustness", "text"):
        for task in found[section].values():
            for entry in task.values():
                assert entry["best"] in entry["tried"]
                # The same effort: two learning rates, and another if the best is at the edge.
                assert len(entry["tried"]) == 3
                assert all(gradients >= 60 for gradients in entry["gradients"])
    assert found["text"]["text"]["FusePV, switch at half, constant"]["switch_step"] == [30, 30]
    page = results["stochastic"]["printed"]
    for duel in found["duels"]:
        told = {"win": "wins", "draw": "is level", "loss": "loses"}[duel["verdict"]["steps"]]
        assert f"{duel['question']}, at equal steps: " in page and told in page
    assert {row["rate"] for row in found["change"]} == {0.01, 0.001}
    assert "60 steps after the change FusePV's training loss is" in page


def test_ranks_are_measured_and_a_cluster_is_predicted(results):
    found = results["scaling"]
    by_ranks = {row["ranks"]: row for row in found["measured"]}
    assert by_ranks.keys() == {1, 2}
    for ranks, row in by_ranks.items():
        ours = {name: of for name, of in row["optimizers"].items() if "torch" not in name}
        assert len(ours) == 6 and not any(name in row["failed"] for name in ours)
        assert row["numel"] == 1024 // ranks
        for name, of in ours.items():
            assert of["kinds"] == (["allreduce_"] if ranks > 1 else [])
            if "L-BFGS" not in name:  # 6 + 3 W numbers
                assert (of["calls"], of["bytes"]) == ((1, 96) if ranks > 1 else (0, 0))
        assert row["optimizers"]["torch.optim.AdamW(fused=True)"]["calls"] == 0
        assert ours["FusePV, Adam phase"]["state_bytes"] == pytest.approx(8 * row["numel"], rel=0.1)
    # Parts of what one process holds, but for torch's L-BFGS, which has whole vectors everywhere.
    held = [by_ranks[ranks]["optimizers"]["torch.optim.LBFGS"]["state_bytes"] for ranks in (1, 2)]
    assert held[0] == pytest.approx(held[1], rel=0.01)
    printed = results["scaling"]["printed"]
    assert "**Predicted, not measured" in printed and "## Where ours is slower" in printed
    predicted = found["predicted"]
    adamw = predicted.pop("torch.optim.AdamW(fused=True)")["seconds"]
    # Passes and calls beyond AdamW's own are there to be seen.
    assert all(of["seconds"] > adamw for of in predicted.values())


@pytest.mark.parametrize("name", SMALL)
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        package = find_spec(f"benchmarks.{name}").submodule_search_locations
        importlib.import_module(f"benchmarks.{name}{'.__main__' if package else ''}").main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m benchmarks.{name}" in text and "--quick" in text and "--out" in text


def test_spread():
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    # Pairs of one round, not quotients of medians.
    assert Spread.of([2.0, 8.0, 30.0]).over(Spread.of([1.0, 2.0, 10.0])).values == (2, 4, 3)
    assert spread.per(10.0).values == (2.0, 10.0, 5.0, 2.5, 10.0 / 3.0)


def test_rounds_are_interleaved_and_repeatable():
    calls = []

    def case(name):
        return lambda: calls.append(name) or float(len(calls))

    found = interleaved({name: case(name) for name in "abc"}, rounds=4, title="t")
    assert len(calls) == 15  # and one round of warm-up
    for i in range(0, 15, 3):
        assert sorted(calls[i : i + 3]) == ["a", "b", "c"]
    assert len(set(zip(*[iter(calls)] * 3, strict=True))) > 1  # not always the same neighbours
    assert all(len(spread.values) == 4 for spread in found.values())


def test_targets_can_be_missed():
    fast, slow = Condition("times", 5.2, 5.0), Condition("times", 4.9, 5.0)
    small, large = (Condition("bytes", value, 30.0, at_most=True) for value in (28.0, 31.0))
    assert Target("work", "peer", (fast, small)).verdict == "met"
    assert Target("work", "peer", (fast, large)).verdict == "**missed**"
    assert Target("work", "peer", (slow,)).verdict == "**missed**"
    assert Target("work", "peer", (), "no such thing").verdict == "not measured: no such thing"


def _limit(bound, ours, peer, wanted):
    return Limit("t", "b", *(Spread.of([x, x]) for x in (bound, ours, peer)), wanted)


def test_bounds_say_what_follows_from_them():
    assert _limit(0.97, 1.0, 3.0, 4.0).verdict == "at the bound; not even the bound would do"
    assert _limit(0.5, 1.0, 3.0, 4.0).verdict == "50% is not the bound; the bound would do"
    assert _limit(0.5, 1.0, 5.0, 4.0).verdict == "50% is not the bound"
    assert "which does not limit it; not even" in _limit(1.2, 1.0, 3.0, 4.0).verdict
    assert _limit(0.97, 1.0, 3.0, None).verdict == "at the bound"


def test_bounds_are_computed_from_the_run():
    # 43 rows, g and the previous g twice each; then x twice and p.
    assert bytes_of_iteration(10, 4.0) == (4 * 10 + 3) * 4 + 16 + 8
    assert bytes_of_iteration(10, 4.0, 2.0) == (4 * 10 + 3) * 4 + 16 + (8 + 8) + (12 + 8)
    ours, peer = Spread.of([4.0, 4.0]), Spread.of([8.0, 8.0])
    limit = memory_limit("t", 10.0, 100, Spread.of([500.0, 1000.0]), ours, peer, 5.0)
    assert limit.bound.values == (2.0, 1.0)
    assert limit.best.values == (4.0, 8.0) and limit.ratio.values == (2.0, 2.0)
    seconds = {"a": Spread.of([1.0, 1.0]), "b": Spread.of([2.0, 1.0])}
    limit = ops_limit("t", seconds, {"a": 1.5, "b": 1.0}, ours, peer, 5.0)
    assert limit.bound.values == (3.5, 2.5) and "a" in limit.what
    limit = instructions_limit("t", Spread.of([0.25, 0.5]), 0.125, ours, peer, 5.0)
    assert limit.bound.values == (2.0, 4.0) and "8.00 times" in limit.what
    many, best = Spread.of([100.0, 50.0]), Spread.of([200.0, 100.0])
    limit = streams_limit("t", 400.0, many, best, ours, 0.9)
    assert limit.bound.values == (4.0, 8.0) and limit.best.values == (0.5, 0.5)
    assert limit.ratio.values == (0.5, 1.0) and limit.wanted == 0.9


def test_ways_of_most_streams_are_found():
    spread = Spread.of([1.0, 1.0])
    ways = dict.fromkeys(limits.reading(torch.ones(2, 64)), spread)
    found = limits.of_most_streams(ways)
    assert set(found) <= set(ways)
    assert len(found) == (0 if limits.compiled() is None else 2)


def test_fit_finds_a_power():
    fit = Fit.of([1, 10, 100], [3.0, 30.0, 300.0])
    assert fit.slope == pytest.approx(1) and fit.r2 == pytest.approx(1)
    assert fit.scale == pytest.approx(3)


def test_numbers_and_tables():
    shown = [number(x) for x in (0.0, 1.0, 12345.6, 0.001234)]
    assert shown == ["0", "1.00", "12300", "0.00123"]
    assert [count(x) for x in (8, 1e4, 2e7, 535818)] == ["8", "1e4", "2e7", "5.36e5"]
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| :-- | --: |\n| 1 | 2 |"


def test_readme_is_rewritten_between_its_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before <!-- x: begin -->\nold\n<!-- x: end --> after")
    rewrite(readme, "x", "new")
    assert readme.read_text() == "before <!-- x: begin -->\nnew\n<!-- x: end --> after"
    with pytest.raises(SystemExit, match="<!-- y: begin -->"):
        rewrite(readme, "y", "new")


def test_quadratic_is_what_its_gradients_say():
    problem = Quadratic(split(101, 3))
    loss = problem.closure()
    first = [p.grad for p in problem.params]
    expected = sum(0.5 * (p.detach() * p.grad).sum() for p in problem.params)
    assert float(loss) == pytest.approx(float(expected))
    problem.closure()
    assert all(p.grad is not g for p, g in zip(problem.params, first, strict=True))
    assert problem.seconds > 0 and problem.calls == 2


@pytest.mark.parametrize("each", [2, 7])
def test_pairs_count_also_where_a_call_makes_more_than_the_history_holds(each):
    made = optimizers(3, torch.float32, 1.0, each, "strong_wolfe")
    cases = set_up({name: made[name] for name in ("torch", "fp32")}, [60], torch.float32, 3, each)
    for case in cases.values():
        case.run()
        assert case.work()["pairs accepted"] == 1.0


def test_unequal_work_is_said():
    class Fake(Iterations):
        def __init__(self, evaluations):
            self.evaluations = evaluations

        def work(self):
            return {"evaluations": self.evaluations}

    assert differences({"a": Fake(1.0), "b": Fake(1.02)}) == ""
    assert "unequal work" in differences({"a": Fake(1.0), "b": Fake(2.0)})
