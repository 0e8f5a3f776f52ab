"""The ops on some of the parameters: what was left out reads as zero and is never written.

So a step goes on while some parameters have no gradient. Their neighbours in memory belong to
them here, their part of what may be written holds NaN, and so does the part of the origin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ops_cases import (
    BACKENDS,
    BF16,
    CPU,
    DTYPES,
    F16,
    F32,
    F64,
    STATE_DTYPES,
    Ring,
    Tensors,
    clone_arguments,
    copy_arguments,
    direction_arguments,
    move_arguments,
    point_arguments,
    same_bits,
    set_out_arguments,
    stats_arguments,
    update_arguments,
)
from torch import Tensor

from fuse_ext import _C
from fuse_ext.kernels import bound_ops
from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.reference.memory import SCALE_BLOCK, Rows

I8 = torch.int8
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_history = pytest.mark.parametrize(
    ("row", "state"), list(product((*DTYPES, I8), STATE_DTYPES)), ids=str
)
# Odd ones, so that blocks of 8-bit rows straddle every border, and two longer than a run.
SIZES = (57, 130, 1, 301, 0, 64, 5, 1500, 129, 1027, 3)
KEPT = {
    "first and last left out": (1, 3, 4, 5, 7, 9),
    "every other": (0, 2, 4, 6, 8, 10),
    "all but one": (0, 1, 2, 3, 4, 5, 6, 8, 9, 10),
    "one": (3,),
}
each_part = pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
STEP, TOL = 0.25, 1e-8


@dataclass
class Parts:
    """Some of the parameters, and the state of all."""

    tensors: Tensors
    ring: Ring
    state: torch.dtype
    buffers: list[Tensor]  # the memory of all parameters and gradients

    @property
    def left_out(self) -> Tensor:
        return ~self.tensors.covered()

    @property
    def g(self) -> Tensor:
        return self.tensors.flat(t.flatten() for t in self.tensors.grads)

    def row(self, side: int, slot: int) -> Tensor:
        """As stored, in float64."""
        return Rows(self.ring.history, self.ring.history_scale, self.state).read(side, slot).to(F64)

    def rounding(self, side: int, slot: int, values: Tensor) -> Tensor:
        """The most that rounding to the row's format may change."""
        if self.ring.history_scale is None:
            roundoff = max(torch.finfo(t).eps for t in (self.ring.history.dtype, self.state))
            return 4 * roundoff * values.abs() + torch.finfo(F16).tiny
        scales = self.ring.history_scale[side, slot].to(F64)
        return 0.51 * scales.repeat_interleave(SCALE_BLOCK)[: len(values)] + 1e-6

    def origin(self) -> Tensor:
        """NaN where no parameter is."""
        values = torch.randn(self.tensors.numel).to(self.state)
        values[self.left_out] = math.nan
        return values

    def copy(self) -> Parts:
        """The same in memory of its own."""
        buffers = [b.clone() for b in self.buffers]
        half = len(buffers) // 2
        tensors = replace(
            self.tensors,
            params=_views(buffers[:half], self.tensors.params),
            grads=_views(buffers[half:], self.tensors.grads),
        )
        fields = ("history", "scalars", "grad_prev", "history_scale")
        own = clone_arguments({name: getattr(self.ring, name) for name in fields})
        return Parts(tensors, Ring(**own), self.state, buffers)


def _views(buffers: list[Tensor], like: Iterable[Tensor]) -> list[Tensor]:
    """The places of these tensors in other buffers, one for each dtype."""
    of = {b.dtype: b for b in buffers}
    return [of[t.dtype].as_strided(t.shape, t.stride(), t.storage_offset()) for t in like]


