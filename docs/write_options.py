"""Writes docs/options.md from the table of options and the constructors' signatures.

``python docs/write_options.py`` in an environment where fuse_ext is built; a test compares.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from fuse_ext import LBFGS, Adam, Fuse, FusePV
from fuse_ext.optim.options import ADAM_TABLE, FUSE_PV_TABLE, FUSE_TABLE, LBFGS_TABLE, Table

PAGE = Path(__file__).with_name("options.md")
TABLES = {
    FusePV: (FUSE_PV_TABLE, "Algorithm 4: Adam, then L-BFGS."),
    Fuse: (FUSE_TABLE, "Algorithm 3: a blend of both iterates in every step."),
    LBFGS: (LBFGS_TABLE, "Drop-in for `torch.optim.LBFGS`."),
    Adam: (ADAM_TABLE, "Drop-in for `torch.optim.Adam` and `AdamW`."),
}
HEAD = """# Options

What each option may be, what it is if nothing is said, which phase it means something for, and
whether all parameter groups must agree on it. What an option does stands in the docstring of its
optimizer ([API reference](api.md)); which to choose, in [choosing](choosing.md).

This page is written by `docs/write_options.py` from the one table that constructors,
`add_param_group` and `load_state_dict` check by (`fuse_ext/optim/options.py`).
"""


def section(optimizer: type, table: Table, says: str) -> str:
    """The part of the page on one optimizer."""
    given = inspect.signature(optimizer).parameters
    lines = [f"## {optimizer.__name__}", "", says, ""]
    lines += ["| option | takes | default | phase | all groups alike |", "| --- " * 5 + "|"]
    for option in table.options:
        if option.name in given and not option.state:
            default = given[option.name].default
            alike = "yes" if option.name in table.shared else ""
            cells = f"`{option.name}`", option.takes, f"`{default!r}`", option.phases, alike
            lines.append("| " + " | ".join(cells) + " |")
    if table.rules:
        lines += ["", "Together:", "", *(f"- {rule.says}" for rule in table.rules)]
    of_process = [f"`{name}`" for name in table.of_process]
    if of_process:
        lines += ["", f"Not taken over from a checkpoint: {', '.join(of_process)}."]
    state = [f"`{option.name}`" for option in table.options if option.state]
    if state:
        lines += ["", f"Also in each group, as state: {', '.join(state)}."]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    parts = [section(optimizer, *rest) for optimizer, rest in TABLES.items()]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    PAGE.write_text(page())
