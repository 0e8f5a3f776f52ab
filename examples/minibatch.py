"""A training loop to copy: data loaders, a schedule, and checkpoints that know the phase.

    python examples/minibatch.py --epochs 5             Adam, stopped early
    python examples/minibatch.py --epochs 25 --resume   goes on, through the switch

The weights at the end are those of a run that was never stopped.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fuse_ext import AfterEpochs, FusePV, LossPlateau


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "minibatch.pt"

    images, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits))
    # Adam is content with small batches. L-BFGS wants large ones, and several iterations on each.
    loaders = {
        "adam": DataLoader(data, batch_size=64, shuffle=True),
        "lbfgs": DataLoader(data, batch_size=600, shuffle=True),
    }

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = FusePV(
        model.parameters(),
        lr=3e-3,
        weight_decay=1e-3,
        switch=LossPlateau() | AfterEpochs(15, steps_per_epoch=len(loaders["adam"])),
        max_iter=5,
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)

    first = 0
    if args.resume:
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first = saved["epoch"]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for epoch in range(first, args.epochs):
        torch.manual_seed(epoch)  # the order of the images, the same after a restart
        phase = optimizer.phase
        losses = []
        for batch in loaders[phase]:
            x, y = batch
            losses.append(optimizer.step(closure).item())
            if optimizer.phase != phase:  # it has switched: go on with large batches
                break
        if optimizer.phase == "adam":  # a schedule would shorten the steps of L-BFGS too
            scheduler.step()
        print(f"epoch {epoch + 1:2}  {phase:5}  loss {sum(losses) / len(losses):.4f}")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "epoch": epoch + 1,
            },
            checkpoint,
        )
    print(f"\n{optimizer.report()}")


if __name__ == "__main__":
    main()
