"""The Broyden update on pairs (csrc/broyden_pairs.h) against the textbook's with explicit matrices.

The oracle keeps H as a matrix in float64 and inverts it for B: by the formula in Urban, Stefanou
and Pons (arXiv 2405.04230), with tau, theta and phi from s'Bs and y'Hy at each pair's place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from ops_cases import BACKENDS, CPU, F64
from test_two_loop import Scalars, dense_direction, each_backend, hessian
from torch import Tensor

from fuse_ext.kernels import scalars as ring

Pair = tuple[Tensor, Tensor]
N = 14


def updated(h: Tensor, s: Tensor, y: Tensor, b: float | None, scaling: bool = True) -> Tensor:
    """H after a pair; ``b``: s'Bs / s'y, if it is not to be had from 1 / H."""
    sy, hy = s @ y, h @ y
    b = float(s @ torch.linalg.solve(h, s) / sy) if b is None else b
    yhy = float(y @ hy)
    a = b * yhy / float(sy) - 1
    shrink, tau, phi = min(1.0, 1 / b), 1.0, 1.0
    if a > 1e-10:
        c = math.sqrt(a / (1 + a))
        rho = min(1.0, yhy / float(sy) * (1 - c))
        theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b))
        sigma = 1 + a * theta
        phi = (1 - theta) / sigma
        root = sigma ** (-1 / (N - 1))
        tau = shrink * min(root, 1 / theta) if theta > 0 else min(shrink * root, sigma)
    else:
        tau = shrink
    tau = tau if scaling else 1.0
    v = math.sqrt(yhy) * (s / sy - hy / yhy)
    inner = h - torch.outer(hy, hy) / yhy + phi * torch.outer(v, v)
    return inner / tau + torch.outer(s, s) / sy


def textbook(pairs: list[Pair], scaling: bool = True) -> Tensor:
    """H of these pairs alone, oldest first."""
    h = torch.eye(N, dtype=F64)
    for k, (s, y) in enumerate(pairs):
        if k == 0:
            gamma = s @ y / (y @ y)
            h = gamma * h - gamma * torch.outer(y, y) * gamma / (gamma * (y @ y))
            v = math.sqrt(gamma * (y @ y)) * (s / (s @ y) - y / (y @ y))
            h = h + torch.outer(v, v) + torch.outer(s, s) / (s @ y)
        else:
            h = updated(h, s, y, None, scaling)
    return h


class BroydenScalars(Scalars):
    """A ring in scalars with the Broyden update; directions are real ones, and steps along them."""

    def __init__(self, backend: str, history_size: int, opened: int, scaling: bool = True) -> None:
        super().__init__(backend, history_size, opened)
        self.broyden = ring.new_broyden(self.slots, CPU)
        self.broyden[ring.broyden_index("taking_part", self.slots)] = N
        self.data[ring.index("self_scaling", self.slots)] = scaling
        self.scaled = False
        op = BACKENDS[backend].lbfgs_two_loop
        self._op = lambda *told: op(*told, broyden=self.broyden, scaled=self.scaled)

    def number(self, name: str) -> float:
        return float(self.broyden[ring.broyden_index(name, self.slots)])

    def step(self, a: Tensor, g: Tensor, t: float, shares: Tensor | None = None) -> Pair:
        """The direction at a gradient, and the pair of a step t along it on the quadratic of a."""
        self.scaled = shares is not None
        p = self.direction(g)
        p = p if shares is None else p * shares
        self.data[ring.index("direction_dot_grad", self.slots)] = g @ p
        s, y = t * p, a @ (t * p)
        # What the next pass leaves: the gradient's products are of another one by then.
        assert self.offer(p, y, t)
        return s, y

    def close(self, g: Tensor, expected: Tensor, error: float = 1e-8) -> None:
        self.scaled = False
        p = self.direction(g)
        assert float((p + expected @ g).norm()) <= error * float((expected @ g).norm())


def check_alike(ours: BroydenScalars, theirs: BroydenScalars, error: float = 1e-7) -> None:
    """All numbers but scratch, within rounding of the largest in their array."""
    for name, place in ring.broyden_layout(ours.slots).items():
        if name in ("scratch", "size"):
            continue
        begin, length = (place, 1) if isinstance(place, int) else place
        a, b = (side.broyden[begin : begin + length] for side in (ours, theirs))
        largest = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=error * largest, msg=name)


def go_on(sides: list[BroydenScalars], a: Tensor, grads: Iterator[Tensor]) -> None:
    """The same step for all, and the direction that follows."""
    g, t, after = next(grads), 0.2 + float(torch.rand(())), next(grads)
    for side in sides:
        side.step(a, g, t)
        side.direction(after)


def gradients() -> Iterator[Tensor]:
    while True:
        yield torch.randn(N, dtype=F64)


@each_backend
@pytest.mark.parametrize("history_size", [1, 2, 3, 7])
@pytest.mark.parametrize("scaling", [True, False])
def test_every_ring_index_and_count(backend: str, history_size: int, scaling: bool) -> None:
    a, grads = hessian(N), gradients()
    for opened in range(history_size + 1):
        ours, kept = BroydenScalars(backend, history_size, opened, scaling), list[Pair]()
        expected = torch.eye(N, dtype=F64)
        for _ in range(2 * history_size + 3):
            g = next(grads)
            ours.close(g, expected)
            pair = ours.step(a, g, 0.05 + 2 * float(torch.rand(())))
            kept.append(pair)
            if len(kept) > history_size:  # half are dropped
                kept = kept[max(1, history_size // 2) :]
                expected = textbook(kept, scaling)
            elif len(kept) == 1:
                expected = textbook(kept, scaling)
            else:
                expected = updated(expected, *pair, None, scaling)
            assert ours.header.count == ours.header.usable == len(kept)
            assert ours.number("held") == len(kept)
        assert ours.number("runs") == 1


@each_backend
def test_secant_equation(backend: str) -> None:
    ours, a, grads = BroydenScalars(backend, 5, 2), hessian(N), gradients()
    for _ in range(9):
        s, y = ours.step(a, next(grads), 0.7)
        torch.testing.assert_close(ours.direction(y), -s, rtol=1e-9, atol=1e-9)


@each_backend
@pytest.mark.parametrize("scaling", [True, False])
def test_finite_termination_on_a_quadratic(backend: str, scaling: bool) -> None:
    """With exact steps and room for all pairs the minimum is found in as many as dimensions.

    One more makes up for rounding.
    """
    a, x = hessian(N), torch.randn(N, dtype=F64)
    ours, start = BroydenScalars(backend, N + 1, 3, scaling), float((a @ x).norm())
    for k in range(N + 1):
        left = float((a @ x).norm()) / start
        assert left > 1e-5 if k < N - 1 else k < N or left < 1e-4
        g = a @ x
        p = ours.direction(g)
        ours.data[ring.index("direction_dot_grad", ours.slots)] = g @ p
        t = -float(g @ p) / float(p @ a @ p)
        assert ours.offer(p, a @ p * t, t)
        x = x + t * p
    assert float((a @ x).norm()) < 1e-8 * start


@each_backend
def test_b_is_the_inverse_of_h(backend: str) -> None:
    """The coefficients of v_j give B, and B is 1 / H."""
    ours, a, grads = BroydenScalars(backend, 9, 0), hessian(N), gradients()
    for _ in range(12):
        ours.step(a, next(grads), 0.7)
    ours.direction(next(grads))
    members = ring.broyden_array(ours.broyden, "member", ours.slots).long()
    members = members[: int(ours.number("held"))].tolist()
    scale = ours.array("row_scale")
    s = torch.stack([scale[i] * ours.rows[i][0] for i in members])
    y = torch.stack([ours.rows[i][1] for i in members])
    forms = []
    for name, own, other, identity in (
        ("inverse", s, y, ours.number("initial")),
        ("direct", y, s, 1 / ours.number("initial")),
    ):
        k = len(members)
        of_own, of_other = (
            ring.broyden_array(ours.broyden, f"{name}_{part}", ours.slots)[:k, :k]
            for part in ("own", "other")
        )
        w = torch.tril(of_own) @ own + torch.tril(of_other) @ other
        terms = ring.broyden_array(ours.broyden, f"{name}_terms", ours.slots)[:, :k]
        matrix = identity * torch.eye(N, dtype=F64)
        for j in range(k):
            cross = torch.outer(own[j], w[j])
            matrix = matrix + terms[0, j] * torch.outer(own[j], own[j])
            matrix = (
                matrix + terms[1, j] * (cross + cross.T) + terms[2, j] * torch.outer(w[j], w[j])
            )
        forms.append(ours.number(f"{name}_unit") * matrix)
    h, b = forms
    torch.testing.assert_close(h @ b, torch.eye(N, dtype=F64), rtol=0, atol=1e-8)
    assert float(torch.linalg.eigvalsh((h + h.T) / 2)[0]) > 0


@each_backend
def test_products_of_steps_with_older_rows(backend: str) -> None:
    """s . s_i and s . y_i, which no pass makes, are those of the vectors."""
    ours, a, grads = BroydenScalars(backend, 6, 3), hessian(N), gradients()
    for _ in range(11):
        ours.step(a, next(grads), 0.5)
        ours.direction(next(grads))
        scale, held = ours.array("row_scale"), ring.held_slots(ours.data, ours.slots)
        gram_ss = ring.broyden_array(ours.broyden, "gram_ss", ours.slots)
        gram_sy = ours.array("gram_sy")
        for i in held:
            for j in held:
                s_i, s_j = scale[i] * ours.rows[i][0], scale[j] * ours.rows[j][0]
                size = float(s_i.norm())
                assert float(gram_ss[i, j] - s_i @ s_j) <= 1e-9 * size * float(s_j.norm())
                y_j = ours.rows[j][1]
                assert abs(float(gram_sy[i, j] - s_i @ y_j)) <= 1e-9 * size * float(y_j.norm())


@each_backend
def test_a_scaled_direction_ends_the_run(backend: str) -> None:
    """Of its pair no products are known: BFGS of all pairs, until a run has begun anew."""
    ours, a, grads = BroydenScalars(backend, 6, 1, scaling=False), hessian(N), gradients()
    shares = torch.linspace(0.5, 1, N, dtype=F64)
    kept = [ours.step(a, next(grads), 0.6) for _ in range(3)]
    kept.append(ours.step(a, next(grads), 0.6, shares))
    g = next(grads)
    torch.testing.assert_close(ours.direction(g), dense_direction(kept, g), rtol=1e-8, atol=1e-8)
    assert ours.number("held") == 0
    new = [ours.step(a, next(grads), 0.6) for _ in range(2)]
    ours.close(next(grads), textbook(new, scaling=False))
    assert ours.header.usable == 6


@each_backend
def test_pairs_of_sets(backend: str) -> None:
    """Each set of parameters has runs of its own, which go on where it is the present one again."""
    ours, a, grads = BroydenScalars(backend, 8, 0), hessian(N), gradients()
    kept: dict[int, list[Pair]] = {0: [], 1: []}
    for chosen in (0, 0, 1, 0, 1, 1, 0, 1):
        ours.data[ring.index("set", ours.slots)] = chosen
        kept[chosen].append(ours.step(a, next(grads), 0.6))
        for present in (0, 1):
            ours.data[ring.index("set", ours.slots)] = present
            ours.close(next(grads), textbook(kept[present]))


@each_backend
def test_what_is_set_aside_comes_back(backend: str) -> None:
    ours, a, grads = BroydenScalars(backend, 6, 4), hessian(N), gradients()
    kept = [ours.step(a, next(grads), 0.6) for _ in range(4)]
    names = "count", "gamma", "usable"
    before = {name: float(ours.data[ring.index(name, ours.slots)]) for name in names}
    for name in names:
        ours.data[ring.index(name, ours.slots)] = 0.0
    ours.close(next(grads), torch.eye(N, dtype=F64))
    for name, value in before.items():
        ours.data[ring.index(name, ours.slots)] = value
    ours.close(next(grads), textbook(kept))


@each_backend
def test_refused_pairs_change_nothing(backend: str) -> None:
    ours, a, grads = BroydenScalars(backend, 4, 2), hessian(N), gradients()
    kept = [ours.step(a, next(grads), 0.6) for _ in range(3)]
    p = ours.direction(next(grads))
    assert not ours.offer(p, -(a @ p), 1.0)
    ours.close(next(grads), textbook(kept))
    kept.append(ours.step(a, next(grads), 0.6))
    ours.close(next(grads), textbook(kept))


@each_backend
@pytest.mark.parametrize("name", ["gram_ss", "gram_yy"])
def test_h_begins_anew_where_it_is_not_positive(backend: str, name: str) -> None:
    """Products that rounding has spoilt: the pairs before one that does not fit are left out."""
    ours, a, grads = BroydenScalars(backend, 6, 0), hessian(N), gradients()
    kept = [ours.step(a, next(grads), 0.6) for _ in range(5)]
    slots = ring.held_slots(ours.data, ours.slots)[::-1]
    in_broyden = name == "gram_ss"
    gram = ring.broyden_array(ours.broyden, name, ours.slots) if in_broyden else ours.array(name)
    # Of this sign it makes y'Hy of the second pair negative; s'Bs is in either case.
    wrong = math.copysign(1e6, float(ours.array("gram_sy")[slots[0], slots[1]]))
    gram[slots[0], slots[1]] = gram[slots[1], slots[0]] = wrong
    ours.broyden[ring.broyden_index("held", ours.slots)] = 0.0  # all is built anew
    ours.direction(next(grads))
    assert (ours.number("runs"), ours.number("held")) == (2, 4)
    runs = ring.broyden_array(ours.broyden, "run", ours.slots)[slots].tolist()
    assert runs == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert ours.header.usable == 5
    ours.close(next(grads), textbook(kept[1:]))
    kept.append(ours.step(a, next(grads), 0.6))
    ours.close(next(grads), textbook(kept[1:]))


def test_more_slots_change_nothing() -> None:
    """A wider ring goes on as the narrower one would, bit for bit, until that one is full."""
    a, grads = hessian(N), gradients()
    ours = BroydenScalars("native", 6, 5)
    for _ in range(4):
        ours.step(a, next(grads), 0.6)
    g = next(grads)
    p = ours.direction(g)
    wide = BroydenScalars("native", 20, 0)
    wide.data.copy_(ring.with_more_slots(ours.data, ours.slots, wide.slots))
    wide.broyden.copy_(
        ring.broyden_with_more_slots(ours.broyden, ours.data, ours.slots, wide.slots)
    )
    wide.rows = {i: ours.rows[j] for i, j in enumerate(ring.in_order(ours.data, ours.slots)[:-1])}
    for scalars in (ours, wide):
        scalars.data[ring.index("direction_dot_grad", scalars.slots)] = g @ p
        assert scalars.offer(p, a @ p, 0.4)
    g = next(grads)
    assert torch.equal(ours.direction(g), wide.direction(g))
    assert wide.number("held") == 5


def test_backends_agree() -> None:
    """Native and twin leave the same numbers, within rounding."""
    a, grads = hessian(N), gradients()
    sides = [BroydenScalars(backend, 7, 2) for backend in ("native", "reference")]
    for _ in range(18):
        go_on(sides, a, grads)
        check_alike(*sides)
