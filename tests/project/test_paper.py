"""The paper's page: sections come and stay, sentences stand beside their figures."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from matplotlib import pyplot as plt

from benchmarks.harness.cells import Cell
from benchmarks.paper import __main__ as paper
from benchmarks.paper import complexity, landscape_runs, page, statistics
from benchmarks.paper.laws import fits

ROOT = Path(__file__).parents[2]


def halve(x):
    """A cell's function."""
    if x < 0:
        raise ValueError(f"x must not be negative, got {x}")
    return x / 2


def section(start):
    """A module of one or two sections whose second cell depends on the first one's result."""

    def cells(name, quick, data, done):
        first = Cell(f"{name}/first", "tests.project.test_paper:halve", {"x": start})
        if first.key not in done:
            return [first]
        return [first, Cell(f"{name}/second", first.function, {"x": done[first.key]})]

    def report(name, results, quick):
        quarter = results[f"{name}/second"]
        verdict = page.YES if quarter == 1 else page.NO
        figure, axes = plt.subplots()
        axes.plot([0, quarter])
        data = {"quarter": quarter, "list": [1.5, float("inf")], "quick": quick}
        sentence = f"A quarter of {start} is {quarter:g}."
        return page.Report("It is 1.", verdict, sentence, "Text.", data, {"": figure})

    titles = {"fig1": "Fig. 1: halves", "table1": "Table I: as well"}
    return SimpleNamespace(SECTIONS=titles, cells=cells, report=report)


def run(tmp_path, *options):
    """The command; returns the page."""
    places = ["--out", str(tmp_path / "out"), "--cells", str(tmp_path / "cells"), "--workers", "0"]
    paper.main([*places, *options])
    return (tmp_path / "out" / "README.md").read_text()


