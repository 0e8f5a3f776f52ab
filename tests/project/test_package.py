"""The package as it is installed: build facts, what it says when it cannot load, what it ships."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch

import fuse_ext

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fuse_ext.__file__).parent
STDLIB = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]


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


def test_source_that_is_not_built(copy: Path) -> None:
    extension(copy).unlink()
    fake_torch(copy, "2.99.0")
    (copy / "csrc").mkdir()
    # Without site-packages, and what lies there.
    message = import_error(copy, f"import sys; sys.path[1:] = {STDLIB!r}; import fuse_ext")
    assert message == (
        f"this is fuse_ext's source, {copy}, and it has not been built; build it there: "
        "pip install --no-build-isolation -e ."
    )


def test_source_hides_the_installed_package(copy: Path) -> None:
    installed = copy / "site-packages"
    shutil.copytree(copy / "fuse_ext", installed / "fuse_ext")
    extension(copy).unlink()
    fake_torch(copy, "2.99.0")
    (copy / "csrc").mkdir()
    code = f"import sys; sys.path[1:] = [{str(installed)!r}, *{STDLIB!r}]; import fuse_ext"
    message = import_error(copy, code)
    assert f"hides the fuse_ext installed in {installed}: start Python in another folder" in message


def build_hook(folder: Path, hook: str) -> subprocess.CompletedProcess[str]:
    """A hook of the build backend, as a build without torch calls it."""
    code = (
        f"import sys; sys.path[:0] = [{str(folder)!r}]; sys.modules['torch'] = None; "
        f"import build_backend; print(build_backend.{hook})"
    )
    return run(code, folder)


@pytest.mark.parametrize(
    "hook",
    [
        "get_requires_for_build_wheel()",
        "get_requires_for_build_editable()",
        "prepare_metadata_for_build_wheel('.')",
        "build_wheel('.')",
    ],
)
def test_a_build_without_torch_ends_at_once_and_names_the_command(hook: str) -> None:
    result = build_hook(ROOT, hook)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("fuse_ext is compiled against the torch that will run it, ")
    assert line.endswith("pip install --no-build-isolation .")


def test_a_build_against_an_old_torch_is_refused(tmp_path: Path) -> None:
    fake_torch(tmp_path, "2.9.1+cpu")
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); import build_backend; "
        "build_backend.require_torch()"
    )
    result = run(code, tmp_path)
    assert result.stderr == "fuse_ext needs torch >= 2.10, and 2.9.1+cpu is installed\n"


def test_links_of_the_description_lead_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    backend = importlib.import_module("build_backend")
    readme = (ROOT / "README.md").read_text()
    assert "](docs/start.md)" in readme and "](docs/images/digits.png)" in readme
    at_home = backend.long_description("https://example.org/fuse", "v1")
    targets = re.findall(r"\]\(([^)]+)\)", at_home)
    assert len(targets) > 20 and all(target.startswith("https://") for target in targets)
    assert "](https://example.org/fuse/blob/v1/docs/start.md)" in at_home
    assert "](https://example.org/fuse/raw/v1/docs/images/digits.png)" in at_home
    homeless = backend.long_description("", "v1")
    targets = re.findall(r"\]\(([^)]+)\)", homeless)
    assert targets and all(target.startswith("https://") for target in targets)
    assert "Ten minutes goes through it" in homeless and ".png" not in homeless


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


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the repository that has not been built."""
    skipped = shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "*.egg-info", "*cache*")
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=skipped))


@pytest.mark.parametrize("release", [False, True])
def test_a_wheel_for_release_names_its_torch(
    tree: Path, monkeypatch: pytest.MonkeyPatch, release: bool
) -> None:
    (tree / "meta").mkdir()
    monkeypatch.setenv("FUSE_EXT_CUDA", "0")
    monkeypatch.setenv("FUSE_EXT_RELEASE", str(int(release)))
    result = run("import build_backend as b; b.prepare_metadata_for_build_wheel('meta')", tree)
    assert result.returncode == 0, result.stderr
    (file,) = (tree / "meta").glob("*.dist-info/METADATA")
    metadata = file.read_text().splitlines()
    minor = ".".join(torch.__version__.split(".")[:2])
    version, needs = (f"+torch{minor}.cpu", f"torch=={minor}.*") if release else ("", "torch>=2.10")
    assert f"Version: {fuse_ext.__version__}{version}" in metadata
    assert [
        line for line in metadata if line.startswith("Requires-Dist") and "extra" not in line
    ] == [f"Requires-Dist: {needs}"]


def test_source_distribution_carries_all_that_a_build_needs(tree: Path, tmp_path: Path) -> None:
    result = build_hook(tree, f"build_sdist({str(tmp_path)!r})")  # which needs no torch
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / result.stdout.splitlines()[-1]) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    files = [file for part in ("csrc", "fuse_ext", "tests") for file in (tree / part).rglob("*")]
    needed = {str(file.relative_to(tree)) for file in files if file.is_file()}
    needed |= {
        "setup.py",
        "build_backend.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CMakeLists.txt",
    }
    assert needed <= carried, needed - carried
