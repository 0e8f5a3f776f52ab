"""Training on minibatches with SGD, Adam, Adam then something else, or FusePV.

:func:`train` makes one run from a seed's start and tells what it was worth after every epoch.
All optimizers with the same seed begin at the same parameters and see the images in the same
order. An epoch is the training set presented once, however often the optimizer evaluates the
gradient on a batch; how often it did is counted beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import datasets, networks, optimizers
from benchmarks.harness.averages import judged
from benchmarks.harness.schedules import Schedule


@dataclass(frozen=True)
class Problem:
    """A data set, a network for it and a budget.

    Attributes:
        dataset: Of :mod:`benchmarks.harness.datasets`.
        network: Of :mod:`benchmarks.harness.networks`.
        batch: Images in a batch.
        epochs: Budget.
        images: Only the first so many; None for all.
    """

    dataset: str
    network: str
    batch: int
    epochs: int
    images: int | None = None

    @property
    def title(self) -> str:
        """Data set and network, for people."""
        return f"{datasets.TITLES[self.dataset]}, {NETWORK_TITLES[self.network]}"


NETWORK_TITLES = {
    "logistic": "logistic regression",
    "mlp": "MLP",
    "cnn": "CNN",
    "densenet": "DenseNet",
}
# The paper prints neither batches nor epochs. These bring SGD and Adam, at the learning rates that
# it does print, nearest to its Table II; it has no figures for FashionMNIST. Those of its authors'
# code are in benchmarks/paper/authors_training.py.
PROBLEMS = {
    "mnist": Problem("mnist", "logistic", 1024, 3),
    "kmnist": Problem("kmnist", "mlp", 64, 16),
    "usps": Problem("usps", "cnn", 512, 7),
    "cifar10": Problem("cifar10", "densenet", 128, 3),
    "fashion_mnist": Problem("fashion_mnist", "mlp", 256, 6),
}


def find_problem(name: str, quick: bool = False) -> Problem:
    """A problem by name; quick: with a few hundred of scikit-learn's digits for its images."""
    if name not in PROBLEMS:
        raise ValueError(f"problem must be one of {sorted(PROBLEMS)}, got {name!r}")
    found = PROBLEMS[name]
    return replace(found, dataset="digits", batch=32, epochs=2, images=320) if quick else found


def load(spec: Problem, data_root: str | None) -> datasets.Dataset:
    """The problem's images."""
    data = datasets.load(spec.dataset, data_root)
    return data if spec.images is None else data.first(spec.images)


def describe(problem: str, quick: bool = False, data_root: str | None = None) -> dict[str, Any]:
    """A problem in numbers and words: what :func:`train` will be run on."""
    spec = find_problem(problem, quick)
    data = load(spec, data_root)
    model = networks.build(spec.network, data.x.shape[1:])
    return {
        **asdict(spec),
        "title": spec.title,
        "data": data.note,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps_per_epoch": steps_per_epoch(len(data.x), spec.batch),
    }


# --- training ---------------------------------------------------------------------------------


def batches(n: int, seed: int, size: Callable[[], int]) -> Iterator[tuple[float, Tensor]]:
    """Rows of one batch after the other, for good; an epoch is cut into equal batches.

    Args:
        n: Training images.
        seed: Of the order, which does not depend on the sizes.
        size: Asked before every batch. What is left of the epoch is divided into batches as near
            to it as can be, so that no small one remains at the end.

    Yields:
        The epochs presented with this batch, and its rows.
    """
    generator = torch.Generator().manual_seed(seed)
    epoch = 0
    while True:
        order, at = torch.randperm(n, generator=generator), 0
        while at < n:
            left = n - at
            take = math.ceil(left / max(1, round(left / size())))
            rows = order[at : at + take]
            at += take
            yield epoch + at / n, rows
        epoch += 1


def steps_per_epoch(n: int, batch: int) -> int:
    """Batches of about this size in an epoch."""
    return max(1, round(n / batch))


