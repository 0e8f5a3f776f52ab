"""History rows in 8 bits: whole numbers in [-127, 127] times one scale per 128 elements."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fuse_ext import LBFGS, Fuse, FusePV
from fuse_ext.curvature.ring import History
from fuse_ext.kernels import ops
from fuse_ext.kernels.reference.memory import SCALE_BLOCK
from fuse_ext.vector.flat import FlatParams

CPU = torch.device("cpu")
SIZES = (1, 2, 127, 128, 129, 4095, 4097, 9001)


def make_history(param: Tensor, backend: str, history_size: int = 3) -> History:
    flat = FlatParams([{"params": [param]}])
    entry: dict[str, Any] = defaultdict(dict)
    return History(flat, ops.select(backend, CPU), entry, history_size, torch.int8)


def stored(history: History, side: int, slot: int, dtype: torch.dtype) -> Tensor:
    """A row as the kernels read it, from its definition."""
    assert history.scales is not None
    numel = history.rows.size(2)
    scale = history.scales[side, slot].to(dtype).repeat_interleave(SCALE_BLOCK)[:numel]
    return history.rows[side, slot].to(dtype) * scale


def fixed_steps(history: History, param: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fixed steps on 1/2 sum h x^2; the direction, and the scale of its every element."""
    h = torch.linspace(1, 9, param.numel(), dtype=param.dtype)
    origin = torch.zeros_like(param)
    pair_step = None
    for _ in range(steps):
        grads = [h * param]
        history.update(grads, [], False, pair_step, 1e-8)
        header = history.direction(grads, [], [], False)
        direction = stored(history, 0, int(header.open), param.dtype)
        assert history.scales is not None
        scales = history.scales[0, int(header.open)].repeat_interleave(SCALE_BLOCK)[: param.numel()]
        history.move(origin, 0.5, save=True)
        pair_step = 0.5
        yield direction, scales.clone()


