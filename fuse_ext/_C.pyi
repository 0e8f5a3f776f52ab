"""The extension module; csrc/ops.cpp defines it."""

from typing import Any

def build_info() -> dict[str, str | None]:
    """What this binary was built for: version, torch, cuda, cuda_archs, cpu_level."""

def scalar_layout(slots: int) -> dict[str, Any]:
    """Where csrc/two_loop.h keeps each scalar (index) and array (offset, length)."""

def advise_large_pages(address: int, bytes: int) -> bool:
    """Ask the system for large pages under a buffer; False where it takes no advice."""
