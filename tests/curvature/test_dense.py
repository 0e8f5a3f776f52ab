"""The dense inverse Hessian against the textbook, with H and its inverse as float64 matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_cases import (
    F64,
    dense_arguments,
    header_index,
    inverse_hessian,
    new_arguments,
    quadratic,
)
from ops_cases import BACKENDS
from torch import Tensor

from fuse_ext.curvature.dense import terms_apart
from fuse_ext.kernels.reference.dense import broyden_update
from fuse_ext.kernels.scalars import matrix_place

each_backend = pytest.mark.parametrize("backend", BACKENDS)
FORMULAS = {
    "bfgs": {"broyden": False, "self_scaling": False},
    "scaled-bfgs": {"broyden": False, "self_scaling": True},
    "broyden": {"broyden": True, "self_scaling": False},
    "scaled-broyden": {"broyden": True, "self_scaling": True},
}
each_formula = pytest.mark.parametrize("formula", FORMULAS)


def textbook(h: Tensor, s: Tensor, y: Tensor, broyden: bool, self_scaling: bool) -> Tensor:
    """H+ by the update of H by (s, y), as the papers have it, with B the true inverse of H."""
    n, sy, hy = len(s), s @ y, h @ y
    curvature, inverse = s @ torch.linalg.solve(h, s) / sy, y @ hy / sy
    a = curvature * inverse - 1
    rho_plus = torch.clamp(1 / curvature, max=1.0)
    tau = rho_plus if self_scaling else torch.ones((), dtype=F64)
    phi = torch.ones((), dtype=F64)
    if broyden and a > 1e-10:  # else s and Hy are parallel, and the family is one point
        rho_minus = torch.clamp(inverse * (1 - (a / (1 + a)).sqrt()), max=1.0)
        theta = torch.clamp((1 - curvature) / curvature, (rho_minus - 1) / a, 1 / rho_minus)
        sigma = 1 + a * theta
        phi = (1 - theta) / sigma
        root = sigma ** (-1 / max(n - 1, 1))
        if self_scaling and theta <= 0:
            tau = torch.minimum(rho_plus * root, sigma)
        elif self_scaling:
            tau = rho_plus * torch.minimum(root, 1 / theta)
    v = (y @ hy).sqrt() * (s / sy - hy / (y @ hy))
    family = h - torch.outer(hy, hy) / (y @ hy) + phi * torch.outer(v, v)
    return family / tau + torch.outer(s, s) / sy


def call(backend: str, arguments: dict[str, Any], **options: Any) -> None:
    BACKENDS[backend].dense_direction(**{**arguments, **options})


def copy_of(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def products(backend: str, arguments: dict[str, Any]) -> Tensor:
    """H column by column: what -p is for g = e_i."""
    n, columns = arguments["grad"].numel(), []
    for i in range(n):
        trial = copy_of(arguments)
        trial["grad"].zero_()[i] = 1.0
        call(backend, trial, pair_step=None, lr_scale=None)
        columns.append(-trial["direction"].double())
    return torch.stack(columns, 1)


def close(a: Tensor, b: Tensor, atol: float) -> None:
    torch.testing.assert_close(a, b, rtol=0.0, atol=atol)


def number(arguments: dict[str, Any], name: str) -> float:
    return float(arguments["matrix_scalars"][matrix_place(name)])


def told(arguments: dict[str, Any], name: str) -> float:
    return float(arguments["scalars"][header_index(name)])


class Quadratics:
    """Another convex quadratic at another point for each pair."""

    anew = True

    def __init__(self, n: int) -> None:
        self.n = n
        self.start()

    def start(self) -> Tensor:
        self.a = quadratic(self.n, 10 ** float(2 * torch.rand(())))[0]
        self.g = torch.randn(self.n, dtype=F64)
        return self.g

    def gradient(self, s: Tensor) -> Tensor:
        return self.g + self.a @ s


class Nonlinear:
    """One function: a quadratic, and x^4 / 4 of each element."""

    anew = False

    def __init__(self, n: int) -> None:
        self.a, self.x = quadratic(n, 100.0)

    def start(self) -> Tensor:
        return self.gradient(torch.zeros_like(self.x))

    def gradient(self, s: Tensor) -> Tensor:
        self.x = self.x + s
        return self.a @ self.x + self.x**3


@each_backend
@each_formula
@pytest.mark.parametrize("kind", [Quadratics, Nonlinear])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 40])
def test_textbook(n: int, kind: type[Quadratics | Nonlinear], formula: str, backend: str) -> None:
    options = FORMULAS[formula]
    arguments = new_arguments(n, F64, 4, **options)
    function = kind(n)
    g = function.start()
    arguments["grad"].copy_(g)
    call(backend, arguments)
    torch.testing.assert_close(arguments["direction"], -g, rtol=0, atol=0)
    expected, taken_in = torch.eye(n, dtype=F64), 0
    for k in range(60):
        if k and function.anew:
            g = function.start()
            arguments["grad"].copy_(g)
            call(backend, arguments)
        t = 0.1 + float(torch.rand(())) * (1.0 if k else 0.1)
        s = t * arguments["direction"]
        g_after = function.gradient(s)
        y, g = g_after - g, g_after
        if k == 0:
            expected = (s @ y) / (y @ y) * torch.eye(n, dtype=F64)
        expected = textbook(expected, s, y, **options)
        arguments["grad"].copy_(g)
        call(backend, arguments, pair_step=t)
        assert told(arguments, "accepted") == told(arguments, "usable") == k + 1
        taken_in += number(arguments, "terms") == 0.0
        scale = float(expected.abs().max())
        size = scale * float(g.norm())
        close(-arguments["direction"], expected @ g, 1e-5 * size)
        if backend == "native" or k % 7 == 0:
            h = products(backend, arguments)
            close(h, expected, 1e-5 * scale)
            close(h, h.T, 1e-9 * scale)
            close(h @ y, s, 1e-8 * scale * float(y.norm()))  # the secant equation
            assert torch.linalg.eigvalsh((h + h.T) / 2)[0] > 0
    assert taken_in == 15
    assert told(arguments, "skipped") == 0


@each_backend
@pytest.mark.parametrize("n", [2, 7, 12, 40])
def test_ends_on_a_quadratic(n: int, backend: str) -> None:
    """With exact line searches BFGS has the inverse Hessian after n steps."""
    a, x = quadratic(n, 50.0)
    arguments = new_arguments(n, F64, terms_apart(n), **FORMULAS["bfgs"])
    start, t = float((a @ x).norm()), None
    for _ in range(n + 1):
        arguments["grad"].copy_(a @ x)
        call(backend, arguments, pair_step=t)
        p = arguments["direction"]
        t = float(-(p @ a @ x) / (p @ a @ p))
        x = x + t * p
    assert float((a @ x).norm()) < 1e-7 * start
    if n < 40:  # else there was nothing left to learn from in the last ones
        close(inverse_hessian(arguments), torch.linalg.inv(a), 1e-6)


def same_h(after: dict[str, Any], before: dict[str, Any]) -> None:
    assert torch.equal(inverse_hessian(after), inverse_hessian(before))


@each_backend
@pytest.mark.parametrize("held", [0, 2, 3])
@pytest.mark.parametrize("bad", ["negative", "weak", "zero", "nan", "inf"])
def test_refused_pairs(bad: str, held: int, backend: str) -> None:
    arguments = dense_arguments(13, F64, held=held, curvature_tol=1e-3)
    s = 0.5 * arguments["direction"]
    y = {
        "negative": -s,
        "weak": torch.linalg.svd(s[None]).Vh[1] + 1e-4 * s / s.norm(),
        "zero": 0 * s,
        "nan": s * torch.tensor(float("nan")),
        "inf": s * torch.tensor(float("inf")),
    }[bad]
    before = copy_of(arguments)
    arguments["grad"].copy_(arguments["grad_prev"] + y)
    g = arguments["grad"].clone()
    call(backend, arguments)
    assert told(arguments, "skipped") == 1
    assert told(arguments, "accepted") == 0
    assert number(arguments, "pairs") == number(before, "pairs") == told(arguments, "usable")
    same_h(arguments, before)
    if g.isfinite().all():
        close(-arguments["direction"], inverse_hessian(before) @ g, 1e-9)
    # It goes on from a finite gradient as if that one had never been.
    g = torch.randn(13, dtype=F64)
    arguments["grad"].copy_(g)
    call(backend, arguments, pair_step=None)
    close(-arguments["direction"], inverse_hessian(before) @ g, 1e-9)
    s, y = 0.5 * arguments["direction"], 0.2 * arguments["direction"]
    arguments["grad"].copy_(g + y)
    call(backend, arguments)
    assert told(arguments, "accepted") == 1
    close(inverse_hessian(arguments) @ y, s, 1e-9)
    assert told(arguments, "pair_cosine") == pytest.approx(1.0)


@each_backend
@pytest.mark.parametrize("held", [0, 3])
@pytest.mark.parametrize("damage", [-1.0, float("nan")])
def test_begins_anew_where_h_is_not_positive(damage: float, held: int, backend: str) -> None:
    arguments = dense_arguments(11, F64, held=held)
    arguments["matrix_scalars"][matrix_place("scale")] *= damage
    arguments["matrix_scalars"][matrix_place("known")] = 0.0
    s, y = 0.5 * arguments["direction"], arguments["grad"] - arguments["grad_prev"]
    call(backend, arguments)
    first = (s @ y) / (y @ y) * torch.eye(11, dtype=F64)
    expected = textbook(first, s, y, **FORMULAS["scaled-broyden"])
    close(inverse_hessian(arguments), expected, 1e-10)
    close(-arguments["direction"], expected @ arguments["grad"], 1e-10)
    assert number(arguments, "pairs") == number(arguments, "terms") == 1
    assert told(arguments, "gamma") == pytest.approx(float(s @ y / (y @ y)))


@each_backend
def test_a_first_pair_of_rounding(backend: str) -> None:
    """b h of more than 1e16, which leaves no digit of rho-: self-scaled BFGS."""
    for b in (1e14, 1e15, 1e16, 1e17, 1e18, 1e20, 1e30):
        arguments = dense_arguments(9, F64)
        h, s = inverse_hessian(arguments), 0.5 * arguments["direction"]
        y = arguments["grad"] - arguments["grad_prev"]
        arguments["scalars"][header_index("direction_dot_grad")] = -b * float(s @ y) / 0.25
        call(backend, arguments)
        assert told(arguments, "accepted") == 1
        assert inverse_hessian(arguments).isfinite().all()
        # H+ <= (H + v v') / tau + s s' / s.y, with tau >= 1 / (8 b^2)
        assert (
            number(arguments, "scale")
            <= 0.7 * 1.001 / broyden_update(b, float(y @ h @ y / (s @ y)), 9, True, True)[0]
            or b < 1e17
        )


@each_backend
@pytest.mark.parametrize("known", [False, True])
def test_another_direction_is_taken_in_by_bfgs(known: bool, backend: str) -> None:
    """Where p was not -H g, s.B s is not known; H g_prev is made where it is not either."""
    arguments = dense_arguments(21, F64, known=known, exact=False)
    h, shares = inverse_hessian(arguments), 0.5 + torch.rand(21, dtype=F64)
    arguments["direction"].mul_(shares)
    arguments["grad"].copy_(arguments["grad_prev"] + 0.1 * arguments["direction"])
    s, y = 0.5 * arguments["direction"], arguments["grad"] - arguments["grad_prev"]
    call(backend, arguments, lr_scale=shares)
    expected = textbook(h, s, y, **FORMULAS["bfgs"])
    close(inverse_hessian(arguments), expected, 1e-10)
    close(arguments["direction"], -shares * (expected @ arguments["grad"]), 1e-9)
    close(arguments["vectors"][-1, :21], expected @ arguments["grad"], 1e-9)
    assert not number(arguments, "exact")
    # And so the next one, whatever it is told of shares.
    s = 0.5 * arguments["direction"]
    y = 0.3 * s + 0.02 * s.norm() * torch.randn(21, dtype=F64)
    arguments["grad"].add_(y)
    call(backend, arguments, lr_scale=None)
    close(inverse_hessian(arguments), textbook(expected, s, y, **FORMULAS["bfgs"]), 1e-9)
    assert number(arguments, "exact")


@each_backend
def test_a_product_that_is_not_known(backend: str) -> None:
    """It is made of grad_prev, and changes nothing else."""
    arguments = dense_arguments(30, F64)
    other = copy_of(arguments)
    other["matrix_scalars"][matrix_place("known")] = 0.0
    other["vectors"][-1] = float("nan")
    for of in (arguments, other):
        call(backend, of)
    close(inverse_hessian(other), inverse_hessian(arguments), 1e-10)
    close(other["direction"], arguments["direction"], 1e-10)


def test_positive_definite_where_curvature_is_extreme() -> None:
    for b in torch.logspace(-9, 9, 19).tolist():
        for a in torch.logspace(-9, 18, 28, dtype=F64).tolist():
            tau, phi = broyden_update(b, (1 + a) / b, 5, True, True)
            assert 0 < tau <= 1, (a, b)
            assert 1 + phi * a > 0, (a, b)  # H+ is positive definite
