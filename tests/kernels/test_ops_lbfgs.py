"""The L-BFGS ops against plain float64 arithmetic, on both backends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from ops_cases import (
    BACKENDS,
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SIZES,
    STATE_DTYPES,
    Ring,
    Tensors,
    assert_stored,
    assert_sum,
    clone_arguments,
    copy_arguments,
    direction_arguments,
    fits,
    integers,
    large_then_small,
    make_ring,
    make_tensors,
    normal,
    point_arguments,
    same_bits,
    set_out_arguments,
    split,
    stats_arguments,
    tensors_of,
    unit_roundoff,
    update_arguments,
)
from torch import Tensor

from fuse_ext.kernels import scalars as ring

each_backend = pytest.mark.parametrize("backend", BACKENDS)
ROWS_AND_STATES = list(product(DTYPES, STATE_DTYPES))
each_row_and_state = pytest.mark.parametrize(("row", "state"), ROWS_AND_STATES)


@dataclass
class Case:
    """One gradient and one ring, in all their variants; ``exact`` means integers throughout."""

    tensors: Tensors
    ring: Ring
    state: torch.dtype
    exact: bool
    decay: Sequence[float] = ()
    lr_scale: Sequence[float] = ()
    maximize: bool = False

    def __post_init__(self) -> None:
        flat = self.tensors.flat
        grad, x = flat(self.tensors.grads), flat(self.tensors.params)
        pull = self.tensors.spread(self.decay, 0.0) * x
        self.g = (-grad if self.maximize else grad) + pull
        self.g_size = grad.abs() + pull.abs()
        self.u = 0.0 if self.exact else unit_roundoff(self.state)

    def check_sum(
        self, actual: float, a: Tensor, b: Tensor, what: str, dtype: torch.dtype | None = None
    ) -> None:
        """a.b, where ``a`` may be the gradient."""
        if self.exact:
            assert actual == float(a @ b), what
        else:
            size = (self.g_size if a is self.g else a) * b
            assert_sum(actual, a * b, dtype or self.state, what, size)

    def check_stats(self, backend: str, direction: bool) -> None:
        arguments = stats_arguments(
            self.tensors, self.ring if direction else None, self.decay, self.maximize
        )
        BACKENDS[backend].grad_stats(**arguments)
        slope, square, absolute, penalty, largest = arguments["stats"].tolist()
        # There may be no state yet; the arithmetic is that of the widest tensor.
        tensors = [*self.tensors.params, *self.tensors.grads]
        dtype = F64 if any(t.dtype == F64 for t in tensors) else F32
        x = self.tensors.flat(self.tensors.params)
        p = self.ring.history[0, self.ring.opened].to(F64)
        decay_x = 0.5 * self.tensors.spread(self.decay, 0.0) * x
        for actual, a, b, what in (
            (slope, self.g, p if direction else torch.zeros_like(p), "g.p"),
            (square, self.g, self.g, "g.g"),
            (absolute, self.g, self.g.sign(), "sum |g|"),
            (penalty, decay_x, x, "penalty"),
        ):
            self.check_sum(actual, a, b, what, dtype)
        exact = float(self.g.abs().max()) if self.g.numel() else 0.0
        error = 3 * unit_roundoff(dtype) * float(self.g_size.max()) if exact else 0.0
        assert abs(largest - exact) <= error, "max |g|"

    def check_update(self, backend: str, form_pair: bool) -> None:
        history, opened = self.ring.history, self.ring.opened
        was, scalars_were = history.clone(), self.ring.scalars.clone()
        previous = self.ring.previous.to(F64, copy=True)
        BACKENDS[backend].lbfgs_update(
            **update_arguments(self.tensors, self.ring, form_pair, self.decay, self.maximize)
        )
        slots, names = self.ring.pairs, ["grad_s", "grad_y"]
        if form_pair:
            slots, names = [*slots, opened], [*names, "y_s", "y_y"]
            error = self.u * (4 * self.g_size + previous.abs())
            assert_stored(history[1, opened], self.g - previous, error, "y")
        y = history[1, opened].to(F64)
        for slot, name in product(slots, names):
            # The rounded row is the row: its dots are those of what is stored.
            row = history["sy".index(name[-1]), slot].to(F64)
            vector = self.g if name.startswith("grad") else y
            self.check_sum(float(self.ring.array(name)[slot]), vector, row, f"{name}[{slot}]")
        if form_pair:
            assert self.ring.scalar("y_dot_y") == float(self.ring.array("y_y")[opened])
            was[1, opened] = history[1, opened]
        assert same_bits(history, was), "rows that are not y"
        self.check_scalars(scalars_were, slots, names, ["y_dot_y"] if form_pair else [])

    def check_direction(self, backend: str) -> None:
        history, opened, pairs = self.ring.history, self.ring.opened, self.ring.pairs
        was, scalars_were = history.clone(), self.ring.scalars.clone()
        BACKENDS[backend].lbfgs_direction(
            **direction_arguments(self.tensors, self.ring, self.decay, self.lr_scale, self.maximize)
        )
        coef_g = float(self.ring.array("coef_g"))
        p, size = coef_g * self.g, abs(coef_g) * self.g_size
        for side, name in enumerate(("coef_s", "coef_y")):
            for slot in pairs:
                part = float(self.ring.array(name)[slot]) * was[side, slot].to(F64)
                p, size = p + part, size + part.abs()
        share = torch.where(
            self.tensors.covered(), self.tensors.spread(self.lr_scale, 1.0), torch.tensor(1.0)
        )
        error = (2 * len(pairs) + 6) * self.u * size * share.abs()
        assert_stored(history[0, opened], p * share, error, "p")
        assert_stored(self.ring.previous, self.g, 3 * self.u * self.g_size, "previous gradient")
        p = history[0, opened].to(F64)
        self.check_sum(self.ring.scalar("direction_dot_grad"), self.g, p, "g.p")
        self.check_sum(self.ring.scalar("direction_sq"), p, p, "p.p")
        largest = float(p.abs().max()) if p.numel() else 0.0
        assert self.ring.scalar("direction_max") == largest
        was[0, opened] = history[0, opened]
        if self.ring.grad_prev is None:
            was[1, opened] = history[1, opened]
        assert same_bits(history, was), "rows that are neither p nor the previous gradient"
        written = ["direction_dot_grad", "direction_sq", "direction_max"]
        self.check_scalars(scalars_were, [], [], written)

    def check_set_out(self, backend: str) -> None:
        """The same bits as from the two ops one after the other."""
        origin = torch.randn(self.tensors.numel).to(self.state)
        given = set_out_arguments(
            self.tensors, self.ring, origin, self.decay, self.lr_scale, self.maximize
        )
        at_once, in_turn = clone_arguments(given), clone_arguments(given)
        op = BACKENDS[backend]
        op.lbfgs_set_out(**at_once)
        to_move = ("params", "offsets", "origin", "history", "scalars", "history_scale", "step")
        op.lbfgs_direction(**{k: v for k, v in in_turn.items() if k not in ("origin", "step")})
        op.lbfgs_move(**{k: in_turn[k] for k in to_move}, save=True)
        one, two = tensors_of(at_once), tensors_of(in_turn)
        for name in one:
            assert same_bits(one[name], two[name]), name

    def check_move(self, backend: str, step: float, save: bool) -> None:
        origin = self.ring.previous.clone() if self.ring.grad_prev is None else self.ring.grad_prev
        was, params_were = origin.clone(), [p.clone() for p in self.tensors.params]
        history_was, covered = self.ring.history.clone(), self.tensors.covered()
        arguments = point_arguments(self.tensors, self.ring, origin)
        BACKENDS[backend].lbfgs_move(**arguments, step=step, save=save)
        if save:
            was[covered] = self.tensors.flat(params_were)[covered].to(self.state)
        assert same_bits(origin, was), "origin"
        p = self.ring.history[0, self.ring.opened].to(F64)
        point, size = was.to(F64) + step * p, was.to(F64).abs() + (step * p).abs()
        self.check_params(point, 3 * (self.u if step else 0.0) * size)
        assert same_bits(self.ring.history, history_was)

    def check_blend(self, backend: str, theta: float, step: float) -> None:
        ring_, opened = self.ring, self.ring.opened
        origin = normal(self.tensors.numel) if not self.exact else integers(self.tensors.numel)
        origin = origin.to(self.state)
        x, p = self.tensors.flat(self.tensors.params), ring_.history[0, opened].to(F64, copy=True)
        was, origin_was, scalars_were = (
            ring_.history.clone(),
            origin.clone(),
            ring_.scalars.clone(),
        )
        arguments = point_arguments(self.tensors, ring_, origin)
        BACKENDS[backend].fuse_blend(**arguments, theta=theta, step=step)
        start = origin.to(F64)
        point = theta * x + (1 - theta) * (start + step * p)
        size = x.abs() + start.abs() + (step * p).abs()
        self.check_params(point, 5 * self.u * size)
        taken = self.tensors.flat(self.tensors.params) - start
        taken[~self.tensors.covered()] = 0.0  # what is no parameter's does not move
        assert_stored(ring_.history[0, opened], taken, self.u * taken.abs(), "step taken")
        taken = ring_.history[0, opened].to(F64)
        self.check_sum(ring_.scalar("direction_sq"), taken, taken, "|step|^2")
        was[0, opened] = ring_.history[0, opened]
        assert same_bits(ring_.history, was)
        assert same_bits(origin, origin_was)
        self.check_scalars(scalars_were, [], [], ["direction_sq"])

    def check_copies(self, backend: str) -> None:
        covered = self.tensors.covered()
        flat = normal(self.tensors.numel).to(self.state)
        expected, params_were = flat.clone(), [p.clone() for p in self.tensors.params]
        expected[covered] = self.tensors.flat(self.tensors.grads)[covered].to(self.state)
        BACKENDS[backend].grad_gather(**copy_arguments(self.tensors, flat))
        assert same_bits(flat, expected)
        flat = normal(self.tensors.numel).to(self.state)
        BACKENDS[backend].grad_scatter(**copy_arguments(self.tensors, flat))
        for grad, offset in zip(self.tensors.grads, self.tensors.offsets, strict=True):
            assert same_bits(grad, flat[offset : offset + grad.numel()].to(grad.dtype))
        assert all(map(same_bits, self.tensors.params, params_were))

    def check_params(self, point: Tensor, error: Tensor) -> None:
        for i, (param, offset) in enumerate(
            zip(self.tensors.params, self.tensors.offsets, strict=True)
        ):
            place = slice(offset, offset + param.numel())
            assert_stored(param, point[place], error[place], f"params[{i}] {param.dtype}")

    def check_scalars(
        self, were: Tensor, slots: Sequence[int], arrays: Sequence[str], headers: Sequence[str]
    ) -> None:
        """No scalar changed but these headers, and these arrays at these slots."""
        were = were.clone()
        for name in headers:
            place = ring.index(name, self.ring.slots)
            were[place] = self.ring.scalars[place]
        for name, slot in product(arrays, slots):
            ring.array(were, name, self.ring.slots)[slot] = self.ring.array(name)[slot]
        assert same_bits(self.ring.scalars, were)
        assert bool(self.ring.padding.isnan().all()), "written between the rows"

    def check_all(self, backend: str) -> None:
        """The ops in the order in which they are used."""
        self.check_stats(backend, True)
        self.check_stats(backend, False)
        self.check_update(backend, False)
        self.check_update(backend, True)
        self.check_set_out(backend)
        self.check_direction(backend)
        self.check_move(backend, 0.5, True)
        self.check_move(backend, -2.0, False)
        self.check_move(backend, 0.0, True)
        self.check_blend(backend, 0.5, 2.0)
        self.check_move(backend, 0.0, False)
        self.check_copies(backend)


def make_case(
    sizes: Sequence[int],
    row: torch.dtype = F32,
    state: torch.dtype = F32,
    *,
    exact: bool,
    position: tuple[int, int, int] = (3, 1, 3),
    param_dtypes: Sequence[torch.dtype] = (F32,),
    grad_dtypes: Sequence[torch.dtype] = (),
    gaps: Sequence[int] = (0,),
    **options: object,
) -> Case:
    draw = integers if exact else normal
    tensors = make_tensors(sizes, param_dtypes, grad_dtypes, draw=draw, gaps=gaps)
    made = make_ring(tensors.numel, *position, row, state, draw=draw)
    count = 2 * position[0] + 3
    coefs = integers(count, (-1, 1)) if exact else normal(count)
    made.array("coef_s").copy_(coefs[: made.slots])
    made.array("coef_y").copy_(coefs[made.slots : 2 * made.slots])
    made.array("coef_g").copy_(coefs[-1:])
    return Case(tensors, made, state, exact, **options)  # type: ignore[arg-type]


@each_backend
@pytest.mark.parametrize("exact", [True, False], ids=["integers", "normal"])
@each_row_and_state
@pytest.mark.parametrize("numel", SIZES)
def test_every_size(
    backend: str, numel: int, row: torch.dtype, state: torch.dtype, exact: bool
) -> None:
    make_case(split(numel, 3), row, state, exact=exact).check_all(backend)


@each_backend
@pytest.mark.parametrize("history_size", [1, 2, 3, 7, 10])
def test_every_ring_position_and_count(backend: str, history_size: int) -> None:
    positions = product(range(history_size + 1), repeat=2)
    for i, (opened, count) in enumerate(positions):
        row, state = ROWS_AND_STATES[i % len(ROWS_AND_STATES)]
        case = make_case(
            [20, 0, 19], row, state, exact=True, position=(history_size, opened, count)
        )
        case.check_all(backend)


@each_backend
@pytest.mark.parametrize("exact", [True, False], ids=["integers", "normal"])
@pytest.mark.parametrize("pieces", [1, 2, 7, 100, 1000])
def test_segments_with_all_options(backend: str, pieces: int, exact: bool) -> None:
    make_case(
        split(9000, pieces),
        BF16,
        exact=exact,
        param_dtypes=(F32, BF16, F16),
        grad_dtypes=(F32, F32, BF16, F16),
        decay=[(0.0, 2.0, 1.0)[i % 3] for i in range(pieces)],
        lr_scale=[(1.0, 2.0, 0.0, 1.0)[i % 4] for i in range(pieces)],
        maximize=True,
    ).check_all(backend)


@each_backend
@pytest.mark.parametrize(
    ("param", "grad", "state"),
    [c for c in product(DTYPES, DTYPES, STATE_DTYPES) if fits(c[0], c[2])],
)
def test_every_combination_of_dtypes(
    backend: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> None:
    sizes = [1500, 1, 0, 30]
    case = make_case(sizes, state=state, param_dtypes=[param], grad_dtypes=[grad], exact=False)
    case.check_all(backend)
    decay = [0.5, 0.25, 2.0, 0.0]
    case = make_case(
        sizes, F16, state, param_dtypes=[param], grad_dtypes=[grad], exact=True, decay=decay
    )
    case.check_update(backend, True)


@each_backend
def test_gaps_between_the_parameters(backend: str) -> None:
    """The gradient is zero there; the rows are what they are."""
    gaps = (0, 3, 0, 4100)
    sizes = split(6000, 20)
    case = make_case(sizes, exact=True, gaps=gaps, decay=[2.0] * 20, lr_scale=[2.0] * 20)
    case.check_stats(backend, True)
    case.check_update(backend, True)
    case.check_set_out(backend)
    case.check_direction(backend)
    case.check_move(backend, 0.5, True)
    case.check_move(backend, 0.5, False)
    case.check_blend(backend, 0.5, 2.0)
    case.check_copies(backend)


def test_vectors_that_no_cache_holds() -> None:
    """From 32 MiB on, what is only written goes past the caches."""
    case = make_case([2**23, 5], exact=False, position=(2, 1, 1))
    case.check_set_out("native")
    case.check_direction("native")
    case.check_move("native", 0.5, True)


@pytest.mark.parametrize("param", [F32, BF16])
def test_parameters_of_a_small_problem_on_two_threads(param: torch.dtype) -> None:
    """They go past the caches; on one thread, or in tensors of torch's grain, they do not."""
    threads = torch.get_num_threads()
    small, large = [4001] * 20, [40_009, 40_011]
    try:
        for count, sizes in product((1, 2), (small, large)):
            torch.set_num_threads(count)
            case = make_case(sizes, exact=False, position=(2, 1, 1), param_dtypes=[param])
            case.check_set_out("native")
            case.check_move("native", 0.5, True)
            case.check_move("native", 0.5, False)
            case.check_move("native", 0.0, False)
    finally:
        torch.set_num_threads(threads)


