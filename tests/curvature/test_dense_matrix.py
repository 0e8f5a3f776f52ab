"""The dense inverse Hessian: the kernel against its twin, and the class around it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_cases import F32, F64, SLOTS, defined, inverse_hessian, new_arguments, quadratic
from ops_cases import BACKENDS, NATIVE, same_bits
from test_dense import FORMULAS, call, close, copy_of, number, textbook
from torch import Tensor

import fuse_ext
from fuse_ext.curvature.dense import MATRIX_NAMES, DenseMatrix, terms_apart
from fuse_ext.curvature.ring import History
from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.reference.dense import as_square
from fuse_ext.vector.flat import FlatParams

SIZES = (1, 3, 8, 257, 1000)


def steps(arguments: dict[str, Any], count: int) -> Any:
    """Arguments before each of so many steps; between them whoever asks calls the op."""
    numel, dtype = arguments["grad"].numel(), arguments["grad"].dtype
    generator = torch.Generator().manual_seed(3)
    for k in range(count):
        t = 0.3 + float(torch.rand((), generator=generator))
        noise = 0.1 + torch.rand(numel, generator=generator, dtype=F64)
        if k:  # of another quadratic each time
            y = 2 * t * arguments["direction"].double() * noise
            arguments["grad"].copy_((arguments["grad_prev"].double() + y).to(dtype))
            arguments["pair_step"] = t
        yield arguments


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("formula", ["bfgs", "scaled-broyden"])
@pytest.mark.parametrize("numel", SIZES)
def test_twin(numel: int, formula: str, dtype: torch.dtype) -> None:
    """Every step from where the native op stands, so that no rounding adds up."""
    arguments = new_arguments(numel, dtype, terms_apart(numel), **FORMULAS[formula])
    taken_in = 0
    for here in steps(arguments, 30 if numel == 1000 else 60):
        twin = copy_of(here)
        call("native", here)
        call("reference", twin)
        ours, theirs = defined(here), defined(twin)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            rounded = dtype == F32 and name in ("direction", "scalars")
            scale = float(theirs[name].nan_to_num(0.0).abs().max()) if value.numel() else 0.0
            torch.testing.assert_close(
                value,
                theirs[name],
                rtol=1e-6 if rounded else 1e-9,
                atol=scale * (1e-7 if rounded else 1e-10),
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        taken_in += number(here, "pairs") > 0 and number(here, "terms") == 0
    assert taken_in >= 1
    assert number(arguments, "pairs") >= 29


def results(threads: int = 1) -> dict[str, dict[str, Tensor]]:
    torch.set_num_threads(threads)
    found = {}
    for numel in SIZES:
        for dtype in (F32, F64):
            torch.manual_seed(numel)
            arguments = new_arguments(numel, dtype, terms_apart(numel))
            for here in steps(arguments, 20):
                call("native", here)
            name = f"{numel} {dtype}"
            found[name] = {k: v.clone() for k, v in defined(arguments).items()}
    return found


def test_threads() -> None:
    one, two = results(1), results(2)
    for case in one:
        for name in one[case]:
            assert same_bits(one[case][name], two[case][name]), (case, name)


def test_levels(tmp_path: Path) -> None:
    here = fuse_ext.build_info()["cpu_level"]
    ours, tested = results(), []
    for level in ("default", "avx2", "avx512"):
        path = tmp_path / level
        done = subprocess.run(
            [sys.executable, __file__, str(path)],
            env=os.environ
            | {
                "FUSE_EXT_CPU_LEVEL": level,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if "is not available here" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == level
        tested.append(level)
        theirs = torch.load(path)
        for case in ours:
            # Sums in another order; a direction in float32 is rounded, and goes another way.
            for name in ("numbers", "direction", "known"):
                a, b = ours[case][name], theirs[case][name]
                if level == here:
                    assert same_bits(a, b), (level, case, name)
                scale = float(a.abs().max())
                rough = 1e-2 if a.dtype == F32 or "float32" in case else 1e-6
                torch.testing.assert_close(a, b, rtol=rough, atol=rough * scale)
    assert here in tested


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [2, 8, 21])
def test_rounding_does_not_grow(n: int, backend: str) -> None:
    """Whatever of M is not symmetric no pair would take away, and each would divide it by tau."""
    arguments = new_arguments(n, F64, 4)
    call(backend, arguments)
    for k in range(1, 401):
        a = quadratic(n, 30.0)[0]
        arguments["grad"].normal_()
        call(backend, arguments, pair_step=None)
        s = 0.7 * arguments["direction"]
        y = a @ s
        arguments["grad"].add_(y)
        call(backend, arguments, pair_step=0.7)
        assert number(arguments, "pairs") == k  # it never begins anew
    square = as_square(arguments["matrix"], n)
    assert torch.equal(square, square.T)
    h = inverse_hessian(arguments)
    close(h @ y, s, 1e-9 * float(s.norm()))
    assert torch.linalg.eigvalsh((h + h.T) / 2)[0] > 0


class Made:
    """A matrix of a few parameters, and what it holds."""

    def __init__(self, *sizes: int, dtype: torch.dtype = F64, **options: Any) -> None:
        self.params = [torch.randn(n, dtype=dtype, requires_grad=True) for n in sizes]
        self.flat, self.entry = FlatParams([{"params": self.params}]), {}
        self.matrix = DenseMatrix(self.flat, NATIVE, self.entry, **options)

    @property
    def h(self) -> Tensor:
        names = {"matrix": "matrix", "vectors": "matrix_vectors"}
        held = {name: self.entry[key] for name, key in names.items()}
        held |= {"matrix_scalars": self.entry["matrix_scalars"], "grad": self.flat.new_vector()}
        return inverse_hessian(held)

    def direction(self, grads: list[Tensor], t: float | None = None, **options: Any) -> Tensor:
        count = len(grads)
        self.matrix.update_direction(grads, [0.0] * count, options.get("shares", []), False, t, 0.0)
        return self.entry["history"][0, 0].clone()

    def told(self, name: str) -> float:
        return float(self.entry["scalars"][ring.index(name, SLOTS)])

    def offer_some(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Pairs of one quadratic."""
        n = self.flat.numel
        a, pairs = quadratic(n, 10.0)[0], []
        for _ in range(count):
            s = torch.randn(n, dtype=F64)
            pairs.append((s, a @ s))
            self.matrix._offer(s.to(self.flat.dtype), (a @ s).to(self.flat.dtype))
        return pairs


