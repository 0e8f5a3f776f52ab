"""The machine that a figure was measured on, and whether it was busy with other things."""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch

import fuse_ext

_elsewhere = 0.0


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What a figure must stand beside."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "caches": _caches(),
        "memory_GiB": round(_meminfo("MemTotal") / 2**30, 1),
        "large_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled") or "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build_info": fuse_ext.build_info(),
        "mode": "quick" if args.quick else "full",
        "rounds": args.rounds,
    }


def sentence(facts: dict[str, Any]) -> str:
    """The machine in one sentence."""
    caches = ", ".join(f"{name} {size}" for name, size in facts["caches"].items())
    build = facts["build_info"]
    rounds = f", {facts['rounds']} rounds" if facts["rounds"] else ""
    others = facts.get("share_of_others")
    idle = "" if others is None else f"; other processes used {100 * others:.0f}% of the cores"
    if others is not None and others > 0.05:
        idle += ": **not an idle machine, distrust these figures**"
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads; {caches}; "
        f"{facts['memory_GiB']} GiB; {facts['system']}, Python {facts['python']}, torch "
        f"{facts['torch']}, fuse_ext {build['version']} ({build['cpu_level']}); {facts['mode']} "
        f"mode{rounds}{idle}."
    )


def available_memory() -> float:
    """Bytes that can be had without swapping; infinity where the system does not say."""
    return _meminfo("MemAvailable") or math.inf


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _meminfo(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return 1024.0 * int(found[1]) if found else 0.0


def note_cpu(seconds: float) -> None:
    """Adds CPU time of processes of ours that are not our children."""
    global _elsewhere
    _elsewhere += seconds


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_clock() -> tuple[float, float, float]:
    """Now, the CPU seconds that all processes have used, and those of our own."""
    fields = [int(field) for field in _read("/proc/stat").partition("\n")[0].split()[1:9]]
    idle = sum(fields[3:5])
    all_busy = (sum(fields) - idle) / os.sysconf("SC_CLK_TCK") if fields else 0.0
    return time.perf_counter(), all_busy, sum(os.times()[:4]) + _elsewhere


def share_of_others(started: tuple[float, float, float]) -> float | None:
    """What share of the machine others had since then (time stolen by a hypervisor included)."""
    wall, everyone, own = (now - then for now, then in zip(cpu_clock(), started, strict=True))
    if everyone == 0.0 or wall == 0.0:
        return None
    return max(0.0, everyone - own) / (wall * (os.cpu_count() or 1))


def cpu_model() -> str:
    """The processor's name."""
    found = re.search(r"^model name\s*:\s*(.+)", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Size of each cache of the first core, as the system reports it (a hypervisor may lie)."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (_read(str(index / name)) for name in ("type", "level", "size"))
        if kind != "Instruction":
            caches[f"L{level}"] = size.replace("K", " KiB").replace("M", " MiB")
    return caches
