"""The networks of the authors' published code (repository zahid-isu/fuse), for images of any size.

Not those of :mod:`benchmarks.harness.networks`, which stand for what the paper says of its own. A
log-softmax that their MLP puts before the cross-entropy changes nothing there and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

SMALLEST_FOR_CNN = 16  # pixels a side: two unpadded 5 x 5 convolutions, each pooled, leave one
WIDTHS = (64, 32, 16)  # of their DenseNet: twice the growth rate of 32, then half of it, twice


def build(name: str, shape: Sequence[int], classes: int = 10) -> nn.Module:
    """A network by name, initialised by torch's generator.

    Args:
        name: "logistic", "mlp", "cnn" or "densenet".
        shape: Channels, height and width of an image; 16 x 16 or more for the CNN.
        classes: Outputs.

    Raises:
        ValueError: No such network, or the images are too small for it.
    """
    channels, height, width = shape
    if name == "logistic":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * height * width, classes),
            # The cross-entropy takes its values in (0, 1) for scores.
            nn.Sigmoid(),
        )
    if name == "mlp":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * height * width, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, classes),
        )
    if name == "cnn":
        return _cnn(channels, height, width, classes)
    if name == "densenet":
        return _densenet(channels, classes)
    raise ValueError(f"name must be 'logistic', 'mlp', 'cnn' or 'densenet', got {name!r}")


def _cnn(channels: int, height: int, width: int, classes: int) -> nn.Module:
    if min(height, width) < SMALLEST_FOR_CNN:
        raise ValueError(
            f"shape must have {SMALLEST_FOR_CNN} x {SMALLEST_FOR_CNN} pixels or more for 'cnn', "
            f"got {height} x {width}"
        )
    left = [((side - 4) // 2 - 4) // 2 for side in (height, width)]
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * left[0] * left[1], 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def _densenet(channels: int, classes: int) -> nn.Module:
    """A depth of 5 leaves their dense blocks without a layer: the rest is a plain network."""
    first, second, third = WIDTHS
    model = nn.Sequential(
        nn.Conv2d(channels, first, 3, padding=1, bias=False),
        *_transition(first, second),
        *_transition(second, third),
        nn.BatchNorm2d(third),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(third, classes),
    )
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def _transition(before: int, after: int) -> list[nn.Module]:
    return [
        nn.BatchNorm2d(before),
        nn.ReLU(),
        nn.Conv2d(before, after, 1, bias=False),
        nn.AvgPool2d(2),
    ]