def train(
    problem: str,
    optimizer: dict[str, Any],
    seed: int,
    epochs: int | None = None,
    *,
    quick: bool = False,
    until: dict[str, float] | None = None,
    held_out: bool = False,
    data_root: str | None = None,
) -> dict[str, Any]:
    """One run.

    Args:
        problem: A key of ``PROBLEMS``.
        optimizer: "name" and what that takes, as :func:`benchmarks.harness.rivals.build` and
            :func:`benchmarks.harness.ours.build` read it. Besides: "batch" replaces the problem's
            for this run, "batch_factor" makes it that many times larger in the L-BFGS phase, and
            "schedule" is one of :mod:`benchmarks.harness.schedules` over the budget (not of those
            that relay).
        seed: Of the start and of the order of the images.
        epochs: None for the problem's.
        quick: A few hundred digits in place of the images.
        until: Goes on after ``epochs`` until these are reached too: "evaluations" and
            "cpu_seconds"; what the run was worth when each was is recorded in ``reached``.
        held_out: A tenth of the training images takes the place of the test images: for tuning.
        data_root: As in :func:`benchmarks.harness.datasets.load`.

    Returns:
        Lists with an entry before the first step and one after every epoch: "epoch",
        "train_loss" (over all training images; None if it is not finite), "test_accuracy" (of
        1), "evaluations" (gradients, in epochs' worth: a call on b of n images counts b / n),
        "cpu_seconds" (of the optimizer's steps, closures included) and "steps"; losses and
        accuracies of what the optimizer's ``eval`` puts in place, if it has one. Besides:
        "switch_step", "switch_epoch" and "switch_reason"; "reached"; "report", what FusePV says
        of itself; and the conditions.
    """
    spec = find_problem(problem, quick)
    data = load(spec, data_root)
    data = data.held_out() if held_out else data
    epochs = spec.epochs if epochs is None else epochs
    batch = optimizer.get("batch", spec.batch)
    factor = optimizer.get("batch_factor", 1)
    torch.manual_seed(seed)
    model = networks.build(spec.network, data.x.shape[1:])
    n = len(data.x)
    opt = optimizers.make(model, optimizer, steps_per_epoch(n, batch))

    schedule = None
    if "schedule" in optimizer:
        schedule = Schedule(opt, optimizer["schedule"], epochs * steps_per_epoch(n, batch))
    x, y = data.x[:batch], data.y[:batch]
    warm_up(model, lambda copy: cross_entropy(copy(x), y), optimizer)
    run = _Run(model, opt, data, dict(until or {}))
    second = optimizer["name"] in ("fuse_pv", "adam_torch_lbfgs")

    def size() -> int:
        return batch * factor if second and opt.phase == "lbfgs" else batch

    run.record(0)
    for epoch, rows in batches(n, seed, size):
        x, y = data.x[rows], data.y[rows]
        adam = getattr(opt, "phase", None) == "adam"

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            run.seen += len(x)
            model.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        start = time.process_time()
        if schedule is not None:
            schedule.set(run.steps)
        opt.step(closure)
        run.seconds += time.process_time() - start
        run.steps += 1
        if adam and opt.phase != "adam" and run.switch_step is None:
            run.switch_step, run.switch_epoch = run.steps, epoch
        run.check_budgets(epoch)
        if epoch == int(epoch):
            run.record(int(epoch))
            if hasattr(opt, "next_epoch"):  # FusePV, which this module does not know
                opt.next_epoch()
            if epoch >= epochs and not run.budgets:
                break

    report = asdict(opt.report()) if optimizer["name"] == "fuse_pv" else None
    return {
        "problem": asdict(spec),
        "data": data.note,
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": optimizer,
        "seed": seed,
        "epochs": epochs,
        **run.lists,
        "reached": run.reached,
        "switch_step": run.switch_step,
        "switch_epoch": run.switch_epoch,
        "switch_reason": report["switch_reason"] if report else "",
        "report": report,
    }


def warm_up(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], optimizer: dict[str, Any]
) -> None:
    """A step of a copy, so that what a process does once is not counted as the first step's."""
    copy = deepcopy(model)

    def closure() -> Tensor:
        copy.zero_grad()
        found = loss(copy)
        found.backward()
        return found

    optimizers.make(copy, optimizer, 1).step(closure)


class _Run:
    """Counts and records of a run."""

    def __init__(
        self, model: nn.Module, opt: Any, data: datasets.Dataset, budgets: dict[str, float]
    ) -> None:
        self.model, self.opt, self.data, self.budgets = model, opt, data, budgets
        self.seen, self.seconds, self.steps = 0, 0.0, 0
        self.switch_step: int | None = None
        self.switch_epoch: float | None = None
        self.lists: dict[str, list[Any]] = {}
        self.reached: dict[str, dict[str, Any]] = {}

    def _state(self, epoch: float) -> dict[str, Any]:
        with judged(self.opt):
            loss, accuracy = self._loss(), self._accuracy()
        return {
            "epoch": epoch,
            "train_loss": loss if math.isfinite(loss) else None,
            "test_accuracy": accuracy,
            "evaluations": self.seen / len(self.data.x),
            "cpu_seconds": self.seconds,
            "steps": self.steps,
        }

    def record(self, epoch: int) -> None:
        for key, value in self._state(epoch).items():
            self.lists.setdefault(key, []).append(value)

    def check_budgets(self, epoch: float) -> None:
        spent = {"evaluations": self.seen / len(self.data.x), "cpu_seconds": self.seconds}
        # Counted in images, an equal number of evaluations is reached, whatever the rounding.
        over = [key for key, budget in self.budgets.items() if spent[key] >= budget * (1 - 1e-9)]
        for key in over:
            del self.budgets[key]
            self.reached[key] = self._state(epoch)

    @torch.no_grad()
    def _loss(self) -> float:
        total = 0.0
        for x, y in zip(self.data.x.split(2000), self.data.y.split(2000), strict=True):
            total += cross_entropy(self.model(x), y, reduction="sum").item()
        return total / len(self.data.x)

    @torch.no_grad()
    def _accuracy(self) -> float:
        correct = 0
        for x, y in zip(self.data.x_test.split(2000), self.data.y_test.split(2000), strict=True):
            correct += int((self.model(x).argmax(1) == y).sum())
        return correct / len(self.data.x_test)
