"""FusePV with a dense inverse Hessian: who gets one, and what becomes of it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from dense_cases import quadratic
from fuse_pv_cases import Fit, assert_same, bytes_in, snapshot
from torch import Tensor, nn

import fuse_ext
from fuse_ext import FusePV
from fuse_ext.curvature.dense import MATRIX_NAMES, matrix_nbytes, terms_apart
from fuse_ext.kernels.scalars import matrix_place
from fuse_ext.phase import modes

F32, F64 = torch.float32, torch.float64
ONE = {"deterministic": True, "switch": 5}
DENSE = {**ONE, "curvature": "dense"}


def entry(fit: Fit) -> dict[str, Any]:
    return fit.optimizer.state[fit.params[0]]


def terms(fit: Fit) -> int:
    return int(entry(fit)["matrix_scalars"][matrix_place("terms")])


def curvature(fit: Fit) -> str:
    return fit.optimizer.report().curvature


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ONE, "dense"),
        ({**ONE, "line_search": "armijo"}, "dense"),
        ({**ONE, "self_scaling": False}, "dense"),
        ({**ONE, "max_iter": 3}, "dense"),
        ({**ONE, "curvature": "pairs"}, "pairs"),
        ({**ONE, "history_size": 10}, "pairs"),
        ({**ONE, "history_dtype": torch.bfloat16}, "pairs"),
        ({**ONE, "line_search": None}, "pairs"),
        ({**ONE, "line_search": None, "max_iter": 1, "capturable": True}, "pairs"),
        ({"deterministic": False, "switch": 5}, "kronecker"),
        ({"deterministic": False, "line_search": "armijo", "switch": 5}, "pairs"),
        ({"switch": 5}, "dense"),  # found out
        ({"line_search": "approximate_wolfe", "switch": 5}, "dense"),  # so too
        ({"switch": 5, "curvature": "pairs"}, "pairs"),
        ({"line_search": "armijo", "switch": 5, "curvature": "pairs"}, "pairs"),
        (
            {"deterministic": False, "line_search": "armijo", "switch": 5, "curvature": "dense"},
            "dense",
        ),
        ({**DENSE, "history_size": 7}, "dense"),
        ({**DENSE, "line_search": None, "lbfgs_lr": 0.3}, "dense"),
    ],
    ids=str,
)
def test_who_takes_a_matrix(options: dict[str, Any], expected: str) -> None:
    fit = Fit(**options)
    fit.step(2)
    assert curvature(fit) == ""
    first = fit.step(28)[0]
    assert curvature(fit) == expected
    assert ("matrix" in entry(fit)) == (expected == "dense")
    assert fit.optimizer.phase == "lbfgs"
    assert fit.loss().item() < first
    if not options.get("capturable"):  # which holds what no report counts
        assert fit.optimizer.report().state_bytes == bytes_in(fit.optimizer)


@pytest.mark.parametrize("options", [ONE, {"switch": 5}], ids=str)
def test_largest_matrix(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert modes.MATRIX_BYTES["cpu"] == 512 * 2**20
    assert matrix_nbytes(11576) <= 512 * 2**20 < matrix_nbytes(11577)
    for spare, expected in ((0, "dense"), (-1, "pairs")):
        monkeypatch.setitem(modes.MATRIX_BYTES, "cpu", matrix_nbytes(41) + spare)
        fit = Fit(**options)
        fit.step(25)
        assert curvature(fit) == expected
    fit = Fit(**options, curvature="dense")  # which knows no bound
    fit.step(25)
    assert curvature(fit) == "dense"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "dense", "capturable": True, "line_search": None}, "capturable=True"),
        ({"curvature": "matrix"}, "curvature"),
        ({"curvature": None}, "curvature"),
        ({"update": "dfp"}, "update"),
        ({"self_scaling": "yes"}, "self_scaling"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    switch = {"switch": 5} if options.get("capturable") else {}
    with pytest.raises((ValueError, TypeError), match=message):
        Fit(**switch, **options)


def twin_of(fit: Fit, **options: Any) -> Fit:
    """Goes on from a saved file, with parameters of its own."""
    other = Fit(dtype=fit.params[0].dtype, **options)
    other.load(fit.flat)
    file = io.BytesIO()
    torch.save(fit.optimizer.state_dict(), file)
    file.seek(0)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("held", [*range(terms_apart(41))])
def test_checkpoint_in_mid_run(held: int, backend: str, dtype: torch.dtype) -> None:
    """Just before and after M takes its terms in, and between."""
    options = {**DENSE, "backend": backend}
    fit = Fit(dtype=dtype, **options)
    fit.step(9)
    while terms(fit) != held:
        fit.step()
    assert entry(fit)["matrix"].dtype == F64
    other, third = twin_of(fit, **options), copy.deepcopy(fit)
    for name in MATRIX_NAMES:
        assert_same(other.optimizer.state[other.params[0]][name], entry(fit)[name], name)
    losses = fit.step(12)
    for resumed in (other, third):
        assert resumed.step(12) == losses
        assert torch.equal(resumed.flat, fit.flat)
        evaluations = ("func_evals",)  # the point at which it stands is one more
        ours, theirs = (snapshot(of.optimizer, evaluations) for of in (resumed, fit))
        assert_same(ours, theirs)


@pytest.mark.parametrize(("saved", "told"), [("dense", "pairs"), ("pairs", "dense")])
def test_a_checkpoint_goes_on_as_it_began(saved: str, told: str) -> None:
    fit = Fit(**ONE, curvature=saved)
    fit.step(20)
    other = twin_of(fit, **ONE, curvature=told)
    assert curvature(other) == saved
    assert other.step(10) == fit.step(10)
    assert curvature(other) == saved
    begun = Fit(**ONE, curvature=told)  # in mid-run itself
    begun.step(20)
    begun.load(fit.flat)
    begun.optimizer.load_state_dict(fit.optimizer.state_dict())
    assert curvature(begun) == saved
    begun.optimizer.state_dict()
    assert begun.step(10) == fit.step(10)
    assert ("matrix" in entry(begun)) == (saved == "dense")


@pytest.mark.parametrize("name", MATRIX_NAMES)
@pytest.mark.parametrize("damage", ["short", "missing", "number"])
def test_a_damaged_matrix(name: str, damage: str) -> None:
    fit, other = Fit(**DENSE), Fit(**DENSE)
    fit.step(15)
    other.step(11)
    saved = copy.deepcopy(fit.optimizer.state_dict())
    if damage == "missing":
        del saved["state"][0][name]
    else:
        saved["state"][0][name] = (
            3.0 if damage == "number" else saved["state"][0][name][:-1].clone()
        )
    before = snapshot(other.optimizer)
    lacks = rf"state_dict lacks \['{name}'\]"
    message = lacks if damage == "missing" else f"state_dict does not fit: {name} has shape"
    with pytest.raises(ValueError, match=message):
        other.optimizer.load_state_dict(saved)
    assert_same(snapshot(other.optimizer), before)
    other.step(2)


@pytest.mark.parametrize("terms_held", [99.0, -1.0, float("nan")])
def test_damaged_numbers(terms_held: float) -> None:
    fit = Fit(**DENSE)
    fit.step(15)
    saved = copy.deepcopy(fit.optimizer.state_dict())
    saved["state"][0]["matrix_scalars"][matrix_place("terms")] = terms_held
    before = snapshot(fit.optimizer)
    with pytest.raises(ValueError, match="matrix_scalars"):
        fit.optimizer.load_state_dict(saved)
    assert_same(snapshot(fit.optimizer), before)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_estimate(dtype: torch.dtype) -> None:
    fit = Fit(dtype=dtype, deterministic=True, switch=5)
    fit.step(20)
    estimate = fuse_ext.estimate_memory(fit.params, deterministic=True)
    report = fit.optimizer.report()
    assert estimate.phases[1].state_bytes == report.state_bytes == bytes_in(fit.optimizer)
    assert report.state_bytes >= matrix_nbytes(41)
    pairs = fuse_ext.estimate_memory(fit.params, deterministic=True, curvature="pairs")
    assert pairs.phases[1].state_bytes != report.state_bytes


@pytest.mark.parametrize("update", ["broyden", "bfgs"])
def test_maximize_is_the_same_run(update: str) -> None:
    down, up = (Fit(dtype=F64, maximize=m, **DENSE, update=update) for m in (False, True))
    assert down.step(40) == [-loss for loss in up.step(40)]
    assert torch.equal(down.flat, up.flat)


class Quadratic:
    """x' A x / 2 - b' x of parameters in groups or of other kinds."""

    def __init__(self, params: list[nn.Parameter], groups: Any = None, **options: Any) -> None:
        self.params = params
        self.optimizer = FusePV(groups or params, 1e-2, **{**DENSE, **options})
        self.numel = sum(
            torch.view_as_real(p).numel() if p.is_complex() else p.numel() for p in params
        )
        self.a, self.b = quadratic(self.numel, 100.0)

    @property
    def x(self) -> Tensor:
        return torch.cat(
            [(torch.view_as_real(p) if p.is_complex() else p).reshape(-1) for p in self.params]
        )

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = 0.5 * self.x @ self.a @ self.x - self.b @ self.x
        loss.backward()
        return loss

    def error(self, decay: float = 0.0) -> float:
        matrix = self.a + decay * torch.eye(self.numel, dtype=F64)
        return float((self.x.detach() - torch.linalg.solve(matrix, self.b)).norm())


def parameters(*sizes: int, dtype: torch.dtype = F64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(size, dtype=dtype)) for size in sizes]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("update", ["broyden", "bfgs"])
@pytest.mark.parametrize("self_scaling", [None, False])
@pytest.mark.parametrize("case", ["plain", "decay", "groups", "complex"])
def test_converges(case: str, self_scaling: bool | None, update: str, backend: str) -> None:
    options = {"update": update, "self_scaling": self_scaling, "backend": backend}
    params, groups, decay = parameters(7, 8), None, 0.0
    if case == "decay":
        decay = options["weight_decay"] = 0.5
    elif case == "groups":
        groups = [{"params": params[:1]}, {"params": params[1:]}]
    elif case == "complex":
        params = [*parameters(4, dtype=torch.complex128), *parameters(7)]
    fit = Quadratic(params, groups, **options)
    for k in range(150):
        fit.optimizer.step(fit.closure)
        if case == "groups" and k == 10:
            fit.optimizer.param_groups[1]["lr"] = 5e-3  # half a share from now on
            assert fit.optimizer.phase == "lbfgs"
    assert fit.error(decay) < 1e-5
    report = fit.optimizer.report()
    assert report.curvature == "dense"
    assert report.pairs_accepted > 15


def test_a_new_group_begins_anew() -> None:
    fit = Quadratic(parameters(6))
    for _ in range(20):
        fit.optimizer.step(fit.closure)
    fit.params += parameters(5)
    fit.a, fit.b = quadratic(11, 10.0)
    fit.numel = 11
    fit.optimizer.add_param_group({"params": fit.params[1:]})
    for _ in range(60):
        fit.optimizer.step(fit.closure)
    assert fit.error() < 1e-5
    assert fit.optimizer.report().curvature == "dense"


def test_a_matrix_stays_where_none_would_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one from a GPU, in a run that finds out once more that it is of one function."""
    fit = Fit(switch=5, line_search="approximate_wolfe")
    fit.step(25)
    assert curvature(fit) == "dense"
    monkeypatch.setitem(modes.MATRIX_BYTES, "cpu", 0)
    fit.optimizer.new_objective()
    fit.step(25)
    assert curvature(fit) == "dense"
