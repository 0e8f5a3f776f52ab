"""The page of published rows: quick mode runs, and the words follow the figures."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks.harness import cells
from benchmarks.published import __main__ as published
from benchmarks.published import baselines, compare, course, ours, page, rows
from benchmarks.published.rows import RELATIVE, SOLVED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of results of the command in quick mode, without NIST's data."""
    folder = tmp_path_factory.mktemp("published")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(folder / "mpl")}
    environment.pop("FUSE_EXT_DATA", None)
    command = [sys.executable, "-m", "benchmarks.published", "--quick", "--workers", "1"]
    places = ["--out", str(folder), "--cells", str(folder / "cells")]
    done = subprocess.run(
        [*command, *places], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "README.md")
    return folder


def test_quick_mode_has_every_row_and_method(quick):
    document = json.loads((quick / "published.json").read_text())
    assert document["machine"]["mode"] == "quick"
    expected = {row.name for row in rows.ALL if row.in_quick and row.name != "nist"}
    assert document["rows"].keys() == expected
    assert any(line.startswith("NIST's") for line in document["left_out"])
    text = (quick / "README.md").read_text()
    for row in rows.ALL:
        if row.name not in expected:
            assert row.title in text.partition("Not measured: ")[2]
            continue
        found = document["rows"][row.name]
        assert found["methods"].keys() == compare.METHODS.keys()
        for runs in found["methods"].values():
            (run,) = runs
            assert run["seed"] == row.seeds[0] and run["evaluations"][-1] <= row.budget[1]
            assert all(error > 0 for error in run["error"])
            assert sorted(run["evaluations"]) == run["evaluations"]
        assert row.source in text and row.their_settings in text
        assert all(f"published: {name}" in text for name in row.published)
        assert all(sentence in text for sentence in compare.sentences(found))
        assert (quick / f"{row.name}.png").stat().st_size > 10_000