def test_sections_are_written_and_rewritten_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "MODULES", (section(4),))
    text = run(tmp_path)
    assert text.index("### Fig. 1: halves") < text.index("### Table I: as well")
    assert "| [Fig. 1: halves](#fig-1-halves) | It is 1. | **reproduces**. A quarter" in text
    document = json.loads((tmp_path / "out" / "fig1.json").read_text())
    assert document["quarter"] == 1 and document["list"] == [1.5, None]
    assert document["verdict"] == "reproduces" and document["work"]["cells"] == 2
    assert '"list": [1.5, null]' in (tmp_path / "out" / "fig1.json").read_text()
    assert (tmp_path / "out" / "fig1.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(paper, "MODULES", (section(8),))
    text = run(tmp_path, "--only", "table1", "--quick")
    assert "A quarter of 4 is 1." in text and "A quarter of 8 is 2." in text
    assert text.count("**Reproduces.**") == text.count("**Does not reproduce.**") == 1
    assert "quick mode" in text and "full mode" in text


def test_a_failure_keeps_the_other_sections(tmp_path, monkeypatch):
    good, bad = section(4), section(-4)
    good.SECTIONS = {"fig1": "Fig. 1: good"}
    bad.SECTIONS = {"fig2": "Fig. 2: bad"}
    monkeypatch.setattr(paper, "MODULES", (good, bad))
    with pytest.raises(SystemExit, match="not written: fig2; failed: fig2/first"):
        run(tmp_path)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Fig. 1: good" in text and "Fig. 2" not in text


def test_only_knows_its_sections(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "MODULES", (section(4),))
    with pytest.raises(SystemExit):
        run(tmp_path, "--only", "fig1,fig9")
    assert "--only has 'fig9', which is none of fig1, table1" in capsys.readouterr().err


def test_verdicts_are_of_three_kinds():
    with pytest.raises(ValueError, match="verdict must be one of"):
        page.Report("claim", "fine", "sentence", "", {})


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paper", "--help"])
    with pytest.raises(SystemExit) as ended:
        paper.main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "python -m benchmarks.paper" in text and "--quick" in text and "--only" in text


# --- the sections, in small -----------------------------------------------------------------

QUICK = ("fig1", "fig2", "fig3", "fig4", "table1")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of results of the command in quick mode."""
    folder = tmp_path_factory.mktemp("paper")
    command = [sys.executable, "-m", "benchmarks.paper", "--quick", "--out", str(folder)]
    command += ["--cells", str(folder / "cells"), "--only"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(folder / "mpl")}
    committed = ROOT / "benchmarks" / "results" / "paper" / "README.md"
    before = committed.read_text() if committed.exists() else None
    times = []
    for only in (",".join(QUICK), "fig1"):
        done = subprocess.run(
            [*command, only], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        times.append({path: path.stat().st_mtime_ns for path in folder.glob("cells/**/*.json")})
    assert times[0] and times[0] == times[1]  # the second time nothing was run
    assert (committed.read_text() if committed.exists() else None) == before
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_quick_sections(quick, name):
    document = json.loads((quick / f"{name}.json").read_text())
    text = (quick / "README.md").read_text()
    assert document["verdict"] in page.VERDICTS
    assert text.count(document["sentence"]) == 2  # in the summary and in the section
    assert document["machine"]["mode"] == "quick"
    assert (quick / f"{name}.png").stat().st_size > 20_000


def test_quick_baselines_were_tuned_alike(quick):
    for name in ("fig1", "fig4"):
        tuning = json.loads((quick / f"{name}.json").read_text())["tuning"]
        assert [len(tuning[method]) for method in ("SGD", "Adam", "FUSE", "Adam+SGD")] == [
            3,
            3,
            3,
            9,
        ]
    tuning = json.loads((quick / "table1.json").read_text())["tuning"]
    assert len(tuning) == 15 and {len(tried) for tried in tuning.values()} == {3}


def test_quick_runs_are_what_the_methods_do(quick):
    document = json.loads((quick / "fig1.json").read_text())
    ours, rival = document["runs"]["FUSE, printed"], document["runs"]["Adam, printed"]
    assert all(near for near in ours["near"]) and not any(rival["near"])
    assert max(ours["evaluations"]) <= document["budget"] == max(rival["evaluations"])
    # FUSE begins as Adam does.
    both = [run["first"]["points"][:20] for run in (ours, rival)]
    assert both[0] == both[1]
    table1 = json.loads((quick / "table1.json").read_text())["settings"]
    assert table1["convex"]["FUSE"]["reached"][-1] < 300
    for setting in table1.values():
        for method in setting.values():
            counts = [count for count in method["reached"] if count is not None]
            assert counts == sorted(counts)


# --- figures behind the sentences -----------------------------------------------------------


def test_laws_are_told_apart():
    epsilons = [10.0**-k for k in range(1, 9)]
    logs = [math.log(1 / epsilon) for epsilon in epsilons]
    assert fits(epsilons, [5 + 3 * log for log in logs])["best"] == "log 1/ε"
    assert fits(epsilons, [50 + 9 * math.log(log) for log in logs])["best"] == "log log 1/ε"
    assert fits(epsilons, [7 + 2 / epsilon**2 for epsilon in epsilons])["best"] == "1/ε²"
    power = fits(epsilons, [3 * epsilon**-0.7 for epsilon in epsilons])
    assert power["best"] == "power" and power["exponent"] == pytest.approx(0.7)
    assert power["misfit"]["power"] == pytest.approx(0, abs=1e-9)
    few = fits(epsilons, [1, 2, 3, *[None] * 5])
    assert few["best"] is None and few["exponent"] is None and few["points"] == 3


def test_runs_are_counted_from_their_own_switches():
    early, late = [3, 12, 20, None], [3, 40, 48, 60]
    both = [{"switch": 10, "reached": early}] * 2 + [{"switch": 35, "reached": late}]
    assert complexity.after_switch(both) == [None, 2, 10, None]
    assert complexity.after_switch([{"switch": None, "reached": early}]) == early


def test_too_few_points_show_nothing():
    few = {"misfit": {}}
    told = complexity._double_logarithmic(few["misfit"])
    assert told["holds"] is None and complexity.VERDICTS[told["holds"]] == "**Not shown**"
    told = complexity._logarithmic({"L-BFGS": {"after": few}, "FUSE": {"after": few}})
    assert told["holds"] is None


def test_chance():
    # Wilson's interval for 5 of 10, and the tail of ten fair coins.
    assert statistics.interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert statistics.interval(0, 100)[0] == 0 and statistics.interval(100, 100)[1] == 1
    assert statistics.sign_test(10, 0) == pytest.approx(2 / 1024)
    assert statistics.sign_test(3, 3) == statistics.sign_test(0, 0) == 1
    found = statistics.split([0.0, 1.0, 5.0], [1.0, 1.05, 2.0], 0.1)
    assert (found["lower"], found["same"], found["higher"]) == (1, 1, 1)
    assert statistics.verdict(statistics.split([0.0] * 9, [1.0] * 9, 0.1)) == 1
    assert statistics.verdict(statistics.split([1.0] * 9, [0.0] * 9, 0.1)) == -1
    assert statistics.verdict(statistics.split([1.0] * 4, [0.0] * 4, 0.1)) == 0


def test_words_and_numbers():
    assert [statistics.listed(list(names)) for names in ("a", "ab", "abc")] == [
        "a",
        "a and b",
        "a, b and c",
    ]
    assert statistics.short({"a": [1.23456789, 7, "x"]}, 3) == {"a": [1.23, 7, "x"]}


def test_a_linear_and_a_superlinear_sequence():
    linear = 0.5 ** np.arange(30.0)
    squares = 0.5 ** (2.0 ** np.arange(6))
    slow = landscape_runs.ratios([linear] * 10)
    assert all(entry["median"] == pytest.approx(0.5) for entry in slow)
    fast = {entry["decade"]: entry["median"] for entry in landscape_runs.ratios([squares] * 10)}
    assert fast[-2] == pytest.approx(0.5**4) and fast[-5] == pytest.approx(0.5**16)


def test_minima_are_found_where_they_are_smooth():
    steps = np.array([[1.2, 1.3], [1.01, 1.01], [1.0, 1.0 + 1e-6]])
    assert landscape_runs.errors("Rosenbrock", steps)[-1] == pytest.approx(1e-6 / 2**0.5, rel=1e-3)
    # Ackley's function has a kink at its minimum; on a hill of Rastrigin's there is none.
    assert landscape_runs.errors("Ackley", np.array([[1e-9, 1e-9]])) is None
    assert landscape_runs.errors("Rastrigin", np.array([[0.5, 0.5]])) is None


def test_settled_is_where_the_loss_stays():
    calls, points = np.array([0, 2, 5, 9]), np.zeros((4, 2))
    trace = landscape_runs.Trace(calls, points, np.array([3.0, 1.0, 1.0, 1.0]), 0)
    assert landscape_runs.settled(trace) == 2
    back = trace._replace(losses=np.array([1.0, 3.0, 1.0, 1.0]))
    assert landscape_runs.settled(back) == 5
    assert landscape_runs.settled(trace._replace(losses=np.full(4, math.nan))) == 9


def test_all_starts_at_once_are_each_alone():
    points = landscape_runs.starts("Ackley", "reported", 3)
    make = partial(landscape_runs.adam, lr=0.1)
    joint = list(landscape_runs.together("Ackley", make, points, 20))
    for trace, point in zip(joint, points, strict=True):
        (alone,) = landscape_runs.together("Ackley", make, point[None], 20)
        assert (alone.points == trace.points).all()
