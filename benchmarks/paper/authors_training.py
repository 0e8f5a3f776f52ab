"""Training as the authors' published code does it (repository zahid-isu/fuse, read in 2026).

:func:`train` makes one run. It has a loop of its own, beside :mod:`benchmarks.harness.minibatch`,
since so much is different: what is left of an epoch after the last full batch is dropped, batch
normalisation learns its statistics in the first epoch alone, and the first 500 test images are the
test.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from benchmarks.harness import datasets, optimizers
from benchmarks.paper.authors_networks import build

TESTED = 500  # test images, the first of them, by which their code judges
# Their rule for the second phase. A flag for other criteria has no effect: the loss function takes
# its name before it is read.
WARM_EPOCHS, THRESHOLD = 3, 2.0
NETWORK_TITLES = {
    "logistic": "logistic regression",
    "mlp": "MLP",
    "cnn": "CNN",
    "densenet": "DenseNet",
}


@dataclass(frozen=True)
class Problem:
    """A data set and a network for it.

    Attributes:
        dataset: Of :mod:`benchmarks.harness.datasets`.
        network: Of :mod:`benchmarks.paper.authors_networks`.
        batch: Images in a batch.
        epochs: Of a run.
        images: Only the first so many; None for all.
    """

    dataset: str
    network: str
    batch: int = 512
    epochs: int = 100
    images: int | None = None

    @property
    def title(self) -> str:
        """Data set and network, for people."""
        return f"{datasets.TITLES[self.dataset]}, {NETWORK_TITLES[self.network]}"


PROBLEMS = {
    "mnist": Problem("mnist", "logistic"),
    "kmnist": Problem("kmnist", "mlp"),
    "usps": Problem("usps", "cnn"),
    "cifar10": Problem("cifar10", "densenet"),
}


def find_problem(name: str, quick: bool = False) -> Problem:
    """A problem by name; quick: a few hundred of scikit-learn's digits, and six epochs.

    Raises:
        ValueError: No such problem.
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem must be one of {sorted(PROBLEMS)}, got {name!r}")
    found = PROBLEMS[name]
    return replace(found, dataset="digits", batch=32, epochs=6, images=256) if quick else found


def load(spec: Problem, data_root: str | None) -> datasets.Dataset:
    """The problem's images: in [0, 1], but CIFAR-10's in [-1, 1]."""
    data = datasets.load(spec.dataset, data_root)
    data = data if spec.images is None else data.first(spec.images)
    x, x_test = data.x, data.x_test
    if spec.dataset == "cifar10":
        x, x_test = 2 * x - 1, 2 * x_test - 1
    if spec.dataset == "digits" and spec.network == "cnn":  # 8 x 8 is too small for it
        x, x_test = interpolate(x, scale_factor=2.0), interpolate(x_test, scale_factor=2.0)
    return replace(data, x=x, x_test=x_test)


def describe(problem: str, quick: bool = False, data_root: str | None = None) -> dict[str, Any]:
    """A problem in numbers and words: what :func:`train` will be run on."""
    spec = find_problem(problem, quick)
    data = load(spec, data_root)
    model = build(spec.network, data.x.shape[1:])
    return {
        **asdict(spec),
        "title": spec.title,
        "data": data.note,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps_per_epoch": len(data.x) // spec.batch,
    }


# --- their second phase -----------------------------------------------------------------------


class AuthorsFuse:
    """Adam, then ``torch.optim.LBFGS`` anew on each batch, with one history for all of them.

    A batch after the first ``WARM_EPOCHS`` epochs is L-BFGS's if the loss that the batch before has
    left is less than a threshold, and Adam's otherwise. A step of L-BFGS begins with a gradient,
    makes iterations until there have been four or more, and is followed by one more gradient, for
    that loss: so five or more a batch.

    Args:
        params: Of the model.
        lr: Adam's; L-BFGS has torch's default, 1.
        threshold: Of the loss. NaN is not below it.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, threshold: float = THRESHOLD
    ) -> None:
        params = list(params)
        self.adam = torch.optim.Adam(params, lr=lr, fused=True)
        self.lbfgs = torch.optim.LBFGS(
            params, history_size=10, max_eval=4, line_search_fn="strong_wolfe"
        )
        self.threshold, self.epochs, self.loss = threshold, 0, math.inf

    @property
    def phase(self) -> str:
        """Whose the next batch is."""
        warm = self.epochs >= WARM_EPOCHS
        return "lbfgs" if warm and self.loss < self.threshold else "adam"

    def step(self, closure: Callable[[], Tensor]) -> None:
        """A batch."""
        if self.phase == "adam":
            self.loss = self.adam.step(closure).item()
        else:
            self.lbfgs.step(closure)
            self.loss = closure().item()

    def next_epoch(self) -> None:
        """An epoch has ended."""
        self.epochs += 1


def module_of(name: str) -> tuple[str, ...]:
    """Modules that :func:`train` imports by name for an optimizer."""
    return () if name == "authors_fuse" else (optimizers.module_of(name),)


def _make(model: nn.Module, description: dict[str, Any], steps_per_epoch: int) -> Any:
    if description["name"] != "authors_fuse":
        return optimizers.make(model, description, steps_per_epoch)
    options = {key: value for key, value in description.items() if key != "name"}
    return AuthorsFuse(model.parameters(), **options)


# --- training ---------------------------------------------------------------------------------


def batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """The rows of one epoch's full batches after the other's, for good, each in an order drawn."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator)[: n // size * size].split(size)


