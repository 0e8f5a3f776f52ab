"""The package as it is installed: build facts, what it says when it cannot load, what it ships."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fuse_ext

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fuse_ext.__file__).parent


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds modules in `folder` first."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def import_error(folder: Path, code: str = "import fuse_ext") -> str:
    """The message of the ImportError that `code` must end in: one line, nothing chained."""
    result = run(code, folder)
    assert result.returncode == 1, result
    assert result.stderr.count("Traceback") == 1, result.stderr
    kind, _, message = result.stderr.splitlines()[-1].partition(": ")
    assert kind == "ImportError", result.stderr
    return message


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the installed package."""
    shutil.copytree(PACKAGE, tmp_path / "fuse_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def extension(folder: Path) -> Path:
    (file,) = (folder / "fuse_ext").glob("_C.*.so")
    return file


def fake_torch(folder: Path, version: str) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")


def test_build_info_states_this_build() -> None:
    info = fuse_ext.build_info()
    assert info["version"] == fuse_ext.__version__ == importlib.metadata.version("fuse_ext")
    assert info["torch"] == torch.__version__
    assert info["cpu_level"]
    assert (info["cuda"] is None) == (info["cuda_archs"] == "")


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_without_torch(copy: Path) -> None:
    message = import_error(copy, "import sys; sys.modules['torch'] = None; import fuse_ext")
    assert message == "fuse_ext needs PyTorch >= 2.10, which is not installed (pip install torch)"


def test_torch_too_old(copy: Path) -> None:
    fake_torch(copy, "2.9.1+cpu")
    assert import_error(copy) == "fuse_ext needs PyTorch >= 2.10, but 2.9.1+cpu is installed"


def test_extension_not_built(copy: Path) -> None:
    extension(copy).unlink()
    fake_torch(copy, "2.99.0")
    assert "compiled extension is missing" in import_error(copy)


def test_extension_does_not_load_into_another_torch(copy: Path) -> None:
    fake_torch(copy, "2.99.0")
    message = import_error(copy)
    assert message.startswith(
        f"fuse_ext was built for PyTorch {torch.__version__}, but 2.99.0 is installed; rebuild it"
    )


def test_extension_loads_but_was_built_for_another_torch(copy: Path) -> None:
    file = extension(copy)
    built_for = f"fuse_ext was built for torch {torch.__version__}".encode()
    other = built_for.replace(b"torch 2.", b"torch 9.")
    assert file.read_bytes().count(built_for) == 1
    file.write_bytes(file.read_bytes().replace(built_for, other))
    assert import_error(copy).startswith("fuse_ext was built for PyTorch 9.")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime(tmp_path: Path) -> None:
    code = (
        "import fuse_ext, re; maps = open('/proc/self/maps').read(); "
        r"print(len(set(re.findall(r'/\S*lib(?:gomp|omp|iomp5)\S*', maps))))"
    )
    result = run(code, tmp_path)
    assert result.stdout.strip() == "1", result


def test_source_distribution_carries_all_that_a_build_needs(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "*.egg-info", "*cache*")
    shutil.copytree(ROOT, tree, ignore=skipped)
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    result = run(code, tree)
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / result.stdout.splitlines()[-1]) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    files = [file for part in ("csrc", "fuse_ext", "tests") for file in (tree / part).rglob("*")]
    needed = {str(file.relative_to(tree)) for file in files if file.is_file()}
    needed |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"}
    assert needed <= carried, needed - carried
