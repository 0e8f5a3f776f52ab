"""FusePV beside SGD, Adam, Adam then SGD and L-BFGS on scikit-learn's handwritten digits.

The network, the starts, and the number of passes over the training images are the same for all:
a closure call on b of the n images counts as b/n of a pass. First-order methods see batches of
64; L-BFGS sees all images at once, and FusePV does as each of its two phases does. Every learning
rate is the best of a grid, found on a start that is not among those reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import STYLES, SWITCH_MARK, Relay, arguments, best, save, table
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fuse_ext import FusePV, LossPlateau

BATCH = 64
DECAY = 1e-3  # the penalty DECAY / 2 |x|^2 is part of the training loss
SGD_GRID = (1e-2, 3e-2, 1e-1, 3e-1)
ADAM_GRID = (1e-3, 3e-3, 1e-2, 3e-2)  # 0.1 is worse, with cosine decay and in FusePV too
TUNING_SEED = 1000
TRAINING_IMAGES = 1437


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 1,437 training and 360 test images of 8 x 8 pixels in [0, 1], and their digits."""
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(
        images / 16, digits, train_size=TRAINING_IMAGES, stratify=digits, random_state=0
    )
    x, x_test = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    y, y_test = (torch.tensor(part) for part in parts[2:])
    return x, y, x_test, y_test


@dataclass
class Run:
    """What one run did; the lists have an entry for about every pass, the first before it.

    Attributes:
        passes: Over the training images so far.
        losses: Over all training images, penalty included.
        accuracies: On the test images, in percent.
        seconds: Of processor time in the optimizer's steps, closures included.
        switch: FusePV's Adam steps, or None.
        reason: Why it switched.
    """

    passes: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    switch: int | None = None
    reason: str = ""

    def passes_to(self, loss: float) -> float | None:
        """Passes until the loss was at most this, or None."""
        points = zip(self.passes, self.losses, strict=True)
        return next((n for n, value in points if value <= loss), None)


class Trainer:
    """Trains the network with one optimizer after the other.

    Args:
        budget: Passes over the training images in every run.
        bar: Advanced by one after every run.
    """

    def __init__(self, budget: int, bar: tqdm) -> None:
        self.budget, self.bar = budget, bar
        self.x, self.y, self.x_test, self.y_test = load()

    def __call__(
        self, name: str, seed: int, make: Callable[[Any], Any], cosine: bool = False
    ) -> Run:
        """One run from the seed's start; ``make`` makes the optimizer from the parameters."""
        self.bar.set_description(f"{name}, seed {seed}")
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        optimizer = make(model.parameters())
        n, seen, run, batches = len(self.x), 0, Run(), self._batches(seed)
        if cosine:
            steps = self.budget * -(-n // BATCH)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        def closure() -> Tensor:
            nonlocal seen
            seen += len(x)
            model.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        self._record(run, model, 0.0)
        while seen < self.budget * n:
            start, before = time.process_time(), seen
            full_batch = getattr(optimizer, "phase", None) == "lbfgs"
            x, y = (self.x, self.y) if full_batch else next(batches)
            optimizer.step(closure)
            if cosine:
                schedule.step()
            run.seconds += time.process_time() - start
            # A line search may end beyond the budget; that point does not count.
            if seen // n > before // n and seen <= self.budget * n:
                self._record(run, model, seen / n)
            if isinstance(optimizer, FusePV) and optimizer.report().converged:
                break
        if isinstance(optimizer, FusePV):
            report = optimizer.report()
            run.switch, run.reason = report.switch_step, report.switch_reason
        self.bar.update()
        return run

    def _batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(self.x), generator=order).split(BATCH):
                yield self.x[rows], self.y[rows]

    @torch.no_grad()
    def _record(self, run: Run, model: nn.Module, passes: float) -> None:
        penalty = DECAY / 2 * sum(p.square().sum() for p in model.parameters())
        run.passes.append(passes)
        run.losses.append((cross_entropy(model(self.x), self.y) + penalty).item())
        correct = model(self.x_test).argmax(1) == self.y_test
        run.accuracies.append(100 * correct.float().mean().item())


