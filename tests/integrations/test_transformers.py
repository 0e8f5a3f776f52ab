"""FusePV under transformers.Trainer, on a model that is initialised at random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuse_ext import FusePV, unwrap

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator.*")


def test_training_and_going_on_from_a_checkpoint(example, tmp_path: Path) -> None:
    module = example("transformers_trainer", "transformers", "accelerate")
    saves = {"save_strategy": "steps", "save_steps": 15, "save_only_model": False}
    trainer = module.make(str(tmp_path), 30, **saves)
    first = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    report = unwrap(trainer.optimizer).report()
    assert report.switch_step == 20 and report.curvature == "kronecker"
    assert report.lbfgs_iterations == 10
    trained = [param.detach().clone() for param in trainer.model.parameters()]
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 0.8 * first
    # It evaluates, and saves after that, with the mean of the weights; training takes it back.
    assert not all(map(torch.equal, trained, trainer.model.parameters()))
    unwrap(trainer.optimizer).train()
    assert all(map(torch.equal, trained, trainer.model.parameters()))
    again = module.make(str(tmp_path), 30, **saves)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert unwrap(again.optimizer).report() == report
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_promise_that_needs_a_closure_is_refused_at_step_1(example, tmp_path: Path) -> None:
    module = example("transformers_trainer", "transformers", "accelerate")
    trainer = module.make(str(tmp_path), 4)
    trainer.optimizer = FusePV(trainer.model.parameters(), deterministic=True)
    with pytest.raises(ValueError, match="where a trainer passes none, leave the option out"):
        trainer.train()
    assert trainer.state.global_step == 0
