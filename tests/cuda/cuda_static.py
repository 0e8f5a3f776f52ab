"""What the compiled CUDA kernels are made of: registers, memory and instructions, per architecture.

    python tests/cuda/cuda_static.py

prints a table. Reads the machine code in the built extension with NVIDIA's cuobjdump; no GPU is
needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from fuse_ext import _C

DTYPES = ("f32", "f64", "bf16", "f16", "i8")  # order of csrc/numeric.h
TYPES = {"f": "float", "d": "double"}
# Loads and stores: 128 bits and narrower, from and to global memory; and what should not be there,
# local memory (spills) and generic addresses.
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE
)
KERNEL = re.compile(
    r"(adam|update|direction|two_loop|decide|stats|move|blend|copy|dense_[a-z_]+?)_kernelI(.*?)EEv"
)


def tool(name: str) -> Path | None:
    """A tool of the CUDA toolkit: from the toolkit itself, the PATH or Triton's wheel."""
    candidates = [Path("/usr/local/cuda/bin") / name]
    on_path = shutil.which(name)
    if on_path:
        candidates.append(Path(on_path))
    triton = find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        root = Path(triton.submodule_search_locations[0])
        candidates.append(root / "backends" / "nvidia" / "bin" / name)
    return next((path for path in candidates if path.is_file()), None)


def why_not() -> str:
    """Why nothing can be checked here; empty if it can."""
    if not _C.build_info()["cuda"]:
        return "this extension has no CUDA kernels; build it with FUSE_EXT_CUDA=1 and a CUDA torch"
    if tool("cuobjdump") is None:
        return "cuobjdump was not found; it comes with the CUDA toolkit and with the triton wheel"
    return ""


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, pattern: str) -> int:
        """Instructions whose whole name matches."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    @property
    def wide_loads(self) -> int:
        return self.count(r"LDG\.E\.(128|ENL2\.256)(\..*)?")

    @property
    def wide_stores(self) -> int:
        return self.count(r"STG\.E\.(128|ENL2\.256)(\..*)?")

    @property
    def generic(self) -> int:
        return self.count(r"(LD|ST)(\..*)?")

    @property
    def local_accesses(self) -> int:
        return self.count(r"(LDL|STL)(\..*)?")


def readable(mangled: str) -> str:
    """``update<float, bf16>`` for the mangled name."""
    found = KERNEL.search(mangled)
    assert found, mangled
    arguments = []
    for kind, flag, dtype in re.findall(r"^(f|d)|Lb(\d)|LNS_5DTypeE(\d)", found[2] + "E"):
        if kind:
            arguments.append(TYPES[kind])
        elif flag:
            arguments.append("yes" if flag == "1" else "no")
        else:
            arguments.append(DTYPES[int(dtype)])
    return f"{found[1]}<{', '.join(arguments)}>"


def _dump(*options: str) -> str:
    command = [str(tool("cuobjdump")), *options, str(_C.__file__)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def architectures() -> list[str]:
    """Those with machine code in the extension, as sm_90."""
    return sorted(set(re.findall(r"\.(sm_\d+[af]?)\.cubin", _dump("--list-elf"))))


def kernels(architecture: str) -> dict[str, Kernel]:
    """All kernels of an architecture, by readable name."""
    found: dict[str, Kernel] = {}
    usage = _dump("-res-usage", "-arch", architecture)
    for mangled, registers, stack, local in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
    ):
        name = readable(mangled)
        found[name] = Kernel(name, int(registers), int(stack), int(local))
    for part in _dump("-sass", "-arch", architecture).split("Function : ")[1:]:
        mangled, _, body = part.partition("\n")
        found[readable(mangled)].instructions = Counter(INSTRUCTION.findall(body))
    return found


def table() -> str:
    """Registers a thread, and 128-bit loads and stores, of every kernel on every architecture."""
    archs = architectures()
    all_kernels = {arch: kernels(arch) for arch in archs}
    lines = ["| kernel | " + " | ".join(f"{a}: registers, loads, stores" for a in archs) + " |"]
    lines.append("|---" * (len(archs) + 1) + "|")
    for name in sorted(all_kernels[archs[0]]):
        cells = []
        for arch in archs:
            k = all_kernels[arch][name]
            cells.append(f"{k.registers}, {k.wide_loads}, {k.wide_stores}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(why_not() or table())
