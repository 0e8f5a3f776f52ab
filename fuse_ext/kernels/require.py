"""What the package needs before anything else of it is imported: torch, and its own extension.

Each failure is an ImportError whose message is one line that says what is missing and what to do.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
OLDEST_TORCH = (2, 10)
REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation <fuse_ext's source>"


def require() -> None:
    """Check torch, then load the extension ``fuse_ext._C``, which registers the operators.

    Raises:
        ImportError: torch is missing or too old, or the extension is missing or was built for
            another torch.
    """
    torch_version = _require_torch()
    try:
        importlib.import_module("fuse_ext._C")
    except ImportError as error:
        raise ImportError(_why_not_loaded(error, torch_version)) from None
    built_for = _built_for()
    if built_for is not None and _minor(built_for) != _minor(torch_version):
        # It loaded, but inlined code of another torch would read this one's objects.
        raise ImportError(_mismatch(built_for, torch_version))


def _require_torch() -> str:
    oldest = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"fuse_ext needs PyTorch >= {oldest}, which is not installed (pip install torch)"
        ) from None
    version = str(torch.__version__)
    if _minor(version) < OLDEST_TORCH:
        raise ImportError(f"fuse_ext needs PyTorch >= {oldest}, but {version} is installed")
    return version


def _minor(version: str) -> tuple[int, int]:
    """(2, 14) of "2.14.1+cu130"."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else OLDEST_TORCH


def _extension_file(package: Path = PACKAGE) -> Path | None:
    names = (f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((package / name for name in names if (package / name).is_file()), None)


def _built_for() -> str | None:
    """The torch version that csrc/built_for.cpp wrote into the extension's file."""
    file = _extension_file()
    text = rb"fuse_ext was built for torch ([\w.+-]+)"
    found = re.search(text, file.read_bytes()) if file else None
    return found[1].decode() if found else None


def _mismatch(built_for: str, installed: str) -> str:
    return (
        f"fuse_ext was built for PyTorch {built_for}, but {installed} is installed; "
        f"rebuild it: {REBUILD}"
    )


def _why_not_loaded(error: ImportError, torch_version: str) -> str:
    if _extension_file() is None:
        return _not_built()
    built_for = _built_for()
    if built_for is not None and built_for != torch_version:
        return f"{_mismatch(built_for, torch_version)} ({_first_line(error)})"
    return f"fuse_ext's compiled extension does not load: {_first_line(error)}"


def _not_built() -> str:
    """What is wrong where there is no extension: most often where Python was started."""
    source = PACKAGE.parent
    if not (source / "csrc").is_dir():
        return f"fuse_ext's compiled extension is missing in {PACKAGE}; install it again: {REBUILD}"
    build_here = "pip install --no-build-isolation -e ."
    installed = _installed_elsewhere()
    if installed is None:
        return (
            f"this is fuse_ext's source, {source}, and it has not been built; build it there: "
            f"{build_here}"
        )
    return (
        f"this is fuse_ext's source, {source}, which has not been built and hides the fuse_ext "
        f"installed in {installed.parent}: start Python in another folder (cd ..), or build here: "
        f"{build_here}"
    )


def _installed_elsewhere() -> Path | None:
    """Another fuse_ext on the path, which has an extension."""
    found = (Path(entry or ".").resolve() / "fuse_ext" for entry in sys.path)
    return next((p for p in found if p != PACKAGE.resolve() and _extension_file(p)), None)


def _first_line(error: ImportError) -> str:
    return str(error).partition("\n")[0]
