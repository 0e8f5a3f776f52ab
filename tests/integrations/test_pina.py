"""FusePV inside PINA, through its solver and trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuse_ext import unwrap

pytestmark = [
    # Lightning 2.6 on a torch that has renamed what it uses.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    # PINA's solvers have a validation step, and this problem no data for it.
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def parameters(trainer) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trainer.solver.parameters()).detach()


def test_the_second_phase_solves_what_adam_does_not(example, monkeypatch) -> None:
    """Every epoch of PINA's trainer is one step, every evaluation one of its training steps."""
    module = example("pina_poisson", "pina", "lightning")
    solver = module.PhysicsInformedSingleModelSolver
    original, calls = solver.training_step, []
    monkeypatch.setattr(
        solver, "training_step", lambda self, *args: calls.append(1) or original(self, *args)
    )
    trainer = module.make(steps=220)
    trainer.train()
    optimizer = unwrap(trainer.optimizers[0])
    report = optimizer.report()
    assert (report.phase, report.curvature, report.switch_step) == ("lbfgs", "dense", 100)
    assert trainer.current_epoch == trainer.global_step == 220
    assert report.adam_steps + report.lbfgs_iterations == 220
    assert report.evaluations == len(calls) < 2 * 220
    assert report.function_changes == 0 and report.fallbacks == 0
    assert float(trainer.logged_metrics["train_loss"]) < 0.01
    error = module.error_of(trainer)
    # Adam for as many evaluations.
    adam = module.make(steps=report.evaluations, switch=report.evaluations + 1)
    adam.train()
    assert unwrap(adam.optimizers[0]).report().phase == "adam"
    assert error < 0.02 < 0.2 < module.error_of(adam)


def test_a_checkpoint_of_the_trainer_goes_on_in_the_second_phase(example, tmp_path: Path) -> None:
    module = example("pina_poisson", "pina", "lightning")
    path = tmp_path / "half.ckpt"
    whole, first, second = (module.make(steps, switch=20) for steps in (50, 35, 50))
    whole.train()
    first.train()
    first.save_checkpoint(path)
    second.train(ckpt_path=path, weights_only=False)
    report = unwrap(second.optimizers[0]).report()
    assert report.phase == "lbfgs" and report.switch_step == 20
    assert (report.adam_steps, report.lbfgs_iterations) == (20, 30)
    # The gradient where it goes on is not in the checkpoint: one evaluation more.
    assert report.evaluations == unwrap(whole.optimizers[0]).report().evaluations + 1
    assert torch.equal(parameters(second), parameters(whole))
    assert not torch.equal(parameters(second), parameters(first))


def test_the_report_ends_the_run(example) -> None:
    module = example("pina_poisson", "pina", "lightning")
    trainer = module.make(steps=60, switch=5, tolerance_grad=1e3)
    trainer.train()
    assert unwrap(trainer.optimizers[0]).report().converged
    assert trainer.current_epoch < 20
