"""The two-loop recursion on scalars against what it stands for.

Oracles, all in float64: the inverse Hessian as a dense matrix (BFGS from gamma I), and the
two-loop recursion on vectors (Nocedal and Wright, Algorithm 7.4).
"""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch
from ops_cases import (
    BACKENDS,
    CPU,
    DTYPES,
    F32,
    F64,
    direction_arguments,
    make_ring,
    make_tensors,
    point_arguments,
    same_bits,
    split,
    unit_roundoff,
    update_arguments,
)
from torch import Tensor

from fuse_ext.kernels import scalars as ring

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_history_size = pytest.mark.parametrize("history_size", [1, 2, 3, 7, 10])
Pair = tuple[Tensor, Tensor]
TOL = 1e-8


def dense_direction(pairs: list[Pair], g: Tensor) -> Tensor:
    """-H g with H = V' H V + rho s s', V = I - rho y s', from gamma I, oldest pair first."""
    eye = torch.eye(g.numel(), dtype=F64)
    h = eye
    if pairs:
        s, y = pairs[-1]
        h = (s @ y) / (y @ y) * eye
    for s, y in pairs:
        rho = 1 / (s @ y)
        v = eye - rho * torch.outer(y, s)
        h = v.T @ h @ v + rho * torch.outer(s, s)
    return -h @ g


def vector_two_loop(pairs: list[Pair], g: Tensor) -> Tensor:
    """-H g by two loops over the pairs, which come oldest first."""
    q, alphas = -g, []
    for s, y in reversed(pairs):
        alphas.append((s @ q) / (s @ y))
        q = q - alphas[-1] * y
    if pairs:
        s, y = pairs[-1]
        q = q * ((s @ y) / (y @ y))
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + s * (alpha - (y @ q) / (s @ y))
    return q


def hessian(n: int) -> Tensor:
    """A random symmetric matrix with eigenvalues from 0.1 to 10."""
    q = torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q
    return q @ torch.diag(torch.logspace(-1, 1, n, dtype=F64)) @ q.T


class Scalars:
    """The ring in scalars alone: vectors stay here, and their dots are put in by hand."""

    def __init__(self, backend: str, history_size: int, opened: int) -> None:
        self.slots = history_size + 1
        self.data = ring.new_scalars(self.slots, CPU)
        self.data[ring.index("open", self.slots)] = opened
        self.rows: dict[int, Pair] = {}  # slot -> rows S and Y
        self._op = BACKENDS[backend].lbfgs_two_loop

    def array(self, name: str) -> Tensor:
        return ring.array(self.data, name, self.slots)

    @property
    def header(self) -> ring.Header:
        return ring.read_header(self.data)

    def offer(self, s_row: Tensor, y: Tensor, step_length: float) -> bool:
        """Offers the pair (step_length s_row, y); whether it was accepted."""
        before, opened = self.header, int(self.header.open)
        self.rows[opened] = s_row, y
        for slot, (s_j, y_j) in self.rows.items():
            self.array("y_s")[slot], self.array("y_y")[slot] = y @ s_j, y @ y_j
        self.data[ring.index("y_dot_y", self.slots)] = y @ y
        self.data[ring.index("direction_sq", self.slots)] = s_row @ s_row
        self._op(self.data, self.slots, True, step_length, TOL)
        return self.header.accepted > before.accepted

    def direction(self, g: Tensor) -> Tensor:
        """-H g, put together from the coefficients."""
        # The slots outside of the ring must not matter, nor pairs of other sets.
        for name in ("grad_s", "grad_y"):
            self.array(name).fill_(math.nan)
        for slot in ring.usable_slots(self.data, self.slots):
            s_row, y = self.rows[slot]
            self.array("grad_s")[slot], self.array("grad_y")[slot] = g @ s_row, g @ y
        self._op(self.data, self.slots, False, math.nan, math.nan)
        p = float(self.array("coef_g")) * g
        for slot in ring.held_slots(self.data, self.slots):
            s_row, y = self.rows[slot]
            p = p + self.array("coef_s")[slot] * s_row + self.array("coef_y")[slot] * y
        return p


