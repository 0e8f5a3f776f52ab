"""Gaussian processes: GPyTorch's likelihood by FusePV, BoTorch's by minimize with bounds."""

from __future__ import annotations

import pytest
import torch


def test_an_exact_gp(example) -> None:
    module = example("gpytorch_fit", "gpytorch", "botorch")
    mll = module.gpytorchs()
    before = module.negative_likelihood(mll)
    report = module.fit(mll, steps=120).report()
    assert report.phase == "lbfgs" and report.loss < before - 0.5
    params = list(mll.parameters())
    loss = module.NegativeLikelihood(mll)()
    grads = torch.autograd.grad(loss, params)
    assert max(g.abs().max() for g in grads) < 1e-4


def test_a_failed_factorisation_is_a_step_too_long(example) -> None:
    module = example("gpytorch_fit", "gpytorch", "botorch")
    mll = module.gpytorchs()
    calls, forward = 0, mll.model.forward

    def fails_at_times(x):
        nonlocal calls
        calls += 1
        if calls in (24, 26):  # after 20 of Adam's and the first L-BFGS start: trials
            raise module.NotPSDError("as a Cholesky factorisation does")
        return forward(x)

    mll.model.forward = fails_at_times
    report = module.fit(mll, steps=60).report()
    assert report.non_finite == 2 and report.phase == "lbfgs"


def test_botorch_with_its_bounds_as_scipy_does_it(example) -> None:
    module = example("gpytorch_fit", "gpytorch", "botorch")
    ours, scipys = module.botorchs(), module.botorchs()
    module.fit_gpytorch_mll(ours, optimizer=module.fit_with_fuse)
    module.fit_gpytorch_mll(scipys)
    expected = module.negative_likelihood(scipys)
    assert module.negative_likelihood(ours) == pytest.approx(expected, abs=1e-5)
