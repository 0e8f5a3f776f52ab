"""Builds the extension fuse_ext._C from the sources listed in csrc/sources.txt.

Environment:
    FUSE_EXT_CUDA: 1 builds the CUDA kernels or fails, 0 leaves them out. Unset: they are built if
        this torch is a CUDA build and an nvcc is found. Whether the building machine has a GPU
        does not matter.
    CUDA_HOME: the CUDA toolkit; by default /usr/local/cuda, else the one of the nvcc on the PATH.
    TORCH_CUDA_ARCH_LIST: GPU architectures; by default 8.0;9.0;10.0+PTX.
    FUSE_EXT_WERROR: 1 makes warnings errors, as the Makefile does.
    MAX_JOBS: how many compilers run at once.
    FUSE_EXT_RELEASE: 1 names in the wheel's version the torch and CUDA that it is for, and asks for
        that torch, so that wheels for several of them can lie side by side.
    FUSE_EXT_HOME: the repository's address, for the links of a package index.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

from build_backend import (
    home_address,
    long_description,
    oldest_torch,
    project_urls,
    require_torch,
    torch_minor,
)

ROOT = Path(__file__).parent
VERSION: str = runpy.run_path(str(ROOT / "fuse_ext" / "_version.py"))["__version__"]
DEFAULT_CUDA_ARCHS = "8.0;9.0;10.0+PTX"


def source_sections() -> dict[str, list[str]]:
    """The sections of csrc/sources.txt, each a list of paths relative to the root."""
    sections: dict[str, list[str]] = {}
    for line in (ROOT / "csrc" / "sources.txt").read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("["):
            paths = sections.setdefault(line.strip("[]"), [])
        elif line:
            paths.append(line)
    return sections


def find_cuda_home() -> Path | None:
    """The CUDA toolkit, as a folder that has bin/nvcc and CUDA's headers.

    An nvcc on the PATH may be a script that starts the real one elsewhere, so its folder counts
    only if the headers lie beside it.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        candidates = [Path(named)]
    else:
        candidates = [Path("/usr/local/cuda")]
        on_path = shutil.which("nvcc")
        if on_path:
            candidates.append(Path(on_path).resolve().parent.parent)
    for home in candidates:
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


