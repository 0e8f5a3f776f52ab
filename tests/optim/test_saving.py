"""``fuse_ext.save``: whoever is killed finds the last checkpoint, whole."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fuse_ext

PROGRAM = Path(__file__).parents[1] / "cases" / "killed_runs.py"
KILLS = 50


def kill_runs(folder: Path, way: str, kills: int) -> dict[str, Any]:
    root = str(Path(fuse_ext.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), way, str(kills), "0"],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)  # type: ignore[no-any-return]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_whoever_is_killed_goes_on_from_the_last_step_saved(tmp_path: Path) -> None:
    found = kill_runs(tmp_path, "save", KILLS)
    assert len(found["died"]) == KILLS
    for where in ("half written", "before fsync", "before replace", "after replace", "trained"):
        assert where in found["died"]  # everywhere, that is
    assert found["unloadable"] == 0
    assert found["lost"] == 0
    assert found["steps"] > 2 * 12  # in the second phase
    assert found["same"]  # as a run that nobody has killed
    assert all(name.startswith(".checkpoint.pt.") for name in found["left"])  # as documented


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_the_test_finds_files_that_are_written_in_place(tmp_path: Path) -> None:
    assert kill_runs(tmp_path, "in place", 12)["unloadable"] > 0


def test_it_is_torch_save(tmp_path: Path) -> None:
    path = tmp_path / "saved.pt"
    fuse_ext.save({"a": torch.arange(3)}, path)
    assert torch.equal(torch.load(path)["a"], torch.arange(3))
    assert not stat.S_IMODE(path.stat().st_mode) & 0o111
    path.chmod(0o640)
    fuse_ext.save({"a": torch.arange(4)}, str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert len(torch.load(path)["a"]) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved.pt"]


def test_an_error_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "saved.pt"
    fuse_ext.save(1, path)
    with pytest.raises(AttributeError, match="pickle"):
        fuse_ext.save({"none": lambda: None}, path)
    assert torch.load(path) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved.pt"]
    with pytest.raises(FileNotFoundError):
        fuse_ext.save(1, tmp_path / "nowhere" / "saved.pt")
