"""The examples run, print their tables, draw their pictures; a restart changes nothing."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

pytest.importorskip("matplotlib", reason="the examples need the extra 'demo'")
pytest.importorskip("tqdm", reason="the examples need the extra 'demo'")

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG\r\n"


def run_script(name: str, *args: str) -> str:
    """Standard output of the script as a user runs it."""
    command = [sys.executable, str(EXAMPLES / name), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_on_ranks(name: str, *args: str) -> str:
    """The same under torchrun, with two processes, which meet at a port that is free."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(EXAMPLES / name), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(
    ("name", "options", "share"),
    [("ddp.py", (), 26122), ("ddp.py", ("--shard-state",), 26122), ("fsdp2.py", (), 13061)],
)
def test_ranks_agree_and_resume(
    name: str, options: tuple[str, ...], share: int, tmp_path: Path
) -> None:
    out = (*options, "--out", str(tmp_path))
    run_on_ranks(name, "--steps", "30", *out)
    resumed = run_on_ranks(name, "--steps", "60", "--resume", *out)
    whole = run_on_ranks(name, "--steps", "60", *options, "--out", str(tmp_path / "whole"))
    for output in (resumed, whole):
        assert "all ranks agree: True" in output
        assert f"rank 1: {share:,} of 26,122 parameters" in output
    # A restart changes nothing.
    assert whole.splitlines()[-5:] == resumed.splitlines()[-5:]


def rows(output: str) -> list[list[str]]:
    """The cells of the table in the output, header and rule left out."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_digits(tmp_path: Path) -> None:
    output = run_script("digits.py", "--quick", "--out", str(tmp_path))
    table = rows(output)
    assert [row[0] for row in table] == [
        "SGD",
        "Adam",
        "Adam, cosine decay",
        "Adam then SGD",
        "L-BFGS alone",
        "FusePV",
    ]
    for row in table:
        loss, passes = float(row[2].split()[0]), float(row[4])
        assert 0.0 < loss < 1.0, row
        assert 10 <= passes <= 12, row
    assert "loss plateau" in output
    assert (tmp_path / "digits.png").read_bytes().startswith(PNG)


def test_functions(tmp_path: Path) -> None:
    output = run_script("functions.py", "--quick", "--out", str(tmp_path))
    results = {(row[0], row[1]): float(row[3]) for row in rows(output)}
    assert len(results) == 8
    assert results["Rosenbrock", "FusePV"] < 1e-20 < results["Rosenbrock", "Adam"]
    # Nobody leaves Rastrigin's local minimum.
    assert results["Rastrigin", "FusePV"] == pytest.approx(8.0, abs=0.1)
    assert (tmp_path / "functions.png").read_bytes().startswith(PNG)


def test_resampling(tmp_path: Path) -> None:
    output = run_script("resampling.py", "--quick", "--out", str(tmp_path))
    table = rows(output)
    assert [row[0] for row in table] == [
        "fixed points",
        "uniform, drawn anew",
        "adaptive, drawn anew",
        "adaptive, weights too",
    ]
    for row in table:
        assert 0.0 < float(row[1]) < 1.5, row
        assert (row[4] == "1") == (row[0] != "adaptive, weights too"), row
    assert (tmp_path / "resampling.png").read_bytes().startswith(PNG)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is there to copy from the example."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / "resampling.py"))


def test_points_go_where_the_residual_is(recipe: dict[str, Any]) -> None:
    torch.manual_seed(0)

    def residual(at: Tensor) -> Tensor:
        return (at[:, 0] > 0.9).double()  # on a tenth of them

    points = recipe["Resample"](lambda n: torch.rand(n, 1), 200, 10, residual, floor=1.0)
    first = points.points
    for step in range(10):
        points.renew(step)
    assert points.points is first and points.version == 0
    points.renew(10)
    assert points.version == 1 and points.points.shape == first.shape
    # 1 / 0.1 + 1 there and 1 elsewhere: 11 of 20 points.
    assert float(residual(points.points).mean()) == pytest.approx(0.55, abs=0.1)
    assert len(points.points.unique()) == 200


def test_weights_make_gradients_equally_long(recipe: dict[str, Any]) -> None:
    x = torch.ones(3, requires_grad=True)

    def losses() -> tuple[Tensor, Tensor]:
        return 4.0 * x.square().sum(), x.square().sum()

    balance = recipe["Balance"](losses, [x], every=2, memory=0.5, most=5.0)
    for step, expected in enumerate((1.0, 1.0, 2.5, 2.5, 3.25)):
        balance.renew(step)
        assert balance.weight == pytest.approx(expected)
    assert balance.version == 2
    balance = recipe["Balance"](losses, [x], every=1, memory=0.0, most=3.0)
    balance.renew(1)
    assert balance.weight == 3.0


def train_minibatch(monkeypatch: pytest.MonkeyPatch, out: Path, *args: str) -> dict[str, object]:
    """The checkpoint that the script leaves."""
    monkeypatch.setattr(sys, "argv", ["minibatch.py", "--out", str(out), *args])
    runpy.run_path(str(EXAMPLES / "minibatch.py"), run_name="__main__")
    checkpoint: dict[str, object] = torch.load(out / "minibatch.pt")
    return checkpoint


def test_a_restart_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The switch comes in epoch 1, the metric in epoch 2: one restart before it, one after.
    whole = train_minibatch(monkeypatch, tmp_path / "whole", "--epochs", "6")
    train_minibatch(monkeypatch, tmp_path / "parts", "--epochs", "1")
    train_minibatch(monkeypatch, tmp_path / "parts", "--epochs", "4", "--resume")
    parts = train_minibatch(monkeypatch, tmp_path / "parts", "--epochs", "6", "--resume")
    assert parts["epoch"] == whole["epoch"] == 6
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name
    assert "switch_step           20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "most"),
    # A tenth of the evaluations, and small networks: that they learn, not how well.
    [("poisson", 0.1), ("inverse", 0.5), ("hard_constraints", 0.02), ("burgers", 0.9)],
)
def test_pinn(
    name: str,
    most: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    script = EXAMPLES / "pinn" / f"{name}.py"
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [script.name, "--quick", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    (error,) = re.findall(r"relative error (\S+), loss", output)
    assert 0.0 < float(error) < most
    assert "switch after 100 steps, a dense inverse Hessian" in output
    if name == "inverse":
        (of_a,) = re.findall(r"0\.3 is true: error (\S+)", output)
        assert float(of_a) < 0.5  # it begins with 2.3
    assert (tmp_path / f"pinn_{name}.png").read_bytes().startswith(PNG)
