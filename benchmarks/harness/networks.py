"""The four networks of the paper's experiments, and one with dropout, for images of any size.

None has batch normalisation: its running statistics would take in a batch once for every
evaluation that a line search makes on it, and at points that are then discarded. Group
normalisation keeps no statistics, so the loss is the same function at every call on a batch; with
dropout it is not, which is what that network is for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu


def build(name: str, shape: Sequence[int], classes: int = 10) -> nn.Module:
    """A network by name, initialised by torch's generator.

    Args:
        name: "logistic", "mlp", "mlp_dropout", "cnn" or "densenet".
        shape: Channels, height and width of an image.
        classes: Outputs.

    Raises:
        ValueError: No such network.
    """
    channels, height, width = shape
    if name == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))
    if name in ("mlp", "mlp_dropout"):
        hidden = 128
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * height * width, hidden),
            nn.ReLU(),
            *([nn.Dropout(0.5)] if name == "mlp_dropout" else []),
            nn.Linear(hidden, classes),
        )
    if name == "cnn":
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * (height // 4) * (width // 4), classes),
        )
    if name == "densenet":
        return DenseNet(channels, classes)
    known = "'logistic', 'mlp', 'mlp_dropout', 'cnn' or 'densenet'"
    raise ValueError(f"name must be {known}, got {name!r}")


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of all linear layers but the last, which is the output."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [module.weight for module in linear[:-1]]


class DenseNet(nn.Module):
    """A small densely connected network (Huang et al. 2017) of five convolutions.

    A stem of 4 x 4 patches and four layers, each of which sees the outputs of all before it; after
    the second of them the maps are averaged to half their size.

    Args:
        channels: Of the images, of 8 x 8 pixels or more.
        classes: Outputs.
        stem: Maps of the first convolution.
        growth: Maps that each further layer adds.
    """

    def __init__(self, channels: int, classes: int, stem: int = 16, growth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, stem, 4, stride=4)
        widths = [stem + i * growth for i in range(5)]
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in widths)
        self.layers = nn.ModuleList(
            nn.Conv2d(width, growth, 3, padding=1, bias=False) for width in widths[:-1]
        )
        self.pool = nn.AvgPool2d(2)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores, (n, classes), of images (n, channels, height, width)."""
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = torch.cat([x, layer(relu(self.norms[i](x)))], 1)
            if i == 1:
                x = self.pool(x)
        x = relu(self.norms[-1](x))
        return self.classifier(x.mean((2, 3)))
