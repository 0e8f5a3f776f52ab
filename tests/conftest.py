"""What holds for every test: fixed seeds, one thread, reproducible hypothesis examples."""

from __future__ import annotations

import random

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile(
    "project",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("project")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names dtypes in the tests' ids."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Tests run in any order and in parallel; each starts from here."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