def choose_cuda(sources: list[str]) -> Path | None:
    """The toolkit to build the CUDA sources with, or None to build for the CPU only."""
    import torch

    wish = os.environ.get("FUSE_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"FUSE_EXT_CUDA must be 0, 1 or unset, not {wish!r}")
    if wish == "0":
        return None
    home = find_cuda_home()
    missing = []
    if not sources:
        missing.append("csrc/sources.txt lists no CUDA sources")
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is built without CUDA")
    if home is None:
        missing.append("no CUDA toolkit with bin/nvcc and its headers was found (set CUDA_HOME)")
    if wish == "1" and missing:
        raise SystemExit(f"FUSE_EXT_CUDA=1, but {' and '.join(missing)}")
    return None if missing else home


def compiler_flags() -> list[str]:
    """Flags that depend on the compiler.

    With -fopenmp at::parallel_for runs on torch's own OpenMP threads. torch's wheels for Linux
    bring GCC's libgomp. Only code compiled by GCC can share it, and it must not be linked here: a
    second runtime would bring a second pool of threads that spins against the first. Elsewhere
    loops are vectorised, but run on one thread.
    """
    compiler = os.environ.get("CXX", "c++").split()
    probe = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    try:
        macros = subprocess.run(probe, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"fuse_ext needs a C++ compiler (CXX={compiler[0]}): {error}") from None
    if "__clang__" in macros:
        return ["-fopenmp-simd", "-Wno-pass-failed"]
    return ["-fopenmp" if platform.system() == "Linux" else "-fopenmp-simd"]


def make_extension() -> Extension:
    """The extension fuse_ext._C, for this torch and the CUDA toolkit in use, if any."""
    sections = source_sections()
    cuda_home = choose_cuda(sections["cuda"])
    archs = ""
    if cuda_home is not None:
        # torch.utils.cpp_extension reads both when it is imported.
        os.environ["CUDA_HOME"] = str(cuda_home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
        archs = os.environ["TORCH_CUDA_ARCH_LIST"]
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    facts = {
        "FUSE_EXT_VERSION": VERSION,
        "FUSE_EXT_TORCH_VERSION": torch.__version__,
        "FUSE_EXT_CUDA_VERSION": torch.version.cuda if cuda_home else "",
        "FUSE_EXT_CUDA_ARCHS": archs,
    }
    macros: list[tuple[str, str | None]] = [(name, f'"{text}"') for name, text in facts.items()]
    sources = sections["kernels"] + sections["adapters"] + sections["module"]
    if cuda_home is not None:
        macros.append(("FUSE_EXT_WITH_CUDA", None))
        sources += sections["cuda"]
    print(f"fuse_ext {VERSION}: torch {torch.__version__}, CUDA {archs or 'not built'}")

    kind = CppExtension if cuda_home is None else CUDAExtension
    extension = kind("fuse_ext._C", sources, define_macros=macros)
    # torch's headers are system headers here: warnings concern our sources alone. The CUDA kernels
    # include none of them.
    system_headers = [f"-isystem{path}" for path in extension.include_dirs]
    extension.include_dirs = [str(ROOT / "csrc")]
    flags = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden"]
    # IEEE results but for errno and traps, which nothing reads. Contraction to fused
    # multiply-adds is left off so that every instruction set gives the same Adam step.
    maths = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    warnings = ["-Wall", "-Wextra"]
    nvcc_flags = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden", "-fmad=false"]
    # A kernel that spills registers or keeps arrays in local memory is no longer bound by the
    # memory traffic that its header states.
    nvcc_flags.append("-Xptxas=-warn-spills,-warn-lmem-usage")
    if os.environ.get("FUSE_EXT_WERROR") == "1":
        warnings.append("-Werror")
        nvcc_flags.append("-Werror=all-warnings")
    extension.extra_compile_args = {
        "cxx": [*flags, *maths, *warnings, *compiler_flags(), *system_headers],
        "nvcc": nvcc_flags,
    }
    return extension


def make_build_ext() -> type:
    """torch's build_ext, with a build folder that editable installs keep between them."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):  # type: ignore[misc, valid-type]
        def finalize_options(self) -> None:
            if self.build_temp is None:
                self.build_temp = str(ROOT / "build" / "extension")
            super().finalize_options()

    return BuildExt


class NoTorch(build_ext):
    """Refuses; the package can be described, and its sources packed, without torch."""

    def run(self) -> None:
        """Ends with a line that says why."""
        require_torch()


def built_with_torch() -> dict[str, Any]:
    """The extension, its command, and what the wheel says of its torch."""
    import torch

    extension = make_extension()
    facts: dict[str, Any] = {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": make_build_ext()},
    }
    wish = os.environ.get("FUSE_EXT_RELEASE", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"FUSE_EXT_RELEASE must be 0, 1 or unset, not {wish!r}")
    if wish == "1":
        torch_version = ".".join(map(str, torch_minor(torch.__version__)))
        with_cuda = ("FUSE_EXT_WITH_CUDA", None) in extension.define_macros
        device = f"cu{torch.version.cuda.replace('.', '')}" if with_cuda else "cpu"
        facts["version"] = f"{VERSION}+torch{torch_version}.{device}"
        facts["install_requires"] = [f"torch=={torch_version}.*"]
    return facts


facts: dict[str, Any] = {
    "version": VERSION,
    "install_requires": [f"torch>={oldest_torch()}"],
    "long_description": long_description(home_address(), f"v{VERSION}"),
    "long_description_content_type": "text/markdown",
    "project_urls": project_urls(home_address()),
}
if importlib.util.find_spec("torch") is None:
    facts |= {
        "ext_modules": [Extension("fuse_ext._C", [])],
        "cmdclass": {"build_ext": NoTorch},
    }
else:
    facts |= built_with_torch()
setup(**facts)