def compare(train: Trainer, seeds: range, window: int) -> tuple[dict[str, list[Run]], list[str]]:
    """All runs by method, and every method's learning rates."""

    def sgd(params: Any, lr: float) -> torch.optim.SGD:
        return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=DECAY)

    def adam(params: Any, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(params, lr=lr, weight_decay=DECAY)

    def fuse_pv(params: Any, lr: float) -> FusePV:
        # deterministic: in the L-BFGS phase the closure is the same function at every call.
        switch = LossPlateau(window=window)
        return FusePV(params, lr=lr, weight_decay=DECAY, switch=switch, deterministic=True)

    def adam_then_sgd(params: Any, lr: float, second_lr: float, partner: Run) -> Relay:
        # It leaves Adam where FusePV does, so that the second phases compare.
        middle = train.budget * TRAINING_IMAGES // (2 * BATCH)
        switch = middle if partner.switch is None else partner.switch
        params = list(params)
        return Relay(adam(params, lr), sgd(params, second_lr), switch)

    def lbfgs(params: Any) -> FusePV:
        optimizer = FusePV(params, weight_decay=DECAY, deterministic=True)
        optimizer.switch_now()
        return optimizer

    def tune(name: str, make: Callable[[Any, float], Any], grid: Sequence[float]) -> Any:
        cosine = "cosine" in name
        return best(grid, lambda lr: train(name, TUNING_SEED, lambda p: make(p, lr), cosine))

    lr_sgd, _ = tune("SGD", sgd, SGD_GRID)
    lr_adam, _ = tune("Adam", adam, ADAM_GRID)
    lr_cosine, _ = tune("Adam, cosine decay", adam, ADAM_GRID)
    lr_fuse, run = tune("FusePV", fuse_pv, ADAM_GRID)
    lr_then, _ = tune("Adam then SGD", lambda p, lr: adam_then_sgd(p, lr_fuse, lr, run), SGD_GRID)
    runs: dict[str, list[Run]] = {name: [] for name in STYLES}
    for seed in seeds:
        fused = train("FusePV", seed, lambda p: fuse_pv(p, lr_fuse))
        recipes = {
            "SGD": lambda p: sgd(p, lr_sgd),
            "Adam": lambda p: adam(p, lr_adam),
            "Adam, cosine decay": lambda p: adam(p, lr_cosine),
            "Adam then SGD": lambda p, fused=fused: adam_then_sgd(p, lr_fuse, lr_then, fused),
            "L-BFGS alone": lbfgs,
        }
        for name, make in recipes.items():
            runs[name].append(train(name, seed, make, cosine="cosine" in name))
        runs["FusePV"].append(fused)
    single = [f"{lr:g}" for lr in (lr_sgd, lr_adam, lr_cosine)]
    return runs, [*single, f"{lr_fuse:g}, {lr_then:g}", "1", f"{lr_fuse:g}, 1"]


def summary(runs: dict[str, list[Run]], rates: list[str]) -> str:
    """The table: means and standard deviations over the seeds."""

    def mean_std(values: list[float], digits: int) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"

    rivals = zip(runs["Adam"], runs["Adam, cosine decay"], strict=True)
    targets = [min(a.losses[-1], b.losses[-1]) for a, b in rivals]
    rows = []
    for (name, of), lr in zip(runs.items(), rates, strict=True):
        passes = [run.passes_to(target) for run, target in zip(of, targets, strict=True)]
        hits = [count for count in passes if count is not None]
        rows.append(
            [
                name,
                lr,
                mean_std([run.losses[-1] for run in of], 5),
                mean_std([run.accuracies[-1] for run in of], 1),
                f"{np.mean([run.passes[-1] for run in of]):.0f}",
                f"{np.mean(hits):.0f}" if len(hits) == len(of) else f"{len(hits)} of {len(of)}",
                mean_std([run.seconds for run in of], 1),
            ]
        )
    header = "optimizer", "lr", "train loss", "test accuracy, %", "passes", "to Adam's", "CPU s"
    return table(header, rows)


def draw(runs: dict[str, list[Run]], budget: int) -> plt.Figure:
    """Training loss, the same magnified with its range over the seeds, and test accuracy."""
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.3), layout="constrained")
    at = np.geomspace(1, budget, 400)
    for name, of in runs.items():
        losses = np.array([np.interp(at, run.passes, run.losses) for run in of])
        accuracies = np.array([np.interp(at, run.passes, run.accuracies) for run in of])
        low, high = losses.min(0), losses.max(0)
        axes[1].fill_between(at, low, high, color=STYLES[name]["color"], alpha=0.2, lw=0)
        for ax, values in zip(axes, (losses, losses, accuracies), strict=True):
            ax.plot(at, values.mean(0), label=name, **STYLES[name])
            if name == "FusePV" and all(run.switch is not None for run in of):
                switch = np.mean([run.switch for run in of]) * BATCH / TRAINING_IMAGES
                ax.plot(switch, np.interp(switch, at, values.mean(0)), **SWITCH_MARK)
    finals = [np.mean([run.losses[-1] for run in runs[name]]) for name in ("FusePV", "Adam")]
    low, margin = min(finals), max(finals) - min(finals)
    axes[0].set(yscale="log", xscale="log", title="training loss")
    axes[1].set(title="training loss, magnified", ylim=(low - 0.3 * margin, low + 5.5 * margin))
    axes[2].set(title="test accuracy, %", ylim=(94.5, 98.5))
    axes[0].yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2]))
    axes[0].yaxis.set_minor_locator(NullLocator())
    for axis in (axes[0].xaxis, axes[0].yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for ax in axes:
        ax.set(xlabel="passes over the training images", xlim=(1, budget))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main() -> None:
    args = arguments(__doc__.partition("\n")[0])
    budget, seeds, window = (12, range(2), 20) if args.quick else (200, range(5), 200)
    total = 2 * len(SGD_GRID) + 3 * len(ADAM_GRID) + len(STYLES) * len(seeds)
    with tqdm(total=total, unit="run") as bar:
        runs, rates = compare(Trainer(budget, bar), seeds, window)
    print(f"\nDigits: 64-32-10 tanh network, {budget} passes over {TRAINING_IMAGES} images,")
    print(f"{len(seeds)} seeds; means ± standard deviations.\n")
    print(summary(runs, rates))
    print("\nto Adam's: passes until the loss was at most that of the better Adam in the end")
    print(f"FusePV, seed 0: {runs['FusePV'][0].reason or 'no switch within the budget'}")
    save(draw(runs, budget), args.out / "digits.png")


if __name__ == "__main__":
    main()
