"""The examples of examples/integrations as modules, with the libraries that they show."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"
# Nothing asks a hub, and DeepXDE neither looks for a backend nor writes down which it found.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DDE_BACKEND", "pytorch")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Loads an example by its name; skips where a library that it needs is missing."""

    def load(name: str, *libraries: str) -> ModuleType:
        with warnings.catch_warnings():  # what libraries say of each other when they are imported
            warnings.simplefilter("ignore")
            for library in libraries:
                pytest.importorskip(
                    library, reason=f"{library} is missing: pip install 'fuse_ext[integrations]'"
                )
            spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(autouse=True)
def _defaults_come_back():
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