def bfgs_of(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    s, y = pairs[0]
    h = (s @ y) / (y @ y) * torch.eye(len(s), dtype=F64)
    for s, y in pairs:
        h = textbook(h, s, y, **FORMULAS["bfgs"])
    return h


@pytest.mark.parametrize("self_scaling", [False, True])
def test_offered_pairs_are_taken_in_by_bfgs(self_scaling: bool) -> None:
    made = Made(5, 6, update="bfgs", self_scaling=self_scaling)
    pairs = made.offer_some(1)
    first = made.h  # s.B s is known of the first alone
    assert made.told("accepted") == 1
    pairs += made.offer_some(8)
    expected = first
    for s, y in pairs[1:]:
        expected = textbook(expected, s, y, **FORMULAS["bfgs"])
    close(made.h, expected, 1e-9)
    header = made.matrix.header()
    assert header.count == header.usable == header.accepted == 9
    made.matrix._offer(pairs[0][0], -pairs[0][1])
    close(made.h, expected, 1e-9)
    assert made.matrix.header().skipped == 1


@pytest.mark.parametrize("count", [1, 5, 12])
def test_take_over(count: int) -> None:
    made = Made(11, update="bfgs", self_scaling=False)
    older = History(made.flat, NATIVE, {}, 20, None)
    a, pairs, g = quadratic(11, 10.0)[0], [], torch.randn(11, dtype=F64)
    older.update_direction([g], [0.0], [], False, None, 0.0)
    for _ in range(count):
        s = 0.5 * older.waiting()[0]
        pairs.append((s, a @ s))
        g = g + a @ s
        older.update_direction([g], [0.0], [], False, 0.5, 0.0)
    p, at = older.waiting()
    assert torch.equal(at, g)
    made.matrix.take_over(older)
    close(made.h, bfgs_of(pairs), 1e-9)
    assert made.matrix.header().usable == count
    assert made.told("accepted") == made.told("skipped") == 0
    assert torch.equal(made.entry["history"][0, 0], p)
    assert torch.equal(made.entry["history"][1, 0], g)
    # The step on which the ring was becomes the next pair.
    after = g + a @ (0.5 * p)
    h = textbook(made.h, 0.5 * p, a @ (0.5 * p), **FORMULAS["bfgs"])
    close(made.direction([after], 0.5), -h @ after, 1e-9)


def test_another_gradient_in_its_place() -> None:
    made = Made(9, update="bfgs", self_scaling=False)
    made.offer_some(3)
    p = made.direction([torch.randn(9, dtype=F64)])
    g, y, h = torch.randn(9, dtype=F64), -0.3 * p * (-1.0), made.h
    made.matrix.set_grad_prev(g)
    assert torch.equal(made.entry["history"][0, 0], p)
    made.direction([g + y], 0.5)
    close(made.h, textbook(h, 0.5 * p, y, **FORMULAS["bfgs"]), 1e-9)


def test_other_parameters_begin_anew() -> None:
    made = Made(4, 5)
    part = made.flat.part((1,))
    assert not made.matrix.enter(made.flat.whole)
    made.offer_some(5)
    assert not made.matrix.enter(made.flat.whole)
    assert made.matrix.header().usable == 5
    assert made.matrix.enter(part)
    assert made.matrix.header().usable == 0
    assert torch.equal(made.h, torch.eye(9, dtype=F64))
    g = torch.randn(4, dtype=F64)
    p = made.direction([g])
    assert torch.equal(p[:4], -g)
    assert not p[4:].any()


def test_reset() -> None:
    made = Made(12)
    made.offer_some(6)
    made.matrix.reset()
    assert torch.equal(made.h, torch.eye(12, dtype=F64))
    assert made.matrix.header().usable == 0
    assert made.matrix.header().accepted == 6
    g = torch.randn(12, dtype=F64)
    assert torch.equal(made.direction([g]), -g)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("sizes", [(1,), (7, 2), (300,)])
def test_memory(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    made = Made(*sizes, dtype=dtype)
    tensors = [value for value in made.entry.values() if isinstance(value, Tensor)]
    assert made.matrix.nbytes == sum(t.untyped_storage().nbytes() for t in tensors)
    assert all(made.entry[name].dtype == F64 for name in MATRIX_NAMES)
    assert made.entry["history"].dtype == dtype
    made.offer_some(5)
    other = DenseMatrix(made.flat, NATIVE, dict(made.entry))
    assert other.header() == made.matrix.header()


def test_shares_of_groups() -> None:
    made = Made(3, 4, self_scaling=False)
    pairs = made.offer_some(4)
    h, g = made.h, torch.randn(7, dtype=F64)
    p = made.direction([g[:3], g[3:]], shares=[1.0, 0.5])
    close(p, -torch.tensor([1.0] * 3 + [0.5] * 4, dtype=F64) * (h @ g), 1e-12)
    y = pairs[0][1] * float(torch.sign(pairs[0][1] @ p))
    made.direction([(g + y)[:3], (g + y)[3:]], 0.5, shares=[1.0, 1.0])
    close(made.h, textbook(h, 0.5 * p, y, **FORMULAS["bfgs"]), 1e-9 * float(made.h.abs().max()))


if __name__ == "__main__":
    torch.save(results(), sys.argv[1])
    print(fuse_ext.build_info()["cpu_level"])
