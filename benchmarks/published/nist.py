"""NIST's nonlinear regressions (StRD, https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml).

27 data sets, each with a model, two starts and certified parameters. The data are read from NIST's
own files, NAME.dat, in the folder ``nist`` of the one that the environment variable
``FUSE_EXT_DATA`` names; without them this row is left out.

What is minimised is the sum of squared residuals over that at the start, and the unknowns are
z = b / start, so all begin at 1: the parameters of a model differ by up to 10 orders of magnitude,
which neither Adam's steps nor a first step along the gradient are made for. All methods get this
scaling.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, atan, cos, exp, sin

FOLDER = "FUSE_EXT_DATA"
MOST_DIGITS = 11  # that are certified

Model = Callable[[Tensor, Tensor], Tensor]  # of parameters and predictor


def _rising(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1 - exp(-b[1] * x))


def _decay_over_line(b: Tensor, x: Tensor) -> Tensor:
    return exp(-b[0] * x) / (b[1] + b[2] * x)


def _three_decays(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * exp(-b[1] * x) + b[2] * exp(-b[3] * x) + b[4] * exp(-b[5] * x)


def _two_gaussians(b: Tensor, x: Tensor) -> Tensor:
    first = b[2] * exp(-(((x - b[3]) / b[4]) ** 2))
    return b[0] * exp(-b[1] * x) + first + b[5] * exp(-(((x - b[6]) / b[7]) ** 2))


def _cubic_over_cubic(b: Tensor, x: Tensor) -> Tensor:
    above = b[0] + x * (b[1] + x * (b[2] + x * b[3]))
    return above / (1 + x * (b[4] + x * (b[5] + x * b[6])))


def _seasons(b: Tensor, x: Tensor) -> Tensor:
    """ENSO: a year's cycle and two of unknown length."""
    angles = (2 * math.pi * x / 12, 2 * math.pi * x / b[3], 2 * math.pi * x / b[6])
    waves = zip(angles, ((1, 2), (4, 5), (7, 8)), strict=True)
    return b[0] + sum(b[i] * cos(angle) + b[j] * sin(angle) for angle, (i, j) in waves)


# As NIST prints them, b1 being b[0].
MODELS: dict[str, Model] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": _rising,
    "Chwirut1": _decay_over_line,
    "Chwirut2": _decay_over_line,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "ENSO": _seasons,
    "Eckerle4": lambda b, x: b[0] / b[1] * exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Gauss1": _two_gaussians,
    "Gauss2": _two_gaussians,
    "Gauss3": _two_gaussians,
    "Hahn1": _cubic_over_cubic,
    "Kirby2": lambda b, x: (b[0] + x * (b[1] + x * b[2])) / (1 + x * (b[3] + x * b[4])),
    "Lanczos1": _three_decays,
    "Lanczos2": _three_decays,
    "Lanczos3": _three_decays,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x: b[0] + b[1] * exp(-x * b[3]) + b[2] * exp(-x * b[4]),
    "Misra1a": _rising,
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    # Of log y, on two predictors.
    "Nelson": lambda b, x: b[0] - b[1] * x[0] * exp(-b[2] * x[1]),
    "Rat42": lambda b, x: b[0] / (1 + exp(b[1] - b[2] * x)),
    "Rat43": lambda b, x: b[0] / (1 + exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - atan(b[2] / (x - b[3])) / math.pi,
    "Thurber": _cubic_over_cubic,
}
OF_LOG = {"Nelson"}


class DataSet(NamedTuple):
    """What a file says.

    Attributes:
        starts: (2, parameters).
        certified: (parameters,).
        sum_of_squares: Certified.
        y: Response (of Nelson's its logarithm), (n,).
        x: Predictor, (n,), or several, (k, n).
    """

    starts: Tensor
    certified: Tensor
    sum_of_squares: float
    y: Tensor
    x: Tensor


def folder() -> Path | None:
    """Where the data are, if all 27 files are there."""
    if not (named := os.environ.get(FOLDER)):
        return None
    found = Path(named) / "nist"
    return found if all((found / f"{name}.dat").is_file() for name in MODELS) else None


def read(path: Path) -> DataSet:
    """One of NIST's files.

    Raises:
        ValueError: It is no such file.
    """
    text = path.read_text()
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    rows = re.findall(
        rf"^\s*b\d+\s*=\s*({number})\s+({number})\s+({number})\s+{number}\s*$", text, re.MULTILINE
    )
    squares = re.search(rf"Residual Sum of Squares:\s+({number})", text)
    data = text.rpartition("Data:")[2].splitlines()[1:]
    table = [[float(field) for field in line.split()] for line in data if line.strip()]
    if not (rows and squares and table):
        raise ValueError(f"{path} is none of NIST's files of nonlinear regressions")
    first, second, certified = torch.tensor(
        [[float(field) for field in row] for row in rows], dtype=torch.float64
    ).t()
    columns = torch.tensor(table, dtype=torch.float64).t()
    y = columns[0].log() if path.stem in OF_LOG else columns[0]
    x = columns[1] if len(columns) == 2 else columns[1:]
    return DataSet(torch.stack([first, second]), certified, float(squares[1]), y, x)


def sum_of_squares(name: str, data: DataSet, b: Tensor) -> Tensor:
    """Of the residuals."""
    return (data.y - MODELS[name](b, data.x)).square().sum()


class Regression:
    """One data set from one of its starts.

    Attributes:
        params: z, (parameters,), see the module.
        resample_every: None, the points stay.
    """

    resample_every = None

    def __init__(self, name: str, data: DataSet, start: int) -> None:
        self._name, self._data, self._unit = name, data, data.starts[start - 1]
        if not self._unit.all():
            raise ValueError(f"{name}: a start of 0 is no unit")
        self._at_start = sum_of_squares(name, data, self._unit)
        self.params = [torch.ones_like(self._unit).requires_grad_()]

    def evaluate(self) -> Tensor:
        """The loss, see the module; its gradient is in ``params``."""
        self.params[0].grad = None
        loss = sum_of_squares(self._name, self._data, self._unit * self.params[0]) / self._at_start
        loss.backward()
        return loss.detach()

    def error(self, params: Sequence[Tensor]) -> float:
        """The largest relative error of a parameter; 10 to minus the digits that all have right."""
        b = self._unit * params[0].detach()
        off = ((b - self._data.certified) / self._data.certified).abs().max()
        return max(float(off), 10.0**-MOST_DIGITS)

    def resample(self) -> None:
        """Does nothing."""


def build(seed: int, name: str) -> Regression:
    """A data set from start 1 or 2, the seed.

    Raises:
        FileNotFoundError: The data are not there.
    """
    where = folder()
    if where is None:
        raise FileNotFoundError(f"{FOLDER} names no folder with nist/{name}.dat and the others")
    return Regression(name, read(where / f"{name}.dat"), seed)
