"""FusePV inside PINA, through its solver and trainer."""

from __future__ import annotations

import pytest

pytestmark = [
    # Lightning 2.6 on a torch that has renamed what it uses.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    # PINA's solvers have a validation step, and this problem no data for it.
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def test_poisson(example) -> None:
    module = example("pina_poisson", "pina", "lightning")
    error, optimizer = module.train(steps=115)
    report = optimizer.report()
    assert report.switch_step == 100 and report.curvature == "dense"
    assert report.lbfgs_iterations == 15
    assert error < 0.5
