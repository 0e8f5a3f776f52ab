"""FusePV prepared by Accelerate."""

from __future__ import annotations

from fuse_ext import Log, unwrap


def test_a_loop_and_what_the_wrapper_hides(example) -> None:
    module = example("accelerate_loop", "accelerate")
    loss, wrapped = module.train(epochs=15)
    assert loss < 0.2
    assert type(wrapped).__name__ == "AcceleratedOptimizer" and not hasattr(wrapped, "report")
    optimizer = unwrap(wrapped)
    report = optimizer.report()
    assert optimizer.phase == report.phase == "lbfgs" and report.switch_step == 20
    log = Log(wrapped)
    optimizer.step()
    assert len(log) == 1


def test_accumulation(example) -> None:
    module = example("accelerate_loop", "accelerate")
    _, wrapped = module.train(epochs=15, gradient_accumulation_steps=4)
    report = unwrap(wrapped).report()
    assert report.adam_steps + report.lbfgs_iterations == 15 * 2
