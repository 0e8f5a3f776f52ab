"""FusePV inside DeepXDE, through its own API."""

from __future__ import annotations

import numpy as np


def test_poisson_on_fixed_points_and_on_new_ones(example, capsys) -> None:
    module = example("deepxde_poisson", "deepxde")
    error, optimizer = module.train(steps=250)
    report = optimizer.report()
    assert report.phase == "lbfgs" and report.curvature == "dense"
    assert error < 1e-4
    error, optimizer = module.train(steps=160, resample_every=40)
    assert optimizer.report().function_changes == 0  # it was told of each
    assert optimizer.report().evaluations > 160 and error < 1e-2


def test_the_report_ends_the_run(example) -> None:
    module = example("deepxde_poisson", "deepxde")
    model, optimizer = module.make(width=4)
    model.train(iterations=5, display_every=1000, verbose=0)
    optimizer.switch_now()
    optimizer.param_groups[0]["tolerance_grad"] = 1e3  # reached at once
    model.train(
        iterations=50, callbacks=[module.StopWhenConverged()], display_every=1000, verbose=0
    )
    assert optimizer.report().converged
    assert model.train_state.step < 20
    assert np.isfinite(model.train_state.best_loss_train)
