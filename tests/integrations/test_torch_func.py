"""Gradients of torch.func in the closure, and functional_call under minimize."""

from __future__ import annotations


def test_both_ways(example) -> None:
    module = example("torch_func")
    report = module.by_closure(steps=240).report()
    assert report.phase == "lbfgs" and report.loss < 1e-4
    assert report.evaluations < 300  # the gradients are made anew: nothing is added up
    found = module.by_minimize(maxfun=150)
    assert found.fun < 1e-3 and found.nfev <= 150
    assert set(found.x) == {"0.weight", "0.bias", "2.weight", "2.bias"}