def make_parts(kept: Iterable[int], row: torch.dtype, state: torch.dtype) -> Parts:
    """Three pairs, a direction and a previous gradient that are zero where nothing is kept."""
    numel, offsets = sum(SIZES), [sum(SIZES[:i]) for i in range(len(SIZES))]
    buffers = [torch.randn(numel).to(t) for t in (F32, BF16, F16, F32, BF16, F16)]
    params, grads = [], []
    for i in kept:
        place = slice(offsets[i], offsets[i] + SIZES[i])
        x, g = buffers[i % 3][place], buffers[3 + i // 2 % 3][place]
        if SIZES[i] == 130:  # a transposed one, and a gradient in another order
            x = x.view(10, 13).t()
            g = g.view(13, 10)
        params.append(x)
        grads.append(g)
    tensors = Tensors(params, grads, [offsets[i] for i in kept], numel)
    covered = torch.zeros(numel, dtype=torch.bool)
    for i in kept:
        covered[offsets[i] : offsets[i] + SIZES[i]] = True
    slots = 4
    memory = torch.zeros(2, slots, numel + 7, dtype=row)
    scales = torch.zeros(2, slots, -(-numel // SCALE_BLOCK)) if row == I8 else None
    history = memory[:, :, :numel]
    made = Ring(history, ring.new_scalars(slots, CPU), None, scales)
    for name, value in (("open", 1), ("count", 3), ("usable", 3)):
        made.scalars[ring.index(name, slots)] = value
    rows = Rows(history, scales, state)
    for side, slot in product((0, 1), range(slots)):
        rows.write(side, slot, (torch.randn(numel) * covered).to(state))
    if row != state:
        made.grad_prev = (torch.randn(numel) * covered).to(state)
    for name in ("row_scale", "coef_s", "coef_y", "coef_g"):
        made.array(name).copy_(torch.randn_like(made.array(name)))
    return Parts(tensors, made, state, buffers)


def flat_memory(tensors: Tensors, of: list[Tensor]) -> Tensor:
    """These tensors (parameters or gradients) in the memory order of the parameters, flat."""
    ordered = [
        (t.t() if not p.is_contiguous() else t).flatten()
        for p, t in zip(tensors.params, of, strict=True)
    ]
    return tensors.flat(ordered)


def check_neighbours(parts: Parts, before: Parts) -> None:
    """No memory between the parameters or the gradients has changed."""
    for buffer, was in zip(parts.buffers, before.buffers, strict=True):
        assert same_bits(buffer[parts.left_out], was[parts.left_out])


def check_zero(parts: Parts, side: int, slot: int) -> None:
    assert not parts.ring.history[side, slot][parts.left_out].any()
    assert not parts.row(side, slot)[parts.left_out].any()


def close_scalars(ours: Ring, theirs: Ring, state: torch.dtype, row: torch.dtype) -> None:
    """Sums of rows that may be rounded otherwise by a step here and there."""
    tolerance = {I8: 3e-2, BF16: 3e-2, F16: 3e-3}.get(row, 1e-4 if F32 in (row, state) else 1e-9)
    size = math.sqrt(theirs.history.size(2))
    torch.testing.assert_close(
        ours.scalars, theirs.scalars, rtol=tolerance, atol=tolerance * size, equal_nan=True
    )


def combination(parts: Parts, g: Tensor, lr_scale: list[float]) -> Tensor:
    """p of the coefficients, not rounded."""
    p = float(parts.ring.array("coef_g")) * g
    for side, name in enumerate(("coef_s", "coef_y")):
        for slot in parts.ring.pairs:
            p += float(parts.ring.array(name)[slot]) * parts.row(side, slot)
    return p * parts.tensors.spread(lr_scale, 1.0)


def check_parts(backend: str, kept: Iterable[int], row: torch.dtype, state: torch.dtype) -> None:
    """Every op on ``backend``: against float64, and against the reference from the same state."""
    parts = make_parts(kept, row, state)
    op, reference = BACKENDS[backend], BACKENDS["reference"]
    slots, opened, count = parts.ring.slots, parts.ring.opened, len(parts.tensors.params)
    decay, lr_scale = [0.5 * (i % 2) for i in range(count)], [1.0 + i % 2 for i in range(count)]
    x = flat_memory(parts.tensors, parts.tensors.params)
    g = flat_memory(parts.tensors, parts.tensors.grads) + parts.tensors.spread(decay, 0.0) * x
    previous = parts.ring.previous.to(F64, copy=True)

    def both(name: str, make: Any) -> tuple[Parts, Parts, dict[str, Any]]:
        """Runs the op on ``parts``, and the reference on a copy."""
        before, theirs = parts.copy(), parts.copy()
        ours = make(parts)
        other = make(theirs)
        for key in ("origin", "flat"):
            if key in ours:
                other[key] = ours[key].clone()
        getattr(op, name)(**ours)
        getattr(reference, name)(**other)
        check_neighbours(parts, before)
        close_scalars(parts.ring, theirs.ring, state, row)
        for i in range(len(parts.buffers)):
            wide = parts.buffers[i].dtype
            error = 8 * max(torch.finfo(t).eps for t in (wide, state)) + (row == I8) * 0.1
            torch.testing.assert_close(
                parts.buffers[i], theirs.buffers[i], rtol=error, atol=4 * error
            )
        return before, theirs, ours

    def own_origin(p: Parts) -> Tensor:
        return origin if p is parts else origin.clone()

    _, _, arguments = both("grad_stats", lambda p: stats_arguments(p.tensors, p.ring, decay, False))
    p = parts.row(0, opened)
    exact = [g @ p, g @ g, g.abs().sum(), 0.5 * parts.tensors.spread(decay, 0.0) @ x**2]
    expected = torch.tensor([*exact, g.abs().max() if len(g) else 0.0], dtype=F64)
    torch.testing.assert_close(arguments["stats"], expected, rtol=1e-4, atol=1e-4 * len(g) ** 0.5)

    both("lbfgs_update", lambda p: update_arguments(p.tensors, p.ring, True, decay))
    y = g - previous
    check_zero(parts, 1, opened)
    assert bool(((parts.row(1, opened) - y).abs() <= parts.rounding(1, opened, y)).all())
    for slot in range(slots):
        for name, a, b in (
            ("grad_s", g, parts.row(0, slot)),
            ("grad_y", g, parts.row(1, slot)),
            ("y_s", parts.row(1, opened), parts.row(0, slot)),
            ("y_y", parts.row(1, opened), parts.row(1, slot)),
        ):
            error = 1e-5 * float(a.abs() @ b.abs()) + 1e-9
            assert abs(float(parts.ring.array(name)[slot]) - float(a @ b)) <= error, name

    wanted = combination(parts, g, lr_scale)
    origin = parts.origin()

    def check_direction() -> None:
        check_zero(parts, 0, opened)
        error = parts.rounding(0, opened, wanted) + 1e-5 * wanted.abs().max()
        assert bool(((parts.row(0, opened) - wanted).abs() <= error).all())
        assert not parts.ring.previous[parts.left_out].any()
        torch.testing.assert_close(parts.ring.previous.to(F64), g, rtol=1e-6, atol=1e-6)

    both("lbfgs_direction", lambda p: direction_arguments(p.tensors, p.ring, decay, lr_scale))
    check_direction()

    def check_moved(saved: bool, step: float, were: Tensor, from_: Tensor) -> None:
        assert bool(origin[parts.left_out].isnan().all())
        now = flat_memory(parts.tensors, parts.tensors.params)
        covered = parts.tensors.covered()
        if saved:
            assert torch.equal(origin[covered].to(F64), were[covered])
        goal = (were if saved else from_.to(F64)) + step * parts.row(0, opened)
        torch.testing.assert_close(now[covered], goal[covered], rtol=1e-2, atol=2e-2)

    for step, save in ((STEP, True), (-2 * STEP, False), (0.0, True), (0.0, False)):
        were, start = flat_memory(parts.tensors, parts.tensors.params), origin.clone()
        both(
            "lbfgs_move",
            lambda p, step=step, save=save: move_arguments(
                p.tensors, p.ring, own_origin(p), step, save
            ),
        )
        check_moved(save, step, were, start)
    were, start = flat_memory(parts.tensors, parts.tensors.params), origin.clone()
    decayed = parts.tensors.spread(decay, 0.0)
    g = flat_memory(parts.tensors, parts.tensors.grads) + decayed * were
    wanted = combination(parts, g, lr_scale)
    both(
        "lbfgs_set_out",
        lambda p: set_out_arguments(p.tensors, p.ring, own_origin(p), decay, lr_scale),
    )
    check_direction()
    check_moved(True, 0.5, were, start)

    both(
        "fuse_blend",
        lambda p: point_arguments(p.tensors, p.ring, own_origin(p)) | {"theta": 0.3, "step": STEP},
    )
    check_zero(parts, 0, opened)
    assert bool(origin[parts.left_out].isnan().all())
    assert math.isfinite(parts.ring.scalar("direction_sq"))

    flat = parts.origin()
    _, _, arguments = both("grad_gather", lambda p: copy_arguments(p.tensors, flat))
    covered = parts.tensors.covered()
    assert bool(flat[parts.left_out].isnan().all())
    gathered = flat_memory(parts.tensors, parts.tensors.grads)
    assert torch.equal(flat[covered].to(F64), gathered[covered])
    flat.mul_(2)
    both("grad_scatter", lambda p: copy_arguments(p.tensors, flat))
    scattered = flat_memory(parts.tensors, parts.tensors.grads)
    assert torch.equal(scattered[covered], 2 * gathered[covered])


@each_backend
@each_part
@each_history
def test_every_op(
    backend: str, kept: tuple[int, ...], row: torch.dtype, state: torch.dtype
) -> None:
    check_parts(backend, kept, row, state)


def listed(parts: Parts) -> Any:
    """The reference's ops on these parameters, as a step calls them."""
    tensors = parts.tensors
    flat = SimpleNamespace(params=tensors.params, offsets=tensors.offsets, reals=lambda t: t)
    return bound_ops._Listed(BACKENDS["reference"], flat)  # type: ignore[arg-type]


def iteration(bound: Any, parts: Parts, pair_step: float | None, origin: Tensor) -> ring.Header:
    """One step on 1/2 sum h x^2; the move comes with the direction, or after it."""
    curvature = torch.linspace(1, 3, parts.tensors.numel)
    for param, grad, offset in zip(
        parts.tensors.params, parts.tensors.grads, parts.tensors.offsets, strict=True
    ):
        h = curvature[offset : offset + param.numel()].view(param.shape)
        grad.copy_(h * param.float())
    made = parts.ring
    at = made.history, made.grad_prev, made.scalars, made.history_scale
    told = pair_step, TOL, origin, STEP, 0.0, None
    *head, moved = bound.lbfgs_update_direction(parts.tensors.grads, [], [], False, *at, *told)
    header = ring.Header(*head)
    assert header.direction_dot_grad < 0.0
    assert moved == (header.usable > 0)
    if not moved:
        bound.lbfgs_move(origin, made.history, made.scalars, made.history_scale, STEP, True)
    return header


@each_part
@pytest.mark.parametrize("row", [F32, BF16, I8], ids=str)
def test_a_layout_of_some_parameters(kept: tuple[int, ...], row: torch.dtype) -> None:
    """Steps on all parameters, then on some, then on all again."""
    everything = make_parts(range(len(SIZES)), row, F32)
    scalars, slots = everything.ring.scalars, everything.ring.slots
    for name in ("count", "usable"):
        scalars[ring.index(name, slots)] = 0.0

    def chosen(number: int) -> None:
        scalars[ring.index("set", slots)] = number

    def layout_of(parts: Parts) -> Any:
        layout = _C.Layout([parts.tensors.params], parts.tensors.offsets)
        assert layout.has_ops and layout.unchanged([{"params": parts.tensors.params}])
        return layout

    origin, all_layout = torch.zeros(everything.tensors.numel), layout_of(everything)
    for pair_step in (None, STEP, STEP):
        header = iteration(all_layout, everything, pair_step, origin)
    assert (header.count, header.usable) == (2, 2)

    tensors = everything.tensors
    some = replace(
        tensors,
        params=[tensors.params[i] for i in kept],
        grads=[tensors.grads[i] for i in kept],
        offsets=[tensors.offsets[i] for i in kept],
    )
    parts = Parts(some, everything.ring, F32, everything.buffers)
    before, layout, origin = parts.copy(), layout_of(parts), parts.origin()
    chosen(1)
    for pair_step, count, usable in ((None, 2, 0), (STEP, 3, 1), (STEP, 3, 2)):
        theirs, their_origin = parts.copy(), origin.clone()
        opened = parts.ring.opened
        header = iteration(layout, parts, pair_step, origin)
        other = iteration(listed(theirs), theirs, pair_step, their_origin)
        assert (header.count, header.usable) == (other.count, other.usable) == (count, usable)
        if pair_step is not None:
            check_zero(parts, 1, opened)
        check_zero(parts, 0, int(header.open))
        assert not parts.ring.previous[parts.left_out].any()
        assert bool(origin[parts.left_out].isnan().all())
        assert same_bits(origin, their_origin)
        check_neighbours(parts, before)
        close_scalars(parts.ring, theirs.ring, F32, row)
        for ours, expected in zip(parts.buffers, theirs.buffers, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-2, atol=2e-2)
        stats = torch.zeros(5, dtype=F64)
        at = parts.ring.history, parts.ring.scalars, stats, parts.ring.history_scale
        ours, expected = (
            torch.tensor(bound.grad_stats(some.grads, [], False, *at, None, None))
            for bound in (layout, listed(parts))
        )
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)

    chosen(0)
    header = iteration(all_layout, everything, None, torch.zeros(tensors.numel))
    assert (header.count, header.usable) == (3, 1)


def test_gradients_of_a_layout() -> None:
    tensors = make_parts(KEPT["every other"], F32, F32).tensors
    layout = _C.Layout([tensors.params[:2], tensors.params[2:]], tensors.offsets)
    assert layout.grads() is None
    for param in tensors.params:
        param.grad = torch.randn_like(param)
    grads = layout.grads()
    assert grads is not None and all(
        a is p.grad for a, p in zip(grads, tensors.params, strict=True)
    )


@each_backend
@pytest.mark.parametrize("row", [F32, BF16, I8], ids=str)
def test_no_parameters_at_all(backend: str, row: torch.dtype) -> None:
    """The gradient is zero, and no parameter moves."""
    parts = make_parts((), row, F32)
    check_parts(backend, (), row, F32)
    for name in ("count", "usable"):
        parts.ring.scalars[ring.index(name, parts.ring.slots)] = 0.0
    made, origin = parts.ring, torch.randn(parts.tensors.numel)
    stats = torch.full((5,), math.nan, dtype=F64)
    layout = _C.Layout([], []) if backend == "native" else listed(parts)
    empty = _C.Layout([[]], [])
    assert empty.has_ops and empty.grads() == [] and empty.unchanged([{"params": []}])
    at = made.history, made.grad_prev, made.scalars, made.history_scale
    numbers = layout.grad_stats([], [], False, None, None, stats, None, None, None)
    assert numbers == [0.0] * 6
    layout.lbfgs_update([], [], False, *at, None, TOL, None, False)
    *head, moved = layout.lbfgs_update_direction(
        [], [], [], False, *at, None, TOL, origin, STEP, 0.0, None
    )
    assert ring.Header(*head).direction_dot_grad == 0.0 and not moved
    layout.lbfgs_move(origin, made.history, made.scalars, made.history_scale, STEP, True)
    with pytest.raises(ValueError, match="offsets has 1 entries for 0 params"):
        BACKENDS[backend].grad_gather([], [], [0], origin)