def run(history: History, param: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """The direction and parameters of each of the fixed steps."""
    return [(p, param.clone()) for p, _ in fixed_steps(history, param, steps)]


def copy_state(to: History, of: History) -> None:
    for name in ("rows", "scales", "grad_prev", "scalars"):
        getattr(to, name).copy_(getattr(of, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_kernels_agree_with_the_reference(numel: int, dtype: torch.dtype) -> None:
    """Every step by itself, from the reference's state: m = 3 pairs, so the ring goes round."""
    param = torch.randn(numel, dtype=dtype)
    start = param.clone()
    native, reference = make_history(param, "native"), make_history(start, "reference")
    for (p, scales), (q, _) in zip(
        fixed_steps(native, param, 7), fixed_steps(reference, start, 7), strict=True
    ):
        # A sum rounded otherwise may move an element across the middle between two whole numbers:
        # then one step of its scale is the difference.
        assert bool(((p - q).abs() <= 1.01 * scales + 1e-5 * q.abs().max()).all())
        torch.testing.assert_close(param, start, rtol=1e-4, atol=float(scales.max()))
        copy_state(native, reference)
        param.copy_(start)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("numel", SIZES)
def test_rows_are_rounded_to_nearest(numel: int, backend: str) -> None:
    """The first direction is -g; each element is within half a step of its block's scale."""
    param = torch.zeros(numel)
    history = make_history(param, backend)
    g = torch.randn(numel) * torch.logspace(-3, 3, numel)
    history.update([g], [], False, None, 0.0)
    header = history.direction([g], [], [], False)
    row = stored(history, 0, 0, torch.float32)
    assert history.scales is not None
    for block, scale in enumerate(history.scales[0, 0].tolist()):
        place = slice(block * SCALE_BLOCK, (block + 1) * SCALE_BLOCK)
        largest = float(g[place].abs().max())
        assert scale == pytest.approx(largest / 127, rel=1e-6)
        assert (row[place] + g[place]).abs().max() <= 0.5001 * scale
    # The sums are those of what was stored.
    assert header.direction_sq == pytest.approx(float((row.double() ** 2).sum()), rel=1e-5)
    assert header.direction_dot_grad == pytest.approx(float(row.double() @ g.double()), rel=1e-5)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_pair_is_the_rounded_pair(backend: str) -> None:
    """s.y and y.y come from the rows as stored, and so does the step."""
    param = torch.randn(1000, dtype=torch.float64)
    history = make_history(param, backend)
    before = param.clone()
    run(history, param, 1)
    moved = param - before
    g = torch.linspace(1, 9, 1000, dtype=torch.float64) * param
    history.update([g], [], False, 0.5, 1e-8)
    s, y = 0.5 * stored(history, 0, 0, param.dtype), stored(history, 1, 0, param.dtype)
    torch.testing.assert_close(moved, s, rtol=1e-12, atol=1e-12)
    assert history.header().gamma == pytest.approx(float(s @ y) / float(y @ y), rel=1e-12)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(bad: float, backend: str) -> None:
    history = make_history(torch.zeros(300), backend)
    g = torch.ones(300)
    g[200] = bad
    history.update([g], [], False, None, 0.0)
    header = history.direction([g], [], [], False)
    assert header.direction_sq != header.direction_sq
    row = stored(history, 0, 0, torch.float32)
    assert row[128:256].isnan().all()
    assert row[:128].isfinite().all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_block_of_zeros(backend: str) -> None:
    history = make_history(torch.zeros(300), backend)
    g = torch.zeros(300)
    g[0] = 1
    history.update([g], [], False, None, 0.0)
    assert history.direction([g], [], [], False).direction_sq == pytest.approx(1)
    torch.testing.assert_close(stored(history, 0, 0, torch.float32), -g)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("size", [1e-40, 1e-42, 2.8e-45])
def test_a_block_below_the_normal_numbers_is_zero(size: float, backend: str) -> None:
    """Its scale would have lost digits, or have no inverse."""
    history = make_history(torch.zeros(300), backend)
    g = torch.full((300,), size)
    g[:128] = torch.linspace(-1, 1, 128)
    g[150] = 0.0
    history.update([g], [], False, None, 0.0)
    history.direction([g], [], [], False)
    row = stored(history, 0, 0, torch.float32)
    assert not history.rows[0, 0, 128:].any() and not row[128:].any()
    torch.testing.assert_close(row[:128], -g[:128], rtol=0.0, atol=0.5 / 127)


def test_threads_do_not_matter() -> None:
    results = []
    for threads in (1, 2):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        param = torch.randn(50_001)
        results.append(run(make_history(param, "native"), param, 4))
    for (p, x), (q, y) in zip(*results, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(x, y)


def rosenbrock(x: Tensor) -> Tensor:
    return ((1 - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2).sum()


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * (torch.logspace(0, 4, x.numel(), dtype=x.dtype) * x**2).sum()


@pytest.mark.parametrize(("loss_fn", "numel"), [(rosenbrock, 10), (quadratic, 200)])
def test_it_converges_about_as_fast(loss_fn: Any, numel: int) -> None:
    """The same loss after about as many evaluations as with a full-precision history."""

    def evaluations(history_dtype: torch.dtype | None) -> int:
        torch.manual_seed(0)
        x = torch.nn.Parameter(torch.randn(numel, dtype=torch.float64))
        opt = LBFGS(
            [x],
            max_iter=1,
            history_size=10,
            line_search_fn="strong_wolfe",
            history_dtype=history_dtype,
            deterministic=True,
        )
        count = 0

        def closure() -> Tensor:
            nonlocal count
            count += 1
            opt.zero_grad()
            loss = loss_fn(x)
            loss.backward()
            return loss

        first = loss = float(opt.step(closure))
        while loss > 1e-10 * first:
            loss = float(opt.step(closure))
            assert count < 2000, loss
        return count

    assert evaluations(torch.int8) <= 1.5 * evaluations(None)


@pytest.mark.parametrize("kind", [LBFGS, FusePV, Fuse])
def test_checkpoints_go_on_bit_for_bit(kind: Any) -> None:
    options: dict[str, Any] = {"history_size": 3, "history_dtype": torch.int8}
    if kind is LBFGS:
        options["max_iter"] = 1
    if kind is FusePV:
        options |= {"switch": 2, "lr": 0.01}
    x = torch.nn.Parameter(torch.full((300,), -1.0))

    def advance(x: Tensor, opt: Any) -> None:
        def closure() -> Tensor:
            opt.zero_grad()
            loss = rosenbrock(x)
            loss.backward()
            return loss

        for _ in range(6):
            opt.step(closure)

    opt = kind([x], **options)
    advance(x, opt)
    y = torch.nn.Parameter(x.detach().clone())
    other = kind([y], **options)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    advance(x, opt)
    advance(y, other)
    assert torch.equal(x, y)
    broken = copy.deepcopy(opt.state_dict())
    del broken["state"][0]["history_scale"]
    with pytest.raises(ValueError, match="history_scale"):
        other.load_state_dict(broken)


def test_memory() -> None:
    """At most 30 bytes a parameter at m = 10, where float32 holds 88."""
    x = torch.nn.Parameter(torch.zeros(1_000_000))
    opt = LBFGS([x], max_iter=1, history_size=10, history_dtype=torch.int8)
    opt.step(lambda: (x.grad is None and setattr(x, "grad", torch.ones_like(x))) or 1.0)
    state = sum(v.untyped_storage().nbytes() for v in opt.state[x].values() if torch.is_tensor(v))
    assert state <= 30 * x.numel()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"history_scale": None}, ValueError, "history_scale belongs to an int8 history"),
        ({"history": torch.zeros(2, 4, 300)}, ValueError, "history_scale belongs to an int8"),
        ({"history_scale": torch.zeros(2, 4, 2)}, ValueError, r"history_scale has shape \[2, 4, 2"),
        (
            {"history_scale": torch.zeros(2, 4, 3, dtype=torch.float64)},
            TypeError,
            "history_scale has dtype Double",
        ),
    ],
    ids=["missing", "for float32", "shape", "dtype"],
)
def test_scales_must_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    param = torch.zeros(300)
    history = make_history(param, "native")
    arguments: dict[str, Any] = {
        "params": [param],
        "grads": [torch.ones(300)],
        "offsets": [0],
        "weight_decay": [],
        "maximize": False,
        "history": history.rows,
        "grad_prev": history.grad_prev,
        "scalars": history.scalars,
        "form_pair": False,
        "history_scale": history.scales,
    }
    with pytest.raises(error, match=message):
        ops.select("native", CPU).lbfgs_update(**{**arguments, **change})


@pytest.mark.parametrize(
    "name", ["grad_stats", "lbfgs_update", "lbfgs_direction", "lbfgs_set_out", "lbfgs_move"]
)
def test_opcheck(name: str) -> None:
    param = torch.randn(300)
    history = make_history(param, "native")
    run(history, param, 3)
    places = ([param], [torch.randn(300)], [0])
    ring = (history.rows, history.grad_prev, history.scalars)
    arguments: dict[str, tuple[Any, ...]] = {
        "grad_stats": (*places, [], False, ring[0], ring[2], torch.zeros(5, dtype=torch.float64)),
        "lbfgs_update": (*places, [], False, *ring, True),
        "lbfgs_direction": (*places, [], [], False, *ring),
        "lbfgs_set_out": (*places, [], [], False, *ring, torch.zeros(300), 0.5),
        "lbfgs_move": ([param], [0], torch.zeros(300), ring[0], ring[2], 0.5, True),
    }
    op = getattr(torch.ops.fuse_ext, name).default
    torch.library.opcheck(op, arguments[name], {"history_scale": history.scales})
