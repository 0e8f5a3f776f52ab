"""FusePV prepared by Accelerate."""

from __future__ import annotations

import torch

from fuse_ext import Log, unwrap


def test_a_loop_and_what_the_wrapper_hides(example) -> None:
    module = example("accelerate_loop", "accelerate")
    loss, wrapped = module.train(epochs=15)
    assert loss < 0.2
    assert type(wrapped).__name__ == "AcceleratedOptimizer" and not hasattr(wrapped, "report")
    optimizer = unwrap(wrapped)
    report = optimizer.report()
    assert optimizer.phase == report.phase == "lbfgs" and report.switch_step == 20
    before = [param.detach().clone() for param in optimizer.flat.params]
    wrapped.eval()
    assert not all(map(torch.equal, before, optimizer.flat.params))
    wrapped.train()
    assert all(map(torch.equal, before, optimizer.flat.params))
    log = Log(wrapped)
    optimizer.step()
    assert len(log) == 1


def test_accumulation(example) -> None:
    module = example("accelerate_loop", "accelerate")
    _, wrapped = module.train(epochs=15, gradient_accumulation_steps=4)
    report = unwrap(wrapped).report()
    assert report.adam_steps + report.lbfgs_iterations == 15 * 2
