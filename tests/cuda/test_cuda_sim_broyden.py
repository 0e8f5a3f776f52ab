"""The Broyden update on pairs on CUDA, executed on the CPU as in test_cuda_sim.py."""

from __future__ import annotations

from typing import Any

import pytest
import test_broyden_pairs as checks
from cuda_sim import library
from ops_cases import BACKENDS

from fuse_ext.kernels import scalars as ring

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
PLAIN, TSAN = library.VARIANT == "plain", library.VARIANT == "tsan"
not_tsan = pytest.mark.skipif(TSAN, reason="the same memory accesses as in other tests")


# Up to 52 slots the scalars are worked on in shared memory.
@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("slots", [3, 11, 53] if PLAIN else [11, 53])
def test_as_natively(cuda: Any, slots: int) -> None:
    """Rings that wrap around: every number as the C++ kernels leave it, within rounding."""
    a, grads = checks.hessian(checks.N), checks.gradients()
    sides = [checks.BroydenScalars(name, slots - 1, slots // 2) for name in ("cuda", "native")]
    for _ in range(12 if TSAN else 3 * slots // 2 + 4):
        checks.go_on(sides, a, grads)
        if slots <= checks.N:  # more pairs than dimensions amplify rounding
            checks.check_alike(*sides)
        names = "held", "runs", "made_by", "held_run"
        assert [sides[0].number(n) for n in names] == [sides[1].number(n) for n in names]


@not_tsan
@pytest.mark.usefixtures("cuda")
def test_what_holds_of_it_on_every_backend() -> None:
    checks.test_secant_equation("cuda")
    checks.test_b_is_the_inverse_of_h("cuda")
    checks.test_products_of_steps_with_older_rows("cuda")
    checks.test_a_scaled_direction_ends_the_run("cuda")
    checks.test_pairs_of_sets("cuda")
    checks.test_what_is_set_aside_comes_back("cuda")
    checks.test_refused_pairs_change_nothing("cuda")
    for name in ("gram_ss", "gram_yy"):
        checks.test_h_begins_anew_where_it_is_not_positive("cuda", name)


@not_tsan
@pytest.mark.parametrize("value", [-1.0, 4.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("entry", ["held", "held_run", "runs", "made_by", "member", "run"])
def test_damaged_numbers_never_index(cuda: Any, entry: str, value: float) -> None:
    """Whatever a checkpoint holds, the kernels stay inside of their arrays."""
    ours = checks.BroydenScalars("cuda", 3, 1)
    a, grads = checks.hessian(checks.N), checks.gradients()
    for _ in range(3):
        ours.step(a, next(grads), 0.5)
    place = ring.broyden_layout(4)[entry]
    ours.broyden[place if isinstance(place, int) else slice(place[0], sum(place))] = value
    arguments = ours.data, 4, True, 0.5, 1e-8
    BACKENDS["cuda"].lbfgs_two_loop(*arguments, broyden=ours.broyden, scaled=False)
    BACKENDS["cuda"].lbfgs_two_loop(*arguments, broyden=ours.broyden, scaled=False)
    assert ours.header.count <= 3