def train(
    problem: str,
    optimizer: dict[str, Any],
    seed: int,
    *,
    quick: bool = False,
    data_root: str | None = None,
) -> dict[str, Any]:
    """One run.

    Args:
        problem: A key of ``PROBLEMS``.
        optimizer: "name" and what that takes: "authors_fuse" for :class:`AuthorsFuse`, or what
            :func:`benchmarks.harness.optimizers.make` knows.
        seed: Of the start and of the order of the images.
        quick: A few hundred digits in place of the images.
        data_root: As in :func:`benchmarks.harness.datasets.load`.

    Returns:
        Lists with an entry before the first step and one after every epoch: "epoch",
        "train_loss" (over all training images; None if it is not finite), "tested" (accuracy on the
        first ``TESTED`` test images), "test_accuracy" (on all of them), "evaluations" (gradients
        so far, in epochs' worth of the batches used), "cpu_seconds" (of the optimizer's steps,
        closures included) and "second_steps" (batches so far that were a second phase's). Besides:
        "at_equal_evaluations", the same as soon as there had been as many gradients as there are
        batches in all epochs; "epochs"; "switch_epoch", where the second phase began, or None; and
        "optimizer", as above.
    """
    spec = find_problem(problem, quick)
    data = load(spec, data_root)
    torch.manual_seed(seed)
    model = build(spec.network, data.x.shape[1:])
    per_epoch = len(data.x) // spec.batch
    opt = _make(model, optimizer, per_epoch)
    seen, seconds, second, switch_epoch, equal = 0, 0.0, 0, None, None

    def state(epoch: float) -> dict[str, Any]:
        return {
            "epoch": epoch,
            **_worth(model, data),
            "evaluations": seen / (per_epoch * spec.batch),
            "cpu_seconds": seconds,
            "second_steps": second,
        }

    lists = {key: [value] for key, value in state(0).items()}
    model.train()
    rows = batches(len(data.x), spec.batch, seed)
    for step in range(1, spec.epochs * per_epoch + 1):
        batch = next(rows)
        x, y = data.x[batch], data.y[batch]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            nonlocal seen
            seen += len(x)
            model.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        if getattr(opt, "phase", "adam") != "adam":
            second += 1
            switch_epoch = (step - 1) / per_epoch if switch_epoch is None else switch_epoch
        start = time.process_time()
        opt.step(closure)
        seconds += time.process_time() - start
        if equal is None and seen >= spec.epochs * per_epoch * spec.batch:
            equal = state(step / per_epoch)
        if step % per_epoch == 0:
            for key, value in state(step // per_epoch).items():
                lists[key].append(value)
            if isinstance(opt, AuthorsFuse):
                opt.next_epoch()
    return {
        **lists,
        "at_equal_evaluations": equal or state(spec.epochs),
        "epochs": spec.epochs,
        "switch_epoch": switch_epoch,
        "optimizer": optimizer,
    }


@torch.no_grad()
def _worth(model: nn.Module, data: datasets.Dataset) -> dict[str, float | None]:
    """Loss and accuracies; leaves the model in evaluation mode, as their code does."""
    model.eval()
    total = 0.0
    for x, y in zip(data.x.split(2000), data.y.split(2000), strict=True):
        total += cross_entropy(model(x), y, reduction="sum").item()
    found = [model(x).argmax(1) for x in data.x_test.split(2000)]
    right = (torch.cat(found) == data.y_test).double()
    loss = total / len(data.x)
    return {
        "train_loss": loss if math.isfinite(loss) else None,
        "tested": right[:TESTED].mean().item(),
        "test_accuracy": right.mean().item(),
    }
