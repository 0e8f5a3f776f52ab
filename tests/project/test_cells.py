"""Stored runs: what is run again, what is not, and what a failure leaves."""

import json

import pytest

pytest.importorskip("tqdm")

from benchmarks.harness import cells
from benchmarks.harness.cells import Cell, CellError, fingerprint, run

FUNCTION = "tests.project.test_cells:noted"


def noted(path, value, fail=False):
    """A cell's function that leaves a trace of every call."""
    with open(path, "a") as file:
        file.write(f"{value}\n")
    if fail:
        raise ArithmeticError(f"no result for {value}")
    return {"value": value, "pair": (value, None)}


@pytest.fixture
def trace(tmp_path):
    """The file of calls, and how many there were."""
    path = tmp_path / "calls"
    return str(path), lambda: path.read_text().split() if path.exists() else []


def test_cells_run_once_and_again_when_they_change(tmp_path, trace, monkeypatch):
    path, calls = trace
    wanted = [Cell(f"part/{i}", FUNCTION, {"path": path, "value": i}) for i in range(3)]
    first = run(wanted, tmp_path, "t")
    assert first == {f"part/{i}": {"value": i, "pair": [i, None]} for i in range(3)}
    assert sorted(calls()) == ["0", "1", "2"]

    # Some of them lost, the others stay; a cell cut off while it was written counts as lost.
    (tmp_path / "part/0.json").unlink()
    (tmp_path / "part/1.json").write_text('{"result": ')
    assert run(wanted, tmp_path, "t", workers=0) == first
    assert sorted(calls()[3:]) == ["0", "1"]
    records = [json.loads((tmp_path / f"part/{i}.json").read_text()) for i in range(3)]
    assert cells.seconds(wanted, tmp_path) == sum(record["seconds"] for record in records)

    # Other options, another fingerprint, or --fresh.
    changed = [wanted[0]._replace(options={"path": path, "value": 7}), *wanted[1:]]
    assert run(changed, tmp_path, "t", workers=0)["part/0"]["value"] == 7
    monkeypatch.setattr(cells, "fingerprint", lambda module: "other")
    run(wanted[1:2], tmp_path, "t", workers=0)
    run(wanted[1:2], tmp_path, "t", workers=0)
    run(wanted[1:2], tmp_path, "t", workers=0, fresh=True)
    assert calls()[5:] == ["7", "1", "1"]
    assert json.loads((tmp_path / "part/1.json").read_text())["fingerprint"] == "other"


def test_cells_named_by_an_option_count(tmp_path, trace, monkeypatch):
    path, calls = trace
    cell = Cell("one", FUNCTION, {"path": path, "value": 1}, also=("low",))
    prints = {"tests.project.test_cells": "a", "low": "b"}
    monkeypatch.setattr(cells, "fingerprint", prints.__getitem__)
    run([cell], tmp_path, "t", workers=0)
    assert json.loads((tmp_path / "one.json").read_text())["fingerprint"] == "a-b"
    assert cells.results_of([cell], tmp_path).keys() == {"one"}
    prints["low"] = "c"
    assert cells.results_of([cell], tmp_path) == {}
    run([cell], tmp_path, "t", workers=0)
    assert calls() == ["1", "1"]


def test_nothing_begins_when_time_is_up(tmp_path, trace):
    path, calls = trace
    wanted = [Cell(f"c{i}", FUNCTION, {"path": path, "value": i}) for i in range(3)]
    run(wanted[:1], tmp_path, "t", workers=0)
    for workers in (0, 1):
        assert run(wanted, tmp_path, "t", workers, until=0.0).keys() == {"c0"}
    assert calls() == ["0"]


def test_a_failing_cell_loses_no_other(tmp_path, trace):
    path, calls = trace
    good = [Cell(f"good{i}", FUNCTION, {"path": path, "value": i}) for i in range(2)]
    bad = Cell("bad", FUNCTION, {"path": path, "value": 9, "fail": True})
    with pytest.raises(CellError, match="bad: ArithmeticError: no result for 9") as caught:
        run([bad, *good], tmp_path, "t")
    assert set(caught.value.results) == {"good0", "good1"}
    assert set(caught.value.failures) == {"bad"}
    with pytest.raises(CellError):
        run([bad, *good], tmp_path, "t", workers=0)
    assert sorted(calls()) == ["0", "1", "9", "9"]  # only the bad one was tried again


def test_keys_are_files(tmp_path):
    cell = Cell("same", FUNCTION, {})
    with pytest.raises(ValueError, match="two cells have the key 'same'"):
        run([cell, cell], tmp_path, "t")
    for key in ("", "/a", "a//b", "../a", "a b", "a/.."):
        with pytest.raises(ValueError, match="is no file's name"):
            run([cell._replace(key=key)], tmp_path, "t")


def test_fingerprints_follow_imports_not_comments(tmp_path, monkeypatch):
    package = tmp_path / "benchmarks"
    (tmp_path / "fuse_ext").mkdir()
    (tmp_path / "fuse_ext" / "__init__.py").touch()
    package.mkdir()
    sources = {
        "top": "from benchmarks import middle\nimport math\nimport fuse_ext\n",
        "middle": "def f():\n    from benchmarks.low import g\n    return g\n",
        "low": "g = 1\n",
        "other": "h = 1\n",
        "without": "import torch\n",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    monkeypatch.setattr(cells, "ROOT", tmp_path)

    def now(module="benchmarks.top"):
        fingerprint.cache_clear()
        return fingerprint(module)

    before, without = now(), now("benchmarks.without")
    (package / "low.py").write_text("# one\ng = 1\n")
    (package / "other.py").write_text("h = 2\n")
    assert now() == before
    (package / "low.py").write_text("g = 2\n")
    assert now() != before
    (package / "low.py").write_text("g = 1\n")
    assert now() == before
    (tmp_path / "fuse_ext" / "adam.py").write_text("lr = 1\n")
    assert now() != before and now("benchmarks.without") == without
    fingerprint.cache_clear()