@each_backend
@each_history_size
def test_every_ring_index_and_count(backend: str, history_size: int) -> None:
    n = 14
    a = hessian(n)
    for opened in range(history_size + 1):
        scalars = Scalars(backend, history_size, opened)
        kept: deque[Pair] = deque(maxlen=history_size)
        for _ in range(history_size + 4):
            g = torch.randn(n, dtype=F64)
            p = scalars.direction(g)
            pairs = list(kept)
            assert scalars.header.count == len(pairs)
            # Each of at most 10 updates multiplies the roundoff by at most the condition, 100;
            # a wrong sign, order or index changes p by its own size.
            for oracle in (dense_direction, vector_two_loop):
                torch.testing.assert_close(p, oracle(pairs, g), rtol=1e-9, atol=1e-10)
            assert float(g @ p) < 0
            # The row is not the step: s = step_length * row.
            step_length, s = 0.05 + 3 * float(torch.rand(())), torch.randn(n, dtype=F64)
            y = a @ s
            assert scalars.offer(s / step_length, y, step_length)
            kept.append((s, y))
            assert scalars.header.gamma == pytest.approx(float(s @ y / (y @ y)), rel=1e-12)
            assert scalars.header.open == (opened + int(scalars.header.accepted)) % scalars.slots


@each_backend
def test_secant_equation(backend: str) -> None:
    """H y = s for the newest pair: the direction for g = y is -s."""
    scalars, a = Scalars(backend, 3, 2), hessian(9)
    for _ in range(6):
        s = torch.randn(9, dtype=F64)
        assert scalars.offer(s, a @ s, 1.0)
        torch.testing.assert_close(scalars.direction(a @ s), -s, rtol=1e-10, atol=1e-10)


@each_backend
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize(
    ("y_of", "step_length"),
    [
        (lambda s: -s, 1.0),
        (lambda s: s, -1.0),
        (lambda s: s, 0.0),
        (lambda s: 0 * s, 1.0),
        (lambda s: math.nan * s, 1.0),
        (lambda s: math.inf * s, 1.0),
        (lambda s: s, math.nan),
        (lambda s: s, math.inf),
        (lambda s: 1e200 * s, 1.0),
        (lambda s: s, 1e200),
        (lambda s: s.flip(0) * torch.tensor([1.0, -1.0]) + 0.5 * TOL * s, 1.0),
    ],
    ids=[
        "negative curvature",
        "backward step",
        "no step",
        "zero y",
        "NaN y",
        "infinite y",
        "NaN step",
        "infinite step",
        "overflow of y.y",
        "overflow of s.s",
        "nearly orthogonal",
    ],
)
def test_refused_pairs_leave_the_ring(
    backend: str, count: int, y_of: object, step_length: float
) -> None:
    scalars = Scalars(backend, 3, 2)
    kept = []
    for _ in range(count):
        s = torch.randn(2, dtype=F64)
        assert scalars.offer(s, 2 * s, 1.0)
        kept.append((s, 2 * s))
    before = scalars.data.clone()
    s = torch.tensor([3.0, 4.0], dtype=F64)
    assert not scalars.offer(s, y_of(s), step_length)  # type: ignore[operator]
    # Of what describes the ring only the counter may change.
    header = scalars.header
    assert header.skipped == 1
    for name in ("count", "open", "gamma", "accepted", "row_scale", "gram_sy", "gram_yy"):
        place = ring.layout(scalars.slots)[name]
        part = slice(place[0], sum(place)) if isinstance(place, tuple) else slice(place, place + 1)
        assert same_bits(scalars.data[part], before[part]), name
    g = torch.randn(2, dtype=F64)
    torch.testing.assert_close(scalars.direction(g), vector_two_loop(kept, g))


def coefficients(scalars: Scalars) -> tuple[Tensor, Tensor]:
    """Of g, and of the rows [pairs, 2], newest pair first."""
    held = ring.held_slots(scalars.data, scalars.slots)
    rows = torch.stack([scalars.array("coef_s")[held], scalars.array("coef_y")[held]], dim=1)
    return scalars.array("coef_g").clone(), rows


