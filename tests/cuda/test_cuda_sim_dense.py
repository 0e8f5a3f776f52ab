"""dense_direction on CUDA, executed on the CPU as in test_cuda_sim.py, against its PyTorch twin."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from cuda_sim import library
from dense_cases import (
    F32,
    F64,
    defined,
    dense_arguments,
    header_index,
    inverse_hessian,
    new_arguments,
    quadratic,
)
from ops_cases import BACKENDS, clone_arguments, same_bits
from torch import Tensor

from fuse_ext import FusePV
from fuse_ext.kernels import ops
from fuse_ext.kernels.scalars import matrix_place

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())

PLAIN, TSAN = library.VARIANT == "plain", library.VARIANT == "tsan"
# Around tiles of 8 and squares of 64; more squares than blocks, and more rounds than one.
SIZES = (0, 1, 7, 8, 9, 63, 64, 65, 129, 257, 1000)
if not PLAIN:
    SIZES = (137,) if TSAN else (0, 7, 257)
not_tsan = pytest.mark.skipif(TSAN, reason="the same memory accesses as in other tests")
plain_only = pytest.mark.skipif(not PLAIN, reason="nothing here for a sanitizer to see")
# Sums in another order. A direction in float32 may be rounded to its neighbour.
TOLERANCES = {F32: {"rtol": 1e-6, "atol": 1e-7}, F64: {"rtol": 1e-9, "atol": 1e-10}}


def after(backend: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments after the op, which gets its own copies."""
    mine = clone_arguments(arguments)
    BACKENDS[backend].dense_direction(**mine)
    return mine


def check(arguments: dict[str, Any], twin: str = "reference") -> dict[str, Any]:
    """The op as the twin has it. Returns its arguments after the call."""
    ours, expected = after("cuda", arguments), after(twin, arguments)
    wanted = defined(expected)
    # The direction is rounded to the state's dtype, and what is told of it is of the rounded one.
    state = TOLERANCES[arguments["grad"].dtype]
    for name, value in defined(ours).items():
        rounded = name in ("direction", "scalars")
        torch.testing.assert_close(
            value,
            wanted[name],
            equal_nan=True,
            **(state if rounded else TOLERANCES[F64]),
            msg=lambda m, name=name: f"{name}: {m}",
        )
    return ours


def number(arguments: dict[str, Any], name: str) -> float:
    return float(arguments["matrix_scalars"][matrix_place(name)])


