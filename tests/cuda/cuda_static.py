"""What the compiled CUDA kernels are made of: registers, memory and instructions, per architecture.

    python tests/cuda/cuda_static.py [file ...]

prints a table. Reads the machine code in the built extension, or in files that nvcc has made of
csrc/cuda (-cubin), with NVIDIA's cuobjdump; no GPU is needed.
"""

from __future__ import annotations

import argparse
import operator
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from fuse_ext import _C

DTYPES = ("f32", "f64", "bf16", "f16", "i8")  # order of csrc/numeric.h
TYPES = {"f": "float", "d": "double"}
# Loads and stores: 128 bits and narrower, from and to global memory; and what should not be there,
# local memory (spills) and generic addresses.
INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE
)
KERNEL = re.compile(
    r"(adam|update|direction|two_loop|broyden|decide|stats|move|blend|copy|dense_[a-z_]+?)_kernelI(.*?)EEv"
)


# Instead of the extension.
FILES: list[str] = []


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
    code: list[tuple[int, bool, str, str]] = field(default_factory=list)

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


# Accesses to global memory of 128, 64 and 32 bits, and narrower ones.
Accesses: TypeAlias = tuple[int, int, int, int]


def accesses(instruction: str) -> Accesses:
    """Which of them an instruction is."""
    if not re.fullmatch(r"(?:LDG|STG)\.E(\..*)?", instruction):
        return 0, 0, 0, 0
    if "ENL2.256" in instruction:
        return 2, 0, 0, 0
    suffixes = ("128", "64", r"[US](?:8|16)")
    wide, half, narrow = (bool(re.search(rf"\.{x}(\.|$)", instruction)) for x in suffixes)
    return int(wide), int(half), int(not (wide or half or narrow)), int(narrow)


def slots_of_round(kernel: Kernel, target: Accesses) -> int:
    """Fewest instructions of a round of any loop with just these accesses.

    A round is a way through the control-flow graph from a loop's head back to it; an inner loop is
    gone through once.
    """
    following = _control_flow(kernel.code)
    none: Accesses = (0, 0, 0, 0)
    # What is guarded by a predicate is made or not.
    kinds = [
        {accesses(name), none} if guarded else {accesses(name)}
        for _, guarded, name, _ in kernel.code
    ]
    heads = sorted({j for i, after in enumerate(following) for j in after if j <= i})
    counts = [
        count
        for head in heads
        if (count := _shortest_round(following, kinds, head, target)) is not None
    ]
    assert counts, f"{kernel.name}: no loop makes the accesses {target}"
    return min(counts)


def in_loops(kernel: Kernel, pattern: str) -> list[str]:
    """Instructions whose whole name matches and which are gone through more than once.

    Those of a subroutine are if a call of it is.
    """
    following = _control_flow(kernel.code)

    def reached(starts: list[int]) -> set[int]:
        found, left = set(starts), list(starts)
        while left:
            for after in following[left.pop()]:
                if after not in found:
                    found.add(after)
                    left.append(after)
        return found

    def repeats(i: int) -> bool:
        return i in reached(following[i])

    place = {address: i for i, (address, *_) in enumerate(kernel.code)}
    called: set[int] = set()
    for i, (_, _, name, operands) in enumerate(kernel.code):
        if name.startswith("CALL") and repeats(i):
            called |= reached([place[int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)]])
    return [
        name
        for i, (_, _, name, _) in enumerate(kernel.code)
        if re.fullmatch(pattern, name) and (i in called or repeats(i))
    ]


def _control_flow(code: list[tuple[int, bool, str, str]]) -> list[list[int]]:
    """The instructions that may follow each one."""
    place = {address: i for i, (address, *_) in enumerate(code)}
    following: list[list[int]] = []
    for i, (_, conditional, name, operands) in enumerate(code):
        after = [i + 1] if i + 1 < len(code) else []
        if name.startswith("BRA"):
            target = int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)
            # A branch may also be conditional by an operand: BRA P0, ...
            falls = conditional or re.match(r"\s*!?U?P\d", operands) or "DIV" in name
            after = [place[target]] + (after if falls else [])
        elif name.startswith(("EXIT", "RET")) and not conditional:
            after = []
        following.append(after)
    return following


def _shortest_round(
    following: list[list[int]], kinds: list[set[Accesses]], head: int, target: Accesses
) -> int | None:
    """Of one loop."""
    # Depth first from the head: an order in which every way forward goes, but for inner loops.
    order: list[int] = []
    entered = {head}
    stack = [(head, iter(following[head]))]
    while stack:
        node, rest = stack[-1]
        for successor in rest:
            if successor not in entered:
                entered.add(successor)
                stack.append((successor, iter(following[successor])))
                break
        else:
            order.append(node)
            stack.pop()
    rank = {node: i for i, node in enumerate(reversed(order))}
    cheapest: dict[int, dict[Accesses, int]] = defaultdict(dict)
    cheapest[head] = {(0, 0, 0, 0): 0}
    best: int | None = None
    for node in reversed(order):
        reached = {
            (tuple(map(operator.add, made, kind)), cost + 1)
            for made, cost in cheapest.pop(node, {}).items()
            for kind in kinds[node]
        }
        for now, cost in reached:
            if any(map(operator.gt, now, target)):
                continue
            for successor in following[node]:
                if successor == head and now == target:
                    best = cost if best is None else min(best, cost)
                elif rank[successor] > rank[node]:
                    known = cheapest[successor].get(now, cost)
                    cheapest[successor][now] = min(known, cost)
    return best


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
    # Files that nvcc has made are of one architecture, which is part of their names.
    texts, named = [], [file for file in FILES if options[-1][:3] != "sm_" or options[-1] in file]
    for file in named or [str(_C.__file__)]:
        command = [str(tool("cuobjdump")), *options, file]
        texts.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return "\n".join(texts)


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
        kernel = found[readable(mangled)]
        kernel.code = [
            (int(address, 16), bool(guard), name, operands)
            for address, guard, name, operands in INSTRUCTION.findall(body)
        ]
        kernel.instructions = Counter(name for _, _, name, _ in kernel.code)
    return found


def table() -> str:
    """Registers a thread, and 128-bit loads and stores, of every kernel on every architecture.

    But for those on float64 arithmetic, of which the page says only the most.
    """
    archs = architectures()
    all_kernels = {arch: kernels(arch) for arch in archs}
    lines = ["| kernel | " + " | ".join(f"{a}: registers, loads, stores" for a in archs) + " |"]
    lines.append("|---" * (len(archs) + 1) + "|")
    for name in sorted(all_kernels[archs[0]]):
        if "<double" in name:
            continue
        cells = []
        for arch in archs:
            k = all_kernels[arch][name]
            cells.append(f"{k.registers}, {k.wide_loads}, {k.wide_stores}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*")
    FILES += parser.parse_args().files
    print((not FILES and why_not()) or table())