def test_the_command_says_what_it_knows(tmp_path, capsys):
    for options, complaint in (
        (["--rows", "poisson,helmoltz"], "--rows has 'helmoltz'"),
        (["--methods", "sgd"], "--methods has 'sgd'"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--workers", "-1"], "--workers must be at least 0"),
    ):
        with pytest.raises(SystemExit):
            published.main([*options, "--out", str(tmp_path)])
        assert complaint in capsys.readouterr().err


def test_pieces_add_up_on_the_page(tmp_path, monkeypatch, capsys):
    chosen = [row for row in rows.ALL if row.name in ("heat", "reaction-50")]
    monkeypatch.setattr(rows, "ALL", [replace(row, budget=(100, 12)) for row in chosen])
    places = ["--out", str(tmp_path), "--cells", str(tmp_path / "cells")]
    call = ["--quick", "--workers", "0", *places]
    published.main([*call, "--rows", "heat", "--methods", "adam"])
    text = (tmp_path / "README.md").read_text()
    assert "Heat 1-D" in text and "Reaction" in text.partition("Not measured: ")[2]
    published.main([*call, "--rows", "reaction-50", "--methods", "adam,adam_lbfgs"])
    methods = {
        name: [*row["methods"]]
        for name, row in json.loads((tmp_path / "published.json").read_text())["rows"].items()
    }
    assert methods == {"heat": ["adam"], "reaction-50": ["adam", "adam_lbfgs"]}
    # No time at all: nothing is run, the page stands.
    published.main([*call, "--minutes", "-1"])
    assert json.loads((tmp_path / "published.json").read_text())["rows"].keys() == methods.keys()
    # Other code: what is stored is no result of it, but what the page had stays, marked.
    monkeypatch.setattr(cells, "fingerprint", lambda module: "other")
    published.main([*call, "--minutes", "-1"])
    found = json.loads((tmp_path / "published.json").read_text())["rows"]
    assert {name: [*row["methods"]] for name, row in found.items()} == methods
    text = (tmp_path / "README.md").read_text()
    assert page.EARLIER in text and f"| {compare.METHODS['adam']}{page.MARK} |" in text
    published.main([*call, "--rows", "heat", "--methods", "adam"])
    found = json.loads((tmp_path / "published.json").read_text())["rows"]
    assert not found["heat"]["methods"]["adam"][0].get("earlier")
    assert found["reaction-50"]["methods"]["adam"][0]["earlier"]
    # Without the folder of runs the page is what is known; other settings are another row.
    shutil.rmtree(tmp_path / "cells")
    published.main([*call, "--minutes", "-1"])
    again = json.loads((tmp_path / "published.json").read_text())["rows"]
    assert not again["heat"]["methods"]["adam"][0]["earlier"]
    monkeypatch.setattr(rows, "ALL", [replace(row, budget=(100, 13)) for row in chosen])
    published.main([*call, "--minutes", "-1"])
    assert not json.loads((tmp_path / "published.json").read_text())["rows"]


# --- one run --------------------------------------------------------------------------------


class Bowl:
    """x^2 about a centre that resampling moves."""

    def __init__(self, every=None):
        self.params = [torch.tensor([3.0], requires_grad=True)]
        self.resample_every = every
        self.centre, self.evaluations = 0.0, 0

    def evaluate(self):
        self.evaluations += 1
        (x,) = self.params
        x.grad = None
        loss = (x - self.centre).square().sum()
        loss.backward()
        return loss.detach()

    def error(self, params):
        return float((params[0] - self.centre).abs())

    def resample(self):
        self.centre += 1.0


def trained(problem, train, budget):
    run = course.Course(problem, budget)
    with pytest.raises(course.BudgetSpentError):
        train(run)
    return run.record()


TRAINERS = {
    "adam": lambda run: baselines.adam(run, 0.1),
    "adam_lbfgs": lambda run: baselines.adam_then_lbfgs(run, 0.1, 5, 7),
    "silent": lambda run: ours.fuse_pv(run, "silent", 0.1, False, True),
    "pairs": lambda run: ours.fuse_pv(run, "pairs", 0.1, False, True),
    "dense": lambda run: ours.fuse_pv(run, "dense", 0.1, False, True),
}


@pytest.mark.parametrize("method", TRAINERS)
def test_every_method_gets_the_same_evaluations_and_new_points(method):
    problem = Bowl(every=7)
    record = trained(problem, TRAINERS[method], 40)
    assert problem.evaluations == 40 == record["evaluations"][-1]
    assert 3 <= problem.centre <= 5  # 7 evaluations and what a step needs beyond them
    assert record["parameters"] == 1


def test_a_course_keeps_the_best_point_and_ends_lost_runs():
    problem = Bowl()
    run = course.Course(problem, 30)
    for x in (3.0, 1.0, 2.0, float("nan")):
        with torch.no_grad():
            problem.params[0].fill_(x)
        run()
    record = run.record()
    assert record["evaluations"][-1] == 4
    assert record["loss"][-1] == 1.0 and record["error"][-1] == 1.0
    run = course.Course(problem, 10_000)
    with pytest.raises(course.BudgetSpentError):
        while True:
            run()
    assert run.count == course.LOST


def test_new_points_void_the_least_loss():
    problem = Bowl(every=2)
    run = course.Course(problem, 30)
    run(), run()
    assert run.resample_if_due() and not run.resample_if_due()
    run()
    assert run.record()["loss"][-1] == 4.0  # of x = 3 about 1


def test_checkpoints_end_with_the_budget():
    for budget in (5, 12, 300, 41_000):
        at = course.checkpoints(budget)
        assert max(at) == budget and min(at) >= 1 and len(at) <= 80


# --- words ----------------------------------------------------------------------------------


def a_run(error, seconds=(1.0, 2.0), evaluations=(50, 100), seed=1, busy=1.0):
    return {
        "seed": seed,
        "case": "",
        "cpu": "a processor",
        "evaluations": list(evaluations),
        "cpu_seconds": list(seconds),
        "seconds": [wall * busy for wall in seconds],
        "loss": [1e-3, 1e-4],
        "error": list(error),
        "parameters": 3,
    }


def a_row(methods, **more):
    return {
        "title": "A row",
        "measure": RELATIVE,
        "published": {"worse": 1e-2, "best": 1e-3},
        "source": "https://example.org",
        "their_settings": "theirs",
        "our_settings": "ours",
        "aims": [1e-2, 1e-9],
        "seeds": [1],
        "budget": 100,
        "lr": 1e-3,
        "adam_lr": 1e-3,
        "adam_steps": 10,
        "methods": methods,
        **more,
    }


def test_words_follow_the_figures_either_way():
    good, bad = a_run((1e-3, 1e-5)), a_run((1e-1, 1e-2), seconds=(0.5, 1.0))
    ahead = " ".join(compare.sentences(a_row({"adam": [bad], "dense": [good]})))
    assert "At equal evaluations (100) FusePV, dense is at 1.0e-05" in ahead
    assert "ours is ahead by a factor of 1000" in ahead
    # After 1 s, when the faster one is done.
    assert "At equal time (1.00 s of one core) FusePV, dense is at 1.0e-03" in ahead
    assert "best, is 1.0e-03: ours is ahead by a factor of 100" in ahead
    assert "at most 0.010: reached by FusePV, dense after 50 evaluations and 1.00 s" in ahead
    assert "at most 1.0e-09: **not reached**" in ahead
    behind = " ".join(compare.sentences(a_row({"adam": [good], "dense": [bad]})))
    assert "**ours is behind** by a factor of 1000" in behind
    assert "best, is 1.0e-03: **ours is behind** by a factor of 10" in behind
    level = " ".join(compare.sentences(a_row({"adam": [good], "dense": [good]})))
    assert level.count("level, within a factor of 2") == 2
    lost = a_run((float("inf"), None))
    assert "by a factor of inf" in " ".join(
        compare.sentences(a_row({"adam": [good], "dense": [lost]}))
    )


def test_values_are_medians_and_counts():
    runs = [a_run((1.0, error), seed=i) for i, error in enumerate((3e-3, 1e-5, 2e-4))]
    row = a_row({"adam": runs})
    assert compare.value(row, "adam") == 2e-4
    assert compare.value(row, "adam", "evaluations", 99) == 1.0
    assert compare.value(row, "adam", "evaluations", 49) == float("inf")
    assert compare.value({**row, "measure": SOLVED}, "adam") == 2
    counted = a_row({"adam": runs, "dense": runs[1:2]}, measure=SOLVED, published={"c": 1})
    assert "ours is ahead by 2" in " ".join(compare.sentences(counted))
    assert compare.unsolved(counted, "adam") == ["/0", "/2"]
    same = a_row({"adam": runs[1:2], "dense": runs[1:2]}, measure=SOLVED, published={"c": 1})
    assert compare.sentences(same)[0].endswith(": level.")


def test_who_ends_early_stays_level():
    early = a_run((1e-3, 1e-4), seconds=(0.1, 0.2), evaluations=(20, 40))
    row = a_row({"adam": [a_run((1.0, 0.5))], "dense": [early]})
    assert compare.equal_time(row) == 2.0
    assert compare.value(row, "dense", "evaluations", 100) == 1e-4


def test_the_page_is_made_of_the_document(tmp_path):
    row = a_row({"adam": [a_run((1e-1, 1e-2))], "dense": [a_run((1e-3, None))]})
    facts = {**published.machine.facts(published.arguments(["--quick", "--out", str(tmp_path)]))}
    page.write({"machine": facts, "left_out": [], "rows": {"a": row}}, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "## A row" in text and "| published: best | 1.0e-03 |" in text
    assert (tmp_path / "a.png").exists() and "Not measured" not in text
    assert "Not an idle machine" not in text
    row["methods"]["adam"].append(a_run((1e-1, 1e-2), busy=1.5))
    page.write({"machine": facts, "left_out": [], "rows": {"a": row}}, tmp_path)
    assert "a run took 1.5 times its processor time" in (tmp_path / "README.md").read_text()
