"""Image data sets as tensors in memory: a folder of .npz files, torchvision, or digits.

Three sources, one interface:

- the folder named by the environment variable ``FUSE_EXT_DATA``, with ``mnist.npz`` and so on
  (arrays ``x_train``, ``y_train``, ``x_test``, ``y_test`` of uint8), which may hold part of a
  set: the note of a :class:`Dataset` then says how much;
- torchvision, which downloads into a folder of your choice;
- scikit-learn's handwritten digits, which need neither.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Training and test images of the complete sets.
SIZES = {
    "mnist": (60_000, 10_000),
    "kmnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "usps": (7_291, 2_007),
    "cifar10": (50_000, 10_000),
    "digits": (1_437, 360),
}
TITLES = {
    "mnist": "MNIST",
    "kmnist": "KMNIST",
    "fashion_mnist": "FashionMNIST",
    "usps": "USPS",
    "cifar10": "CIFAR-10",
    "digits": "digits",
}
FOLDER = "FUSE_EXT_DATA"
# Decompressing takes seconds; every process after the first one reads what is here.
CACHE = Path(__file__).parents[2] / "build" / "data"
KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Dataset:
    """Images and labels.

    Attributes:
        name: A key of ``SIZES``.
        x: Training images, float32 in [0, 1], (n, channels, height, width).
        y: Their labels, int64, (n,).
        x_test: Test images, as ``x``.
        y_test: Their labels.
        note: How many images, of how many.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    note: str

    def first(self, n: int) -> Dataset:
        """The first ``n`` training and test images."""
        parts = (self.x[:n], self.y[:n], self.x_test[:n], self.y_test[:n])
        return Dataset(self.name, *parts, _note(self.name, len(parts[0]), len(parts[2])))

    def held_out(self, share: float = 0.1) -> Dataset:
        """A share of the training images, drawn at random but always the same, as test images."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0))
        test, train = order.tensor_split([round(share * len(order))])
        parts = (self.x[train], self.y[train], self.x[test], self.y[test])
        note = f"{self.note}, {len(test):,} of the training images held out for testing"
        return Dataset(self.name, *parts, note)


@lru_cache(maxsize=2)
def load(name: str, root: str | None = None) -> Dataset:
    """The data set of this name, kept for the process's next call.

    Args:
        name: A key of ``SIZES``.
        root: Folder for torchvision's downloads; None for the .npz file in ``FUSE_EXT_DATA``.

    Raises:
        ValueError: No such set.
        RuntimeError: There is no such file, or no torchvision.
    """
    if name not in SIZES:
        raise ValueError(f"name must be one of {sorted(SIZES)}, got {name!r}")
    if name == "digits":
        arrays = _digits()
    else:
        arrays = _from_folder(name) if root is None else _torchvision(name, root)
    x, x_test = (_images(arrays[key]) for key in ("x_train", "x_test"))
    y, y_test = (torch.from_numpy(arrays[key].astype(np.int64)) for key in ("y_train", "y_test"))
    return Dataset(name, x, y, x_test, y_test, _note(name, len(x), len(x_test)))


def _note(name: str, train: int, test: int) -> str:
    parts = [
        f"{n:,} {kind}" if n == whole else f"{n:,} of the {whole:,} {kind}"
        for n, whole, kind in zip((train, test), SIZES[name], ("training", "test"), strict=True)
    ]
    return f"{TITLES[name]}: {' and '.join(parts)} images"


def _images(array: np.ndarray[Any, Any]) -> Tensor:
    """(n, height, width[, channels]) bytes as (n, channels, height, width) in [0, 1]."""
    x = torch.from_numpy(array)
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return x.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _from_folder(name: str) -> dict[str, np.ndarray[Any, Any]]:
    folder = os.environ.get(FOLDER)
    if folder is None:
        raise RuntimeError(
            f"no data set {name!r}: set {FOLDER} to a folder with {name}.npz, or give --data-root "
            "DIR to have torchvision download it there"
        )
    source = Path(folder) / f"{name}.npz"
    if not source.is_file():
        raise RuntimeError(f"no data set {name!r}: {FOLDER}={folder} has no {source.name}")
    return _cached(source)


def _cached(source: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a compressed file, by way of an uncompressed copy."""
    stat = source.stat()
    copy = CACHE / f"{source.stem}-{stat.st_size}-{stat.st_mtime_ns}.npz"
    if not copy.is_file():
        with np.load(source) as file:
            arrays = {key: file[key] for key in KEYS}
        CACHE.mkdir(parents=True, exist_ok=True)
        # Another process may be at it too: whoever is last replaces the whole file.
        partial = copy.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **arrays)
        partial.replace(copy)
    with np.load(copy) as file:
        return {key: file[key] for key in KEYS}


def _torchvision(name: str, root: str) -> dict[str, np.ndarray[Any, Any]]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise RuntimeError(
            f"--data-root {root} needs torchvision (pip install torchvision); without it, set "
            f"{FOLDER} to a folder of .npz files"
        ) from error
    classes = {
        "mnist": datasets.MNIST,
        "kmnist": datasets.KMNIST,
        "fashion_mnist": datasets.FashionMNIST,
        "usps": datasets.USPS,
        "cifar10": datasets.CIFAR10,
    }
    arrays = {}
    for part in ("train", "test"):
        images = classes[name](root, train=part == "train", download=True)
        arrays[f"x_{part}"] = np.asarray(images.data)
        arrays[f"y_{part}"] = np.asarray(images.targets)
    return arrays


def _digits() -> dict[str, np.ndarray[Any, Any]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    n = SIZES["digits"][0]
    # The file is in no order of classes, and its last images are of other writers.
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:n], order[n:]
    y = data.target.astype(np.uint8)
    return {
        "x_train": images[train],
        "y_train": y[train],
        "x_test": images[test],
        "y_test": y[test],
    }