@each_backend
@pytest.mark.parametrize("row", DTYPES)
def test_long_sums_lose_nothing(backend: str, row: torch.dtype) -> None:
    numel = 50_001
    tensors = make_tensors([numel], (F32,), draw=large_then_small)
    made = make_ring(numel, 3, 1, 3, row, F32, draw=large_then_small)
    made.previous.mul_(2)  # so that y = -g
    made.array("coef_g").fill_(1.0)  # and p = g
    case = Case(tensors, made, F32, True)
    case.check_stats(backend, True)
    case.check_update(backend, True)
    case.check_direction(backend)
    tensors.params[0].zero_()
    made.history[0, made.opened] = large_then_small(numel)
    origin = torch.zeros(numel)
    BACKENDS[backend].fuse_blend(**point_arguments(tensors, made, origin), theta=0.5, step=2.0)
    assert made.scalar("direction_sq") == float(large_then_small(numel).square().sum())


@each_backend
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1023, 4095, 5000])
def test_non_finite_gradients_show(backend: str, value: float, where: int) -> None:
    case = make_case([5001], exact=False)
    case.tensors.grads[0][where] = value
    arguments = stats_arguments(case.tensors, case.ring)
    ops = BACKENDS[backend]
    ops.grad_stats(**arguments)
    assert not arguments["stats"][1].isfinite()
    ops.lbfgs_update(**update_arguments(case.tensors, case.ring))
    assert not math.isfinite(case.ring.scalar("y_dot_y"))
    ops.lbfgs_direction(**direction_arguments(case.tensors, case.ring))
    assert not math.isfinite(case.ring.scalar("direction_sq"))


@each_backend
def test_no_tensors(backend: str) -> None:
    case = make_case([], exact=True, gaps=(), position=(2, 0, 2))
    case.check_all(backend)
