"""The one table of options: constructors, groups and the page in docs/ say the same."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fuse_ext
from fuse_ext.optim.options import (
    ADAM_TABLE,
    FUSE_PV_TABLE,
    FUSE_TABLE,
    LBFGS_TABLE,
    OPTIONS,
    Table,
)

DOCS = Path(__file__).parents[2] / "docs"
TABLES = {"FusePV": FUSE_PV_TABLE, "Fuse": FUSE_TABLE, "LBFGS": LBFGS_TABLE, "Adam": ADAM_TABLE}
# Constructor arguments that are of the optimizer and not of its groups.
NOT_IN_GROUPS = {"params", "switch", "theta", "on_switch", "backend", "process_group"}


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_options", DOCS / "write_options.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(name: str, **options: Any) -> Any:
    return getattr(fuse_ext, name)([torch.zeros(3, requires_grad=True)], **options)


def test_the_page_is_that_of_the_table(writer: ModuleType) -> None:
    assert writer.PAGE.read_text() == writer.page(), "python docs/write_options.py"


@pytest.mark.parametrize(("name", "table"), TABLES.items(), ids=TABLES)
def test_every_argument_is_an_option_and_every_option_is_in_the_groups(
    name: str, table: Table
) -> None:
    arguments = set(inspect.signature(getattr(fuse_ext, name)).parameters) - NOT_IN_GROUPS
    in_table = {option.name for option in table.options}
    assert arguments <= in_table
    group = make(name).param_groups[0]
    assert group.keys() - {"params"} <= in_table
    assert arguments <= group.keys()


@pytest.mark.parametrize(("name", "table"), TABLES.items(), ids=TABLES)
def test_what_is_shared_must_agree(name: str, table: Table) -> None:
    others = {"maximize": True, "max_iter": 3, "history_size": 4, "curvature_tol": 0.5}
    for option in set(others) & set(table.shared):
        optimizer = make(name)
        before = len(optimizer.param_groups)
        with pytest.raises(ValueError, match=f"{option} must be the same in all parameter groups"):
            optimizer.add_param_group(
                {"params": [torch.zeros(2, requires_grad=True)], option: others[option]}
            )
        assert len(optimizer.param_groups) == before


@pytest.mark.parametrize(("name", "table"), TABLES.items(), ids=TABLES)
def test_checks_are_the_same_on_every_way_in(name: str, table: Table) -> None:
    """What the constructor refuses, a new group and a checkpoint are refused as well."""
    given = inspect.signature(getattr(fuse_ext, name)).parameters
    for option in table.options:
        if option.check is None or option.name not in given:
            continue
        wrong = object()
        with pytest.raises((TypeError, ValueError)) as direct:
            make(name, **{option.name: wrong})
        message = str(direct.value).split(", got")[0]
        assert option.name in message
        optimizer = make(name)
        with pytest.raises((TypeError, ValueError)) as added:
            optimizer.add_param_group(
                {"params": [torch.zeros(2, requires_grad=True)], option.name: wrong}
            )
        assert str(added.value).split(", got")[0] == message
        if option.of_process:
            continue
        state = optimizer.state_dict()
        state["param_groups"][0][option.name] = wrong
        with pytest.raises((TypeError, ValueError)) as loaded:
            optimizer.load_state_dict(state)
        assert str(loaded.value).split(", got")[0] == message


def test_options_are_listed_once() -> None:
    used = {option.name for table in TABLES.values() for option in table.options}
    assert used == set(OPTIONS)
