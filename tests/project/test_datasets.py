"""Image data from a folder, from torchvision and from scikit-learn, through one interface."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.harness import datasets


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path, monkeypatch):
    """No set of another test, no file of this checkout."""
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    monkeypatch.delenv(datasets.FOLDER, raising=False)
    datasets.load.cache_clear()
    yield
    datasets.load.cache_clear()


def arrays(n, shape, test=10, seed=0):
    """Images and labels as the files have them."""
    random = np.random.default_rng(seed)
    return {
        "x_train": random.integers(0, 256, (n, *shape), dtype=np.uint8),
        "y_train": random.integers(0, 10, n, dtype=np.uint8),
        "x_test": random.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": random.integers(0, 10, test, dtype=np.uint8),
    }


def test_digits():
    data = datasets.load("digits")
    assert data.x.shape == (1437, 1, 8, 8) and data.x_test.shape == (360, 1, 8, 8)
    assert data.x.dtype == torch.float32 and data.y.dtype == torch.int64
    assert data.x.min() == 0 and data.x.max() == 1
    assert data.y.bincount().min() > 100 and data.y_test.bincount().min() > 20
    assert data.note == "digits: 1,437 training and 360 test images"
    first = data.first(50)
    assert torch.equal(first.x, data.x[:50]) and len(first.y_test) == 50
    assert first.note == "digits: 50 of the 1,437 training and 50 of the 360 test images"


def test_a_folder_of_files(tmp_path, monkeypatch):
    monkeypatch.setenv(datasets.FOLDER, str(tmp_path))
    grey, colour = arrays(30, (28, 28)), arrays(20, (32, 32, 3))
    np.savez_compressed(tmp_path / "kmnist.npz", **grey)
    np.savez_compressed(tmp_path / "cifar10.npz", **colour)
    data = datasets.load("kmnist")
    assert torch.equal(data.x, torch.from_numpy(grey["x_train"]).unsqueeze(1) / 255)
    assert data.y.tolist() == grey["y_train"].tolist()
    assert data.note == "KMNIST: 30 of the 60,000 training and 10 of the 10,000 test images"
    data = datasets.load("cifar10")
    assert data.x.shape == (20, 3, 32, 32) and data.x.is_contiguous()
    assert data.x[7, 2, 3, 4] == np.float32(colour["x_train"][7, 3, 4, 2]) / np.float32(255)


def test_files_are_decompressed_once_and_again_when_they_change(tmp_path, monkeypatch):
    monkeypatch.setenv(datasets.FOLDER, str(tmp_path))
    for seed, n in ((0, 30), (1, 31)):
        np.savez_compressed(tmp_path / "usps.npz", **arrays(n, (16, 16), seed=seed))
        datasets.load.cache_clear()
        assert len(datasets.load("usps").x) == n
        assert len(list(datasets.CACHE.iterdir())) == seed + 1
    datasets.load.cache_clear()
    monkeypatch.setattr(np, "savez", None)  # it is there already
    assert len(datasets.load("usps").x) == 31


def test_errors_name_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"name must be one of .* got 'imagenet'"):
        datasets.load("imagenet")
    with pytest.raises(RuntimeError, match=r"set FUSE_EXT_DATA to a folder with mnist\.npz"):
        datasets.load("mnist")
    monkeypatch.setenv(datasets.FOLDER, str(tmp_path))
    with pytest.raises(RuntimeError, match=r"FUSE_EXT_DATA=.* has no mnist\.npz"):
        datasets.load("mnist")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RuntimeError, match="pip install torchvision"):
        datasets.load("mnist", "somewhere")


def test_torchvision(monkeypatch):
    parts = arrays(12, (28, 28))
    calls = []

    def mnist(root, train, download):
        calls.append((root, train, download))
        name = "train" if train else "test"
        return SimpleNamespace(
            data=torch.from_numpy(parts[f"x_{name}"]), targets=parts[f"y_{name}"].tolist()
        )

    names = ("MNIST", "KMNIST", "FashionMNIST", "USPS", "CIFAR10")
    fake = SimpleNamespace(datasets=SimpleNamespace(**dict.fromkeys(names, mnist)))
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    data = datasets.load("mnist", "root")
    assert calls == [("root", True, True), ("root", False, True)]
    assert torch.equal(data.x, torch.from_numpy(parts["x_train"]).unsqueeze(1) / 255)
    assert data.y.tolist() == parts["y_train"].tolist()


def test_held_out_images_are_training_images():
    data = datasets.load("digits")
    held_out = data.held_out()
    assert (len(held_out.x), len(held_out.x_test)) == (1293, 144)
    assert torch.equal(held_out.x_test, data.held_out().x_test)
    rows = torch.cat([held_out.x, held_out.x_test]).flatten(1).tolist()
    assert sorted(rows) == sorted(data.x.flatten(1).tolist())
    assert held_out.note.endswith("144 of the training images held out for testing")