@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("numel", SIZES)
def test_every_size(numel: int, dtype: torch.dtype) -> None:
    # A pair beside the terms; one that M takes in with them; and none.
    check(dense_arguments(numel, dtype, held=2, room=4))
    full = check(dense_arguments(numel, dtype, held=2, room=3, shares=numel > 0))
    check(dense_arguments(numel, dtype, held=1, room=3, pair_step=None))
    check(new_arguments(numel, dtype))
    if numel:
        assert number(full, "terms") == 0.0
        assert number(full, "scale") == 1.0


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("room", [1, 2, 32])
def test_every_number_of_terms(room: int) -> None:
    for held in {0, 1, room // 2, room - 1} - {room}:
        check(dense_arguments(137, held=held, room=room))


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("self_scaling", [False, True])
@pytest.mark.parametrize("broyden", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_every_formula(exact: bool, broyden: bool, self_scaling: bool) -> None:
    # s'Bs below and above s'y; pairs of all parameters and of a few.
    for step, taking_part in product((0.1, 0.5, 3.0), (137, 5)):
        told = {"broyden": broyden, "self_scaling": self_scaling, "pair_step": step}
        check(dense_arguments(137, F64, exact=exact, taking_part=taking_part, **told))


@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("held", [0, 2])
def test_a_product_that_is_not_known(held: int) -> None:
    for dtype in (F32, F64):
        check(dense_arguments(137, dtype, held=held, known=False))
        check(dense_arguments(137, dtype, held=held, known=False, pair_step=None))
        # The same as if it were.
        arguments = dense_arguments(137, dtype, held=held)
        known = after("cuda", arguments)
        arguments["matrix_scalars"][matrix_place("known")] = 0.0
        arguments["vectors"][-1] = math.nan
        for name in ("direction", "matrix_scalars"):
            again = after("cuda", arguments)[name]
            torch.testing.assert_close(again, known[name], **TOLERANCES[dtype])


@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("known", [False, True])
def test_refused_pairs(known: bool) -> None:
    arguments = dense_arguments(137, known=known, pair_step=-0.5)
    ours = check(arguments)
    assert ours["scalars"][header_index("skipped")] == 1.0
    assert number(ours, "pairs") == number(arguments, "pairs")
    assert number(ours, "known") == 1.0
    check(new_arguments(137, pair_step=0.5))  # s = 0
    check(dense_arguments(137, curvature_tol=1.0, known=known))


@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("held", [0, 2])
def test_first_pairs_and_new_beginnings(held: int) -> None:
    for dtype in (F32, F64):
        for room in (held + 1, 4):
            first = dense_arguments(137, dtype, held=held, room=room)
            first["matrix_scalars"].zero_()
            first["matrix"].fill_(math.nan)
            assert number(check(first), "pairs") == 1.0
            # y'Hy < 0: H is no more positive definite.
            lost = dense_arguments(137, dtype, held=held, room=room, known=False)
            lost["matrix"].mul_(-5.0)
            ours = check(lost)
            assert number(ours, "pairs") == 1.0
            torch.linalg.cholesky(inverse_hessian(ours))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("numel", [1, 9, 65, 257] if PLAIN else [9])
def test_runs(numel: int, dtype: torch.dtype) -> None:
    """Forty iterations on a convex quadratic, each as the twin has it; terms are taken in."""
    curvature, x = quadratic(numel, 1000.0)
    start, taken_in = float((curvature @ x).norm()), 0
    arguments = new_arguments(numel, dtype, room=3)
    for iteration in range(6 if TSAN else 40):
        arguments["grad"].copy_(curvature @ x)
        arguments = check(arguments)
        taken_in += number(arguments, "pairs") > 1.0 and number(arguments, "terms") == 0.0
        arguments["pair_step"] = 1.0 if iteration else 1e-3
        x += arguments["pair_step"] * arguments["direction"].double()
        if iteration % 10 == 7:  # as after set_grad_prev
            arguments["matrix_scalars"][matrix_place("known")] = 0.0
        if float((curvature @ x).norm()) < 1e-5 * start:
            break  # what is left are differences of rounded numbers
    assert float((curvature @ x).norm()) < 0.1 * start or TSAN
    assert taken_in >= (0 if numel == 1 or TSAN else 8)


@not_tsan
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_same_bits_in_every_schedule(cuda: library.SimulatedOps, dtype: torch.dtype) -> None:
    arguments = dense_arguments(257, dtype, held=2, room=3, known=False, shares=True)
    first = after("cuda", arguments)
    for order, seed in (("forward", 0), ("reverse", 0), ("shuffled", 5), ("shuffled", 6)):
        cuda.schedule(order, seed)
        for name, value in after("cuda", arguments).items():
            assert not isinstance(value, Tensor) or same_bits(value, first[name]), (name, order)


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", ["matrix", "vectors", "grad", "direction"])
def test_addresses_that_no_vector_may_have(name: str) -> None:
    for room in (3, 4):
        arguments = dense_arguments(137, room=room)
        value = arguments[name]
        whole = torch.zeros(value.numel() + 1, dtype=value.dtype)
        arguments[name] = whole[1:].view(value.shape).copy_(value)
        mine = {key: v for key, v in arguments.items() if key != name}
        ours, moved = clone_arguments(mine), arguments[name].clone()
        expected = after("reference", arguments)
        BACKENDS["cuda"].dense_direction(**ours, **{name: arguments[name]})
        assert not torch.equal(moved, arguments[name]) or name in ("grad", "matrix")
        ours[name] = arguments[name]
        torch.testing.assert_close(ours["direction"], expected["direction"], **TOLERANCES[F32])
        torch.testing.assert_close(
            defined(ours)["matrix"], defined(expected)["matrix"], **TOLERANCES[F64]
        )
    # Rows an odd number of elements apart.
    arguments = dense_arguments(137, room=3)
    vectors = torch.full((7, 149), math.nan, dtype=F64)
    vectors[:, :144] = arguments["vectors"][:, :144]
    check(arguments | {"vectors": vectors})


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("value", [-1.0, 4.0, 1e30, math.nan, math.inf])
def test_damaged_scalars_never_index(value: float) -> None:
    """The host does not read them; no direction comes, and with a pair H begins anew."""
    arguments = dense_arguments(137, room=4)
    arguments["matrix_scalars"][matrix_place("terms")] = value
    ours = after("cuda", arguments | {"pair_step": None})
    assert bool(ours["direction"].isnan().all())
    ours = after("cuda", arguments)
    assert (number(ours, "terms"), number(ours, "pairs")) == (1.0, 1.0)
    assert bool(ours["direction"].isfinite().all())


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradients_show(value: float) -> None:
    arguments = dense_arguments(137)
    arguments["grad"][70] = value
    ours = after("cuda", arguments)
    assert not math.isfinite(ours["scalars"][header_index("direction_sq")])
    assert ours["scalars"][header_index("skipped")] == 1.0


@plain_only
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("grad", Tensor.half, TypeError, "grad has dtype"),
        ("grad_prev", lambda t: t[1:], ValueError, "grad_prev has shape"),
        ("direction", Tensor.double, TypeError, "direction has dtype"),
        ("matrix", lambda t: t[1:], ValueError, "matrix has shape"),
        ("vectors", lambda t: t[1:], ValueError, "vectors has shape"),
        ("matrix_scalars", lambda t: t[1:], ValueError, "matrix_scalars has shape"),
        ("scalars", lambda t: t[1:], ValueError, "scalars has shape"),
        ("lr_scale", Tensor.double, TypeError, "lr_scale has dtype"),
    ],
)
def test_bad_state_is_refused(name: str, change: Any, kind: Any, message: str) -> None:
    arguments = dense_arguments(20, shares=True)
    with pytest.raises(kind, match=message):
        BACKENDS["cuda"].dense_direction(**arguments | {name: change(arguments[name])})


@plain_only
def test_an_optimizer_with_a_matrix(
    cuda: library.SimulatedOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FusePV(curvature="dense") on the simulated device as on the CPU, and its launches."""
    curvature, start = quadratic(90, 10.0)
    iterates, launches = [], set()
    for kernels in (cuda, BACKENDS["native"]):
        monkeypatch.setattr(ops, "select", lambda *_, kernels=kernels: kernels)
        xs = [start[:50].float().requires_grad_(), start[50:].float().view(4, 10).requires_grad_()]
        optimizer = FusePV(xs, switch=0, line_search=None, lbfgs_lr=1.0, curvature="dense")
        for step in range(20):
            g = (curvature @ torch.cat([x.detach().flatten() for x in xs]).double()).float()
            xs[0].grad, xs[1].grad = g[:50].clone(), g[50:].view(4, 10).clone()
            before = cuda.launches()
            optimizer.step()
            if step:
                launches.add(cuda.launches() - before)
        iterates.append(torch.cat([x.detach().flatten() for x in xs]))
    assert iterates[1].norm() < 1e-2 * start.norm()
    torch.testing.assert_close(iterates[0], iterates[1], rtol=1e-2, atol=1e-3)
    assert launches == {0, 7}, launches
