"""Functions to minimise, each of one vector, with start and least value known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A smooth function of a vector, for any floating dtype.

    Attributes:
        f: The function; a scalar of the vector's dtype.
        x0: Where to start, in float64.
        least: The least value f*.
        solution: Where it is taken, if known.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    x0: Tensor
    least: float = 0.0
    solution: Tensor | None = None

    def __str__(self) -> str:
        return self.name


class Objective:
    """A problem with a parameter of its own, its closure, and a count of the calls."""

    def __init__(
        self, problem: Problem, dtype: torch.dtype = torch.float64, weight_decay: float = 0.0
    ) -> None:
        self.problem = problem
        self.x = problem.x0.to(dtype, copy=True).requires_grad_()
        self.weight_decay = weight_decay
        self.calls = 0
        self.least_seen = math.inf

    def closure(self) -> Tensor:
        self.calls += 1
        self.x.grad = None
        loss = self.problem.f(self.x)
        if self.weight_decay:
            loss = loss + 0.5 * self.weight_decay * self.x.square().sum()
        loss.backward()
        self.least_seen = min(self.least_seen, loss.item())
        return loss

    @property
    def value(self) -> float:
        """f where the parameter stands, in float64."""
        return self.problem.f(self.x.detach().double()).item()

    @property
    def gap(self) -> float:
        """f - f* there."""
        return self.value - self.problem.least


def rosenbrock(n: int) -> Problem:
    """Sum of n / 2 Rosenbrock valleys, from the usual start."""

    def f(x: Tensor) -> Tensor:
        a, b = x[0::2], x[1::2]
        return (100.0 * (b - a.square()).square() + (1.0 - a).square()).sum()

    start = torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(n // 2)
    return Problem(f"rosenbrock-{n}", f, start, 0.0, torch.ones_like(start))


def quadratic(condition: float, n: int = 50, seed: int = 0) -> Problem:
    """(x - x*)^T A (x - x*) / 2 with eigenvalues from 1 to ``condition``, equally spaced in log."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(0.0, math.log10(condition), n, dtype=torch.float64)
    root = eigenvalues.sqrt()[:, None] * basis.T
    solution = torch.randn(n, generator=generator, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        # As a sum of squares: rounding is relative to f, not to |x|^2 condition.
        return 0.5 * (root.to(x.dtype) @ (x - solution.to(x.dtype))).square().sum()

    return Problem(f"quadratic-1e{math.log10(condition):.0f}", f, 0.0 * solution, 0.0, solution)


def logistic(n: int = 20, samples: int = 200, seed: int = 0, decay: float = 1e-3) -> Problem:
    """Logistic regression with an L2 penalty; features of different scale."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    features *= torch.logspace(-1.0, 1.0, n, dtype=torch.float64)
    true = torch.randn(n, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, generator=generator, dtype=torch.float64)
    labels = torch.sign(features @ true + noise)

    def f(x: Tensor) -> Tensor:
        margins = labels.to(x.dtype) * (features.to(x.dtype) @ x)
        return nn.functional.softplus(-margins).mean() + 0.5 * decay * x.square().sum()

    start = torch.zeros(n, dtype=torch.float64)
    solution = _newton(f, start)
    return Problem("logistic", f, start, f(solution).item(), solution)


def classification(name: str, decay: float = 1e-3) -> Problem:
    """Multinomial logistic regression with an L2 penalty on one of scikit-learn's data sets.

    Args:
        name: "breast_cancer" or "wine", standardised, or "digits", divided by 16.
        decay: Of the penalty decay/2 |x|^2.
    """
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    features = torch.as_tensor(data.data, dtype=torch.float64)
    if name == "digits":
        features = features / 16
    else:
        features = (features - features.mean(0)) / features.std(0)
    labels = torch.as_tensor(data.target)
    shape = (features.shape[1], int(labels.max()) + 1)

    def f(x: Tensor) -> Tensor:
        scores = features.to(x.dtype) @ x.view(shape)
        return nn.functional.cross_entropy(scores, labels) + 0.5 * decay * x.square().sum()

    least = {
        "breast_cancer": 0.05357154455050161,
        "digits": 0.26455443911904714,
        "wine": 0.027667525649020277,
    }[name]
    return Problem(f"logistic-{name}", f, torch.zeros(math.prod(shape), dtype=torch.float64), least)


def log_barrier() -> Problem:
    """10 sum a (x - log x) of pytorch#5953: NaN for negative x, least at 1."""

    def f(x: Tensor) -> Tensor:
        a = torch.tensor([1.0, 5.0, 25.0, 125.0], dtype=x.dtype)
        return 10.0 * (a * (x - x.log())).sum()

    one = torch.ones(4, dtype=torch.float64)
    return Problem("log-barrier", f, 3.0 * one, f(one).item(), one)


def nan_wall() -> Problem:
    """Finite at the start only, with a gradient that points away from it."""

    def f(x: Tensor) -> Tensor:
        return x.square().sum() if bool((x == 2.0).all()) else x.sum() * math.nan

    start = torch.full((4,), 2.0, dtype=torch.float64)
    return Problem("nan-wall", f, start, 16.0, start)


def _newton(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    for _ in range(50):
        gradient = torch.autograd.functional.jacobian(f, x)
        hessian = torch.autograd.functional.hessian(f, x)
        x = x - torch.linalg.solve(hessian, gradient)
    return x


# --- Moré, Garbow and Hillstrom -------------------------------------------------------------


Residuals = Callable[[Tensor], Tensor]


def _squares(name: str, x0: list[float], residuals: Residuals, least: float = 0.0) -> Problem:
    """The sum of squares of a list of residuals."""

    def f(x: Tensor) -> Tensor:
        return residuals(x).square().sum()

    return Problem(name, f, torch.tensor(x0, dtype=torch.float64), least)


def _like(values: list[float], x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(x.dtype)


def _range(n: int, x: Tensor) -> Tensor:
    """1, 2, ..., n."""
    return torch.arange(1, n + 1, dtype=x.dtype)


def _freudenstein_roth(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack(
        [-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b],
    )


def _powell_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([1e4 * x[0] * x[1] - 1, (-x).exp().sum() - 1.0001])


def _brown_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def _beale(x: Tensor) -> Tensor:
    return _like([1.5, 2.25, 2.625], x) - x[0] * (1 - x[1] ** _range(3, x))


def _jennrich_sampson(x: Tensor) -> Tensor:
    i = _range(10, x)
    return 2 + 2 * i - (i * x[0]).exp() - (i * x[1]).exp()


def _helical_valley(x: Tensor) -> Tensor:
    a, b, c = x
    # theta = arctan(b / a) / (2 pi), + 1/2 for a < 0: continuous from the start to the solution.
    theta = torch.atan2(b, a) / (2 * math.pi)
    return torch.stack([10 * (c - 10 * theta), 10 * (torch.hypot(a, b) - 1), c])


_BARD = [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]


def _bard(x: Tensor) -> Tensor:
    u = _range(15, x)
    v = 16 - u
    return _like(_BARD, x) - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


_GAUSSIAN = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521]


def _gaussian(x: Tensor) -> Tensor:
    t = (8 - _range(15, x)) / 2
    y = _like([*_GAUSSIAN, 0.3989, *_GAUSSIAN[::-1]], x)
    return x[0] * (-x[1] * (t - x[2]).square() / 2).exp() - y


_MEYER = [34780.0, 28610, 23650, 19630, 16370, 13720, 11540, 9744]
_MEYER += [8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872]


def _meyer(x: Tensor) -> Tensor:
    return x[0] * (x[1] / (45 + 5 * _range(16, x) + x[2])).exp() - _like(_MEYER, x)


def _gulf(x: Tensor) -> Tensor:
    t = _range(99, x) / 100
    y = 25 + (-50 * t.log()) ** (2 / 3)
    return (-((y - x[1]).abs() ** x[2]) / x[0]).exp() - t


def _box(x: Tensor) -> Tensor:
    t = _range(10, x) / 10
    return (-t * x[0]).exp() - (-t * x[1]).exp() - x[2] * ((-t).exp() - (-10 * t).exp())


def _powell_singular(x: Tensor) -> Tensor:
    a, b, c, d = x.view(-1, 4).T
    parts = a + 10 * b, 5**0.5 * (c - d), (b - 2 * c).square(), 10**0.5 * (a - d).square()
    return torch.cat(parts)


def _wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    parts = [10 * (b - a * a), 1 - a, 90**0.5 * (d - c * c), 1 - c]
    return torch.stack([*parts, 10**0.5 * (b + d - 2), 10**-0.5 * (b - d)])


_KOWALIK_Y = [0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627]
_KOWALIK_Y += [0.0456, 0.0342, 0.0323, 0.0235, 0.0246]
_KOWALIK_U = [4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625]


def _kowalik_osborne(x: Tensor) -> Tensor:
    u = _like(_KOWALIK_U, x)
    return _like(_KOWALIK_Y, x) - x[0] * (u * u + u * x[1]) / (u * u + u * x[2] + x[3])


def _brown_dennis(x: Tensor) -> Tensor:
    t = _range(20, x) / 5
    return (x[0] + t * x[1] - t.exp()).square() + (x[2] + x[3] * t.sin() - t.cos()).square()


_OSBORNE_1 = [0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751]
_OSBORNE_1 += [0.718, 0.685, 0.658, 0.628, 0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490]
_OSBORNE_1 += [0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411, 0.406]


def _osborne_1(x: Tensor) -> Tensor:
    t = 10 * (_range(33, x) - 1)
    return _like(_OSBORNE_1, x) - (x[0] + x[1] * (-t * x[3]).exp() + x[2] * (-t * x[4]).exp())


def _biggs_exp6(x: Tensor) -> Tensor:
    t = _range(13, x) / 10
    y = (-t).exp() - 5 * (-10 * t).exp() + 3 * (-4 * t).exp()
    return x[2] * (-t * x[0]).exp() - x[3] * (-t * x[1]).exp() + x[5] * (-t * x[4]).exp() - y


_OSBORNE_2 = [1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746]
_OSBORNE_2 += [0.679, 0.608, 0.655, 0.616, 0.606, 0.602, 0.626, 0.651, 0.724, 0.649, 0.649]
_OSBORNE_2 += [0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423, 0.395]
_OSBORNE_2 += [0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653]
_OSBORNE_2 += [0.672, 0.708, 0.633, 0.668, 0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739]
_OSBORNE_2 += [0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098, 0.054]


def _osborne_2(x: Tensor) -> Tensor:
    t = (_range(65, x) - 1) / 10
    bells = x[1:4, None] * (-x[5:8, None] * (t - x[8:11, None]).square()).exp()
    return _like(_OSBORNE_2, x) - (x[0] * (-t * x[4]).exp() + bells.sum(0))


def _watson(x: Tensor) -> Tensor:
    t = _range(29, x)[:, None] / 29
    j = torch.arange(len(x), dtype=x.dtype)
    u = (t**j) @ x
    derivative = (t ** j[:-1]) @ (j[1:] * x[1:])
    return torch.cat([derivative - u.square() - 1, x[:1], x[1:2] - x[:1].square() - 1])


def _penalty_1(x: Tensor) -> Tensor:
    return torch.cat([1e-5**0.5 * (x - 1), (x @ x - 0.25)[None]])


def _penalty_2(x: Tensor) -> Tensor:
    n, a = len(x), 1e-5**0.5
    i = _range(n, x)
    y = (i[1:] / 10).exp() + (i[:-1] / 10).exp()
    e = (x / 10).exp()
    return torch.cat(
        [
            x[:1] - 0.2,
            a * (e[1:] + e[:-1] - y),
            a * (e[1:] - math.exp(-0.1)),
            ((n - i + 1) @ x.square() - 1)[None],
        ]
    )


def _variably_dimensioned(x: Tensor) -> Tensor:
    weighted = _range(len(x), x) @ (x - 1)
    return torch.cat([x - 1, weighted[None], weighted.square()[None]])


def _trigonometric(x: Tensor) -> Tensor:
    n = len(x)
    return n - x.cos().sum() + _range(n, x) * (1 - x.cos()) - x.sin()


def _brown_almost_linear(x: Tensor) -> Tensor:
    return torch.cat([(x + x.sum() - (len(x) + 1))[:-1], (x.prod() - 1)[None]])


def _discrete_boundary(x: Tensor) -> Tensor:
    h = 1 / (len(x) + 1)
    padded = nn.functional.pad(x, (1, 1))
    t = h * _range(len(x), x)
    return 2 * x - padded[:-2] - padded[2:] + h * h * (x + t + 1) ** 3 / 2


def _discrete_integral(x: Tensor) -> Tensor:
    h = 1 / (len(x) + 1)
    t = h * _range(len(x), x)
    cube = (x + t + 1) ** 3
    below, above = (t * cube).cumsum(0), ((1 - t) * cube).flip(0).cumsum(0).flip(0)
    above = above - (1 - t) * cube
    return x + h * ((1 - t) * below + t * above) / 2


def _broyden_tridiagonal(x: Tensor) -> Tensor:
    padded = nn.functional.pad(x, (1, 1))
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def _broyden_banded(x: Tensor) -> Tensor:
    n = len(x)
    i = torch.arange(n)
    near = (i[:, None] - i <= 5) & (i[:, None] - i >= -1) & (i[:, None] != i)
    return x * (2 + 5 * x * x) + 1 - near.to(x.dtype) @ (x * (1 + x))


def _linear_full_rank(x: Tensor) -> Tensor:
    mean = 2 * x.sum() / 20
    return torch.cat([x - mean - 1, (-mean - 1).expand(20 - len(x))])


def _chebyquad(x: Tensor) -> Tensor:
    n = len(x)
    y = 2 * x - 1
    polynomials = [torch.ones_like(y), y]
    while len(polynomials) <= n:
        polynomials.append(2 * y * polynomials[-1] - polynomials[-2])
    means = torch.stack(polynomials[1:]).mean(1)
    i = _range(n, x)
    return means + torch.where(i % 2 == 0, 1 / (i * i - 1).clamp(min=1), 0 * i)


def more_garbow_hillstrom() -> list[Problem]:
    """The unconstrained problems of the collection, with the starts printed there.

    ``least`` is the minimum that descent from the start leads to, in more digits than printed;
    where that is not the global one, the comment names both.

    J. J. Moré, B. S. Garbow and K. E. Hillstrom, Testing unconstrained optimization software,
    ACM Transactions on Mathematical Software 7(1), 1981, pp. 17-41. The numbers are theirs.
    """
    ten = [i / 11 for i in range(1, 11)]
    boundary = [t * (t - 1) for t in ten]
    return [
        replace(rosenbrock(2), name="rosenbrock"),  # 1
        _squares("freudenstein-roth", [0.5, -2.0], _freudenstein_roth, LEAST[2]),  # or 0 at (5, 4)
        _squares("powell-badly-scaled", [0.0, 1.0], _powell_badly_scaled),  # 3
        _squares("brown-badly-scaled", [1.0, 1.0], _brown_badly_scaled),  # 4
        _squares("beale", [1.0, 1.0], _beale),  # 5
        _squares("jennrich-sampson", [0.3, 0.4], _jennrich_sampson, LEAST[6]),
        _squares("helical-valley", [-1.0, 0.0, 0.0], _helical_valley),  # 7
        _squares("bard", [1.0] * 3, _bard, LEAST[8]),
        _squares("gaussian", [0.4, 1.0, 0.0], _gaussian, LEAST[9]),
        _squares("meyer", [0.02, 4000.0, 250.0], _meyer, LEAST[10]),
        _squares("gulf", [5.0, 2.5, 0.15], _gulf),  # 11
        _squares("box", [0.0, 10.0, 20.0], _box),  # 12
        _squares("powell-singular", [3.0, -1.0, 0.0, 1.0], _powell_singular),  # 13
        _squares("wood", [-3.0, -1.0, -3.0, -1.0], _wood),  # 14
        _squares("kowalik-osborne", [0.25, 0.39, 0.415, 0.39], _kowalik_osborne, LEAST[15]),
        _squares("brown-dennis", [25.0, 5.0, -5.0, -1.0], _brown_dennis, LEAST[16]),
        _squares("osborne-1", [0.5, 1.5, -1.0, 0.01, 0.02], _osborne_1, LEAST[17]),
        _squares("biggs-exp6", [1.0, 2.0, 1.0, 1.0, 1.0, 1.0], _biggs_exp6, LEAST[18]),  # or 0
        _squares(
            "osborne-2",
            [1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5],
            _osborne_2,
            LEAST[19],
        ),
        _squares("watson-6", [0.0] * 6, _watson, LEAST[20]),
        replace(rosenbrock(20), name="extended-rosenbrock-20"),  # 21
        _squares("extended-powell-20", [3.0, -1.0, 0.0, 1.0] * 5, _powell_singular),  # 22
        _squares("penalty-1-10", [float(i) for i in range(1, 11)], _penalty_1, LEAST[23]),
        _squares("penalty-2-10", [0.5] * 10, _penalty_2, LEAST[24]),
        _squares(
            "variably-dimensioned-10", [1 - i / 10 for i in range(1, 11)], _variably_dimensioned
        ),  # 25
        _squares("trigonometric-10", [0.1] * 10, _trigonometric, LEAST[26]),  # or 0
        _squares("brown-almost-linear-10", [0.5] * 10, _brown_almost_linear),  # 27
        _squares("discrete-boundary-10", boundary, _discrete_boundary),  # 28
        _squares("discrete-integral-10", boundary, _discrete_integral),  # 29
        _squares("broyden-tridiagonal-10", [-1.0] * 10, _broyden_tridiagonal),  # 30
        _squares("broyden-banded-10", [-1.0] * 10, _broyden_banded),  # 31
        _squares("linear-full-rank-10", [1.0] * 10, _linear_full_rank, 10.0),  # 32: m - n
        _squares("chebyquad-8", [i / 9 for i in range(1, 9)], _chebyquad, LEAST[35]),
    ]


# Minima by number, from a least-squares solver run to the end; in the paper to six digits.
LEAST = {
    2: 48.98425367924,
    6: 124.3621823556,
    8: 8.214877306578e-3,
    9: 1.127932769619e-8,
    10: 87.94585517016,
    15: 3.075056038492e-4,
    16: 85822.20162635,
    17: 5.464894697482e-5,
    18: 5.655649925e-3,
    19: 4.013773629355e-2,
    20: 2.287670053552e-3,
    23: 7.087651467092e-5,
    24: 2.936605374571e-4,
    26: 2.795056121879e-5,
    35: 3.516873725678e-3,
}


def problem_set() -> list[Problem]:
    """The problems on which L-BFGS is held to its peers, in the tests."""
    return [
        *(rosenbrock(n) for n in (2, 10, 100)),
        *(quadratic(10.0**e) for e in (2, 3, 4, 5, 6)),
        logistic(),
    ]


def large_problem_set() -> list[Problem]:
    """The problems of ``benchmarks.robustness``."""
    return [
        *more_garbow_hillstrom(),
        *(rosenbrock(n) for n in (100, 1000)),
        *(quadratic(10.0**e) for e in (2, 3, 4, 5, 6)),
        logistic(),
        *(classification(name) for name in ("breast_cancer", "wine", "digits")),
    ]
