"""Lightning: automatic optimization, the phase in the progress bar, and the report ends the fit.

On minibatches FusePV needs nothing. On the full batch Lightning hands ``step`` the closure, which
is called again at trials: leave ``accumulate_grad_batches`` at 1, and sum over parts in
``training_step``.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fuse_ext import FusePV, unwrap


class StopWhenConverged(Callback):
    """Ends ``trainer.fit`` where FusePV has nothing left to gain."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """After every step."""
        if unwrap(trainer.optimizers[0]).report().converged:
            trainer.should_stop = True


class MeanOfWeights(Callback):
    """Validates, and leaves when it ends, with the mean of the last weights; trains without it.

    Checkpoints that are written after a validation hold it as the model, and what steps go on from
    in the optimizer's state.
    """

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Puts it in place."""
        for optimizer in trainer.optimizers:
            unwrap(optimizer).eval()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Takes it back."""
        for optimizer in trainer.optimizers:
            unwrap(optimizer).train()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """As before a validation."""
        self.on_validation_start(trainer, module)


class PhaseBar(TQDMProgressBar):
    """Shows which phase is stepping."""

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """What the bar shows."""
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return {**metrics, "phase": unwrap(trainer.optimizers[0]).phase}


class Regression(pl.LightningModule):
    """A network on a regression; ``options`` go to FusePV.

    Args:
        parts: Sum the loss over so many parts of the batch, in one call of the closure.
        options: Of FusePV.
    """

    def __init__(self, parts: int = 1, **options: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        self.parts, self.options = parts, options
        self.calls = 0

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss."""
        self.calls += 1
        x, y = batch
        pairs = zip(x.chunk(self.parts), y.chunk(self.parts), strict=True)
        squares = sum((self.net(part) - target).square().sum() for part, target in pairs)
        loss = squares / y.numel()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> FusePV:
        """FusePV, in place of Adam."""
        return FusePV(self.parameters(), lr=1e-2, **self.options)


class Validated(Regression):
    """The same with a validation."""

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """The mean squared error."""
        x, y = batch
        self.log("val_loss", (self.net(x) - y).square().mean(), prog_bar=True)


def data(batch_size: int, rows: int = 128) -> DataLoader:
    """Batches of sin of sums."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator)
    return DataLoader(TensorDataset(x, torch.sin(x.sum(1, keepdim=True))), batch_size)


def trainer(epochs: int, *callbacks: Callback, **options: Any) -> pl.Trainer:
    """One that writes nothing unless told to."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet["enable_progress_bar"] = any(isinstance(one, PhaseBar) for one in callbacks)
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks], **{**quiet, **options}
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    minibatch = Validated()
    trainer(5, PhaseBar(), MeanOfWeights()).fit(minibatch, data(16), data(64, rows=64))
    print(unwrap(minibatch.optimizers()).report(), "\n")
    whole = Regression(parts=4, deterministic=True)
    trainer(500, PhaseBar(), StopWhenConverged()).fit(whole, data(128))
    print(unwrap(whole.optimizers()).report())
