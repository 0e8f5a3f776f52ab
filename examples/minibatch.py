"""A training loop to copy: a data loader, validation, and checkpoints that know the phase.

    python examples/minibatch.py --epochs 1             Adam, stopped early
    python examples/minibatch.py --epochs 25 --resume   goes on, through the switch

The weights at the end are those of a run that was never stopped.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fuse_ext
from fuse_ext import FusePV


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
    images, digits = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
    data = TensorDataset(images[:-300], digits[:-300])
    loader = DataLoader(data, batch_size=64, shuffle=True)

    def accuracy() -> float:
        """On the images that are not trained on."""
        with torch.no_grad():
            return (model(images[-300:]).argmax(1) == digits[-300:]).double().mean().item()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    # 20 steps of Adam, then a metric of matrices: a gradient a step all along, as with Adam alone.
    # No schedule, though one may drive it: what that brings in the end eval() brings at any time.
    optimizer = FusePV(model.parameters(), lr=3e-3, weight_decay=1e-3)

    first = 0
    if args.resume:
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]

    for epoch in range(first, args.epochs):
        torch.manual_seed(epoch)  # the order of the images, the same after a restart
        losses = []
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step(loss=loss)
            losses.append(loss.item())
        optimizer.eval()  # the mean of the last weights in their place, to judge and to use
        print(
            f"epoch {epoch + 1:2}  {optimizer.phase:5}  loss {sum(losses) / len(losses):.4f}  "
            f"accuracy {accuracy():.3f}"
        )
        optimizer.train()
        fuse_ext.save(  # torch.save that replaces the file in one piece
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
            },
            checkpoint,
        )
    optimizer.eval()
    torch.save(model.state_dict(), args.out / "minibatch_model.pt")
    print(f"\n{optimizer.report()}")


if __name__ == "__main__":
    main()
