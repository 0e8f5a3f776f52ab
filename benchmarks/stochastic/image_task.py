"""Images as tasks: as they are, with dropout or noise, or others from half of the run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import datasets, networks
from benchmarks.harness.datasets import Dataset
from benchmarks.harness.minibatch import batches, steps_per_epoch
from benchmarks.stochastic.task import Loss, Task, even_marks

# Steps after a change at which the loss is taken.
AFTER = (0, 10, 30, 100, 300, 1000)
SEEN = 5000  # training images on which the training loss is taken


def steps(options: dict[str, Any]) -> int:
    """Steps of the problem's epochs."""
    return options["epochs"] * steps_per_epoch(len(_load(options).x), options["batch"])


def build(options: dict[str, Any], steps: int, seed: int, held_out: bool) -> Task:
    """The task.

    Args:
        options: "dataset", "network" and "batch"; "images" (the first so many) and "data_root";
            "noise", the share of the training labels drawn anew, before any is held out; and
            "change": from half of the run on, "labels" (permuted), "inputs" (pixels permuted), or
            the name of another data set.
        steps: Of the run.
        seed: Of order and noise.
        held_out: A tenth of the training images takes the place of the test images.
    """
    data = _load(options)
    if "noise" in options:
        data = noisy(data, options["noise"], seed)
    later = changed(data, options) if "change" in options else data
    if held_out:
        data, later = data.held_out(), later.held_out()
    # As many images of both, so that one order does.
    n = min(len(data.x), len(later.x))
    rows = batches(n, seed, lambda: options["batch"])
    half, drawn = steps // 2, 0
    model = networks.build(options["network"], data.x.shape[1:])

    def batch() -> Loss:
        nonlocal drawn
        of = later if drawn >= half else data
        drawn += 1
        _, at = next(rows)
        x, y = of.x[at], of.y[at]
        return lambda model: cross_entropy(model(x), y)

    def judge(step: int) -> dict[str, float]:
        of = later if step >= half else data
        loss, accuracy = _judge(model, of.x_test, of.y_test)
        return {
            "loss": loss,
            "accuracy": accuracy,
            "train_loss": _judge(model, of.x[:SEEN], of.y[:SEEN])[0],
        }

    marks = even_marks(steps)
    note = data.note
    if "change" in options:
        later_marks = {min(half + after, steps) for after in AFTER}
        marks = tuple(sorted({0, half // 2, *later_marks, steps}))
        note += f"; from step {half} on: {later.note}"
        note += "" if n == len(data.x) else f"; the first {n:,} of each"
    return Task(model, batch, judge, marks, note)


def _load(options: dict[str, Any], name: str | None = None) -> Dataset:
    data = datasets.load(name or options["dataset"], options.get("data_root"))
    return data.first(options["images"]) if "images" in options else data


def noisy(data: Dataset, share: float, seed: int) -> Dataset:
    """So large a share of the training labels is drawn anew, among all classes."""
    generator = torch.Generator().manual_seed(seed)
    y = data.y.clone()
    drawn = torch.rand(len(y), generator=generator) < share
    y[drawn] = torch.randint(10, (int(drawn.sum()),), generator=generator)
    note = f"{data.note}, {100 * share:.0f}% of the training labels drawn at random"
    return Dataset(data.name, data.x, y, data.x_test, data.y_test, note)


def changed(data: Dataset, options: dict[str, Any]) -> Dataset:
    """What comes in the second half of the run."""
    change = options["change"]
    generator = torch.Generator().manual_seed(1)
    parts = (data.x, data.y, data.x_test, data.y_test)
    if change == "labels":
        order = torch.randperm(10, generator=generator)
        parts = (data.x, order[data.y], data.x_test, order[data.y_test])
        return Dataset(data.name, *parts, "the labels permuted")
    if change == "inputs":
        order = torch.randperm(data.x[0].numel(), generator=generator)
        x, x_test = (images.flatten(1)[:, order].view_as(images) for images in parts[::2])
        return Dataset(data.name, x, data.y, x_test, data.y_test, "the pixels permuted")
    return _load(options, change)


def _judge(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    loss, correct = 0.0, 0
    for images, labels in zip(x.split(2000), y.split(2000), strict=True):
        found = model(images)
        loss += cross_entropy(found, labels, reduction="sum").item()
        correct += int((found.argmax(1) == labels).sum())
    return loss / len(x), correct / len(x)
