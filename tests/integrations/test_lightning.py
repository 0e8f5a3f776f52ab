"""FusePV under Lightning's automatic optimization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuse_ext import Log, unwrap

pytestmark = [
    # Lightning 2.6 on a torch that has renamed what it uses.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
]


@pytest.fixture
def module(example):
    return example("lightning_fit", "lightning")


def fitted(module, epochs, batch_size, *callbacks, parts=1, options=None, trainer=None, ckpt=None):
    """A module that was trained, its optimizer, and the trainer."""
    torch.manual_seed(0)
    model = module.Regression(parts, **(options or {}))
    it = module.trainer(epochs, *callbacks, **(trainer or {}))
    it.fit(model, module.data(batch_size), ckpt_path=ckpt)
    return model, unwrap(it.optimizers[0]), it


def test_minibatches_need_nothing(module) -> None:
    model, optimizer, _ = fitted(module, 8, 16)
    report = optimizer.report()
    assert report.curvature == "kronecker" and report.switch_step == 20
    # One gradient a step, but for the one that found out that these are batches.
    assert report.evaluations == model.calls == 64
    assert report.loss < 0.4


def test_validation_sees_the_mean_and_training_does_not(module, tmp_path: Path) -> None:
    plain, optimizer, _ = fitted(module, 8, 16)
    torch.manual_seed(0)
    model = module.Validated()
    it = module.trainer(8, module.MeanOfWeights(), logger=False)
    it.fit(model, module.data(16), module.data(64, rows=64))
    seen = it.callback_metrics["val_loss"]
    shown = [param.detach().clone() for param in model.parameters()]
    mine = unwrap(it.optimizers[0])
    mine.train()
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    optimizer.eval()
    for ours, theirs, own in zip(plain.parameters(), shown, model.parameters(), strict=True):
        assert torch.equal(ours, theirs) and not torch.equal(theirs, own)
    x, y = next(iter(module.data(64, rows=64)))
    with torch.no_grad():
        torch.testing.assert_close(seen, (plain.net(x) - y).square().mean())


# Lightning itself refuses clipping with bf16-mixed, as for torch's fused optimizers.
@pytest.mark.parametrize(("precision", "clip"), [("32-true", 0.5), ("bf16-mixed", None)])
def test_clipping_accumulation_and_bf16_on_minibatches(module, precision, clip) -> None:
    options = {"gradient_clip_val": clip, "accumulate_grad_batches": 2, "precision": precision}
    model, optimizer, _ = fitted(module, 16, 16, trainer=options)
    report = optimizer.report()
    assert report.phase == "lbfgs" and report.non_finite == 0
    assert model.calls == 16 * 8 and report.evaluations == 16 * 4
    assert report.loss < 0.4


def test_the_full_batch_with_parts_in_one_closure(module) -> None:
    model, optimizer, trainer = fitted(
        module, 160, 128, parts=4, options={"deterministic": True, "switch": 20}
    )
    report = optimizer.report()
    assert report.curvature == "dense" and report.loss < 1e-4
    assert report.evaluations == model.calls <= 1.5 * trainer.global_step


def test_accumulation_outside_the_closure_is_refused_under_a_promise(module) -> None:
    with (
        pytest.warns(RuntimeWarning, match="adds to the gradients"),
        pytest.raises(RuntimeError, match="accumulate_grad_batches"),
    ):
        fitted(
            module,
            40,
            32,
            options={"deterministic": True, "switch": 5},
            trainer={"accumulate_grad_batches": 4},
        )


def test_the_report_ends_the_fit(module) -> None:
    options = {"deterministic": True, "switch": 5, "tolerance_grad": 0.05}
    _, optimizer, trainer = fitted(module, 400, 128, module.StopWhenConverged(), options=options)
    assert optimizer.report().converged and trainer.global_step < 200


def test_the_bar_shows_the_phase(module, capsys) -> None:
    seen = []

    class Bar(module.PhaseBar):
        def get_metrics(self, trainer, model):
            seen.append(super().get_metrics(trainer, model)["phase"])
            return super().get_metrics(trainer, model)

    fitted(module, 4, 16, Bar())
    assert seen[0] == "adam" and seen[-1] == "lbfgs"


def test_a_fit_goes_on_across_the_switch(module, tmp_path: Path) -> None:
    """Four epochs of 8 steps and the rest from a checkpoint: before and after step 20."""
    whole, reference, _ = fitted(module, 6, 16)
    for first in (2, 4):
        part, _, trainer = fitted(module, first, 16)
        trainer.save_checkpoint(tmp_path / "fit.ckpt")
        rest, optimizer, _ = fitted(module, 6, 16, ckpt=str(tmp_path / "fit.ckpt"))
        assert optimizer.report() == reference.report()
        for a, b in zip(whole.parameters(), rest.parameters(), strict=True):
            assert torch.equal(a, b)
        assert part.calls + rest.calls == whole.calls


def test_a_log_listens_under_lightning(module) -> None:
    class Logged(module.Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            self.kept = Log(optimizer)
            return optimizer

    model = Logged()
    module.trainer(4).fit(model, module.data(16))
    assert len(model.kept) == 32 and model.kept.switches == [20]