@each_backend
@pytest.mark.parametrize("history_size", [1, 4, 10])
@pytest.mark.parametrize("self_scaling", [False, True])
def test_pairs_of_a_set_are_used_as_if_they_were_alone(
    backend: str, history_size: int, self_scaling: bool
) -> None:
    n, sets = 9, 3
    mixed, slots = Scalars(backend, history_size, 1), history_size + 1
    twin = Scalars("reference", history_size, 1)
    for scalars in (mixed, twin):
        scalars.data[ring.index("self_scaling", slots)] = self_scaling
    a, kept = hessian(n), deque[tuple[int, Tensor, Tensor, float, float]](maxlen=history_size)

    def offer(
        scalars: Scalars, chosen: int, row: Tensor, y: Tensor, t: float, slope: float
    ) -> None:
        scalars.data[ring.index("set", slots)] = chosen
        scalars.data[ring.index("direction_dot_grad", slots)] = slope
        assert scalars.offer(row, y, t)

    for round_ in range(2 * history_size + 3):
        g, first = torch.randn(n, dtype=F64), []
        for chosen in (*range(sets + 1), *range(sets + 1)):  # none is of the last set
            alone = Scalars(backend, history_size, 0)
            alone.data[ring.index("self_scaling", slots)] = self_scaling
            for pair in kept:
                if pair[0] == chosen:
                    offer(alone, *pair)
            expected = alone.direction(g)
            for scalars in (mixed, twin):
                scalars.data[ring.index("set", slots)] = chosen
            p = mixed.direction(g)
            assert (mixed.header.count, mixed.header.usable) == (len(kept), alone.header.count)
            coef_g, rows = coefficients(mixed)
            used = torch.tensor([pair[0] == chosen for pair in reversed(kept)], dtype=torch.bool)
            assert same_bits(coef_g, coefficients(alone)[0])
            assert same_bits(rows[used], coefficients(alone)[1])
            assert not rows[~used].any()
            torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(p, twin.direction(g), rtol=1e-9, atol=1e-9)
            usable = int(mixed.header.usable)
            for name, length in (("pair_set", slots), ("chosen", usable)):
                assert torch.equal(mixed.array(name)[:length], twin.array(name)[:length]), name
            first.append(torch.cat([coef_g, rows.flatten()]))
            if not usable:
                assert torch.equal(p, -g)
            elif not self_scaling:
                pairs = [(t * row, y) for of, row, y, t, _ in kept if of == chosen]
                torch.testing.assert_close(p, vector_two_loop(pairs, g), rtol=1e-9, atol=1e-9)
        assert all(map(same_bits, first[: sets + 1], first[sets + 1 :]))
        step_length, s = 0.05 + 3 * float(torch.rand(())), torch.randn(n, dtype=F64)
        y = a @ s
        # What makes tau less than 1 for about half of the pairs.
        slope = -float(s @ y) * (0.5 + float(torch.rand(()))) / step_length
        kept.append((round_ * 2 % 5 % sets, s / step_length, y, step_length, slope))
        for scalars in (mixed, twin):
            offer(scalars, *kept[-1])


@each_backend
@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e60])
@pytest.mark.parametrize("step_length", [1e-10, 1.0, 1e10])
def test_the_curvature_test_has_no_scale(backend: str, scale: float, step_length: float) -> None:
    s = torch.tensor([3.0, 4.0], dtype=F64)
    aside = torch.tensor([-4.0, 3.0], dtype=F64)
    for cosine, accepted in ((1.1 * TOL, True), (0.9 * TOL, False), (1.0, True)):
        y = scale * (cosine * s + math.sqrt(1 - cosine**2) * aside)
        scalars = Scalars(backend, 1, 0)
        assert scalars.offer(s, y, step_length) is accepted
        assert scalars.header.pair_cosine == pytest.approx(cosine, rel=1e-6)


@each_backend
@each_history_size
@pytest.mark.parametrize("row", DTYPES)
@pytest.mark.parametrize("state", [F32, F64])
def test_the_ops_together_give_the_direction(
    backend: str, history_size: int, row: torch.dtype, state: torch.dtype
) -> None:
    """update, two_loop, direction and move around the ring, on vectors in segments."""
    n, op = 300, BACKENDS[backend]
    a = hessian(n)
    tensors = make_tensors(split(n, 5), (state,))
    made = make_ring(n, history_size, 1, 0, row, state)
    origin = torch.zeros(n, dtype=state)
    kept: deque[Pair] = deque(maxlen=history_size)
    step = 0.0
    for iteration in range(2 * history_size + 4):
        tensors_g = (a @ tensors.flat(tensors.params)).to(state)
        for grad, offset in zip(tensors.grads, tensors.offsets, strict=True):
            grad.copy_(tensors_g[offset : offset + grad.numel()])
        opened = made.opened
        op.lbfgs_update(**update_arguments(tensors, made, form_pair=iteration > 0))
        op.lbfgs_two_loop(made.scalars, made.slots, iteration > 0, step, TOL)
        if iteration > 0:
            assert made.scalar("accepted") == iteration
            # The rounded rows are the pair.
            s_row, y = made.history[:, opened].to(F64, copy=True)
            kept.append((step * s_row, y))
        op.lbfgs_direction(**direction_arguments(tensors, made))
        p, g = made.history[0, made.opened].to(F64), tensors_g.to(F64)
        expected = vector_two_loop(list(kept), g)
        # Dots carry the state's roundoff, p itself the row's; the recursion amplifies them by a
        # small multiple of the condition of the pairs.
        error = 2e3 * unit_roundoff(state) + 2 * unit_roundoff(row)
        assert float((p - expected).norm()) <= error * float(expected.norm())
        # Exact line search, lengthened a bit so that gradients stay independent.
        step = 0.9 * float(-(g @ p) / (p @ a @ p))
        op.lbfgs_move(**point_arguments(tensors, made, origin), step=step, save=True)
