"""The simulated CUDA kernels as fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cuda_sim import library
from ops_cases import BACKENDS

# ThreadSanitizer finds a race whatever the order was, but takes a second for a few launches.
ORDERS = ("shuffled",) if library.VARIANT == "tsan" else library.ORDERS


@pytest.fixture(scope="session")
def simulated() -> library.SimulatedOps:
    return library.SimulatedOps(library.VARIANT)


@pytest.fixture
def cuda(simulated: library.SimulatedOps, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The simulated kernels, as backend "cuda" of the checks in other files."""
    monkeypatch.setitem(BACKENDS, "cuda", simulated)
    simulated.schedule("shuffled", seed=1)
    return simulated


@pytest.fixture(params=ORDERS)
def in_every_order(cuda: library.SimulatedOps, request: pytest.FixtureRequest) -> None:
    cuda.schedule(request.param, seed=2)
