"""Which tasks: five image problems, what may go wrong with one of them, and a text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.harness import datasets
from benchmarks.harness.minibatch import PROBLEMS
from benchmarks.stochastic import text_task
from benchmarks.stochastic.methods import METHODS, RUN_SCHEDULES

IMAGES, TEXT = "benchmarks.stochastic.image_task", "benchmarks.stochastic.text_task"
PROBLEM_NAMES = ("mnist", "kmnist", "usps", "cifar10", "fashion_mnist")
USUAL = {"betas": [0.9, 0.999], "weight_decay": 0.01}


@dataclass(frozen=True)
class Spec:
    """A task, as the runs are told of it.

    Attributes:
        section: Of the page.
        name: In keys.
        title: For people.
        module: That builds it.
        options: The module's.
        steps: None for the module's.
        measure: What is compared and tuned for: "accuracy" or "loss".
        common: Betas and weight decay of all.
        methods: That take part.
        schedules: Of those that have several.
        seeds: Those reported.
        tuning_seeds: Others.
    """

    section: str
    name: str
    title: str
    module: str
    options: dict[str, Any]
    steps: int | None
    measure: str = "accuracy"
    common: dict[str, Any] = field(default_factory=lambda: dict(USUAL))
    methods: tuple[str, ...] = tuple(METHODS)
    schedules: tuple[str, ...] = RUN_SCHEDULES
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (1000, 1001)


# The same with and without what makes it hard; batches of 4,096 of 30,000 images are few.
ROBUSTNESS_METHODS = ("adamw", "fuse_pv", "control")
ROBUSTNESS: dict[str, tuple[str, dict[str, Any], int]] = {
    "dropout": ("dropout of one half", {"network": "mlp_dropout", "batch": 64}, 1000),
    "noise": ("40% of the labels random", {"noise": 0.4, "batch": 64}, 1000),
    "batch-8": ("batches of 8", {"batch": 8}, 1000),
    "batch-64": ("batches of 64", {"batch": 64}, 1000),
    "batch-512": ("batches of 512", {"batch": 512}, 500),
    "batch-4096": ("batches of 4,096", {"batch": 4096}, 150),
}
QUICK_ROBUSTNESS = ("dropout", "noise", "batch-8")
HARD = PROBLEMS["fashion_mnist"]  # on which they are measured


def images(
    problems: tuple[str, ...], schedules: tuple[str, ...], quick: bool, data_root: str | None
) -> list[Spec]:
    """The problems of Table II, and FashionMNIST."""
    found = []
    for name in problems:
        of = PROBLEMS[name]
        options = {"network": of.network, "batch": of.batch, "epochs": of.epochs}
        options |= {"dataset": of.dataset, "data_root": data_root}
        spec = Spec("schedules", name, of.title, IMAGES, options, None, schedules=schedules)
        found.append(spec)
    return [_in_small(spec) if quick else spec for spec in found]


def robustness(schedules: tuple[str, ...], quick: bool, data_root: str | None) -> list[Spec]:
    """Dropout, noise in the labels, and batches of all sizes; one of the two cosines does."""
    found = []
    if "warmup_cosine" in schedules:
        schedules = tuple(name for name in schedules if name != "cosine")
    for name, (title, changes, steps) in ROBUSTNESS.items():
        options = {"dataset": HARD.dataset, "network": HARD.network, "data_root": data_root}
        spec = Spec("robustness", name, title, IMAGES, {**options, **changes}, steps)
        found.append(replace(spec, methods=ROBUSTNESS_METHODS, schedules=schedules))
    if quick:
        return [_in_small(spec) for spec in found if spec.name in QUICK_ROBUSTNESS]
    return found


def text(schedules: tuple[str, ...], quick: bool, path: str | None) -> list[Spec]:
    """The next byte of a text, with a transformer."""
    options = {"text": path, "digest": text_task.digest(path), "context": 64, "batch": 16}
    options |= {"validation": 512, "model": {"width": 128, "layers": 3, "heads": 4}}
    spec = Spec(
        "text",
        "text",
        "Text, transformer",
        TEXT,
        options,
        1000,
        "loss",
        common={"betas": [0.9, 0.99], "weight_decay": 0.1},
        # A loss over 33,000 bytes says more than an accuracy on some hundred images.
        tuning_seeds=(1000,),
        schedules=schedules,
    )
    if quick:
        small = {"context": 16, "batch": 4, "validation": 8}
        small |= {"model": {"width": 16, "layers": 1, "heads": 2}}
        spec = replace(spec, options={**options, **small}, steps=60, seeds=(0, 1))
    return [spec]


def _in_small(spec: Spec) -> Spec:
    """On a few hundred of scikit-learn's digits."""
    options = {**spec.options, "dataset": "digits", "images": 320, "data_root": None}
    options["batch"] = min(options["batch"], 32)
    title = spec.title.replace(datasets.TITLES[spec.options["dataset"]], datasets.TITLES["digits"])
    return replace(spec, title=title, options=options, steps=60, seeds=(0, 1), tuning_seeds=(1000,))
