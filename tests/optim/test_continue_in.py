"""continue_in(): where the rounding of float32 has ended a run, float64 goes on from there."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adam_cases import snapshot
from fuse_pv_cases import until_converged
from torch import Tensor, nn

from fuse_ext import LBFGS, AtOnce, FusePV

F32, F64 = torch.float32, torch.float64
SOLUTION = torch.linspace(-1, 1, 12, dtype=F64)
MAX_STEPS = 1500


class LeastSquares:
    """60 equations in 12 unknowns, exact but for ``noise``, in two blocks of unlike scales."""

    def __init__(
        self, make: Callable[[Any], Any], noise: float = 0.0, dtype: torch.dtype = F32
    ) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=F64)

        self._a = normal(60, 12) * torch.logspace(0, 2, 12, dtype=F64)
        self._b = self._a @ SOLUTION + noise * normal(60)
        self.blocks = [torch.zeros(6, dtype=dtype, requires_grad=True) for _ in range(2)]
        self.calls = 0
        self.data_in(dtype)
        self.optimizer = make(self.blocks)

    def data_in(self, dtype: torch.dtype) -> None:
        self.a, self.b = self._a.to(dtype), self._b.to(dtype)

    def loss(self) -> Tensor:
        return (self.a @ torch.cat(self.blocks) - self.b).square().mean()

    def closure(self) -> Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def run(self, steps: int = MAX_STEPS) -> Any:
        """Steps until the report says that nothing is left to gain; the report."""
        return until_converged(self.optimizer, self.closure, steps)

    def continue_in_double(self) -> None:
        self.data_in(F64)
        self.optimizer.continue_in(F64)

    @property
    def value(self) -> float:
        """The loss in float64, of the exact data."""
        x = torch.cat([block.detach().double() for block in self.blocks])
        return float((self._a @ x - self._b).square().mean())

    @property
    def least(self) -> float:
        """The least value that there is."""
        x = torch.linalg.lstsq(self._a, self._b).solution
        return float((self._a @ x - self._b).square().mean())


NO_TOLERANCE = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
GROUPS = ({"lr": 1e-2}, {"lr": 5e-3, "lbfgs_lr": 0.5})
MAKERS: dict[str, Callable[[Any], Any]] = {
    "promised": lambda p: FusePV(p, 1e-2, deterministic=True),
    "promised, pairs": lambda p: FusePV(p, 1e-2, deterministic=True, curvature="pairs"),
    "untold": lambda p: FusePV(p, 1e-2),
    "at once": lambda p: FusePV(p, switch=AtOnce()),
    "bfgs": lambda p: FusePV(p, 1e-2, deterministic=True, update="bfgs"),
    "reference": lambda p: FusePV(p, 1e-2, deterministic=True, backend="reference"),
    "bfloat16 moments": lambda p: FusePV(
        p, 1e-2, deterministic=True, moment_dtype=torch.bfloat16, switch=20
    ),
    "int8 pairs": lambda p: FusePV(p, 1e-2, deterministic=True, history_dtype=torch.int8),
    "float32 pairs": lambda p: FusePV(p, 1e-2, deterministic=True, history_dtype=F32),
    "groups": lambda p: FusePV(
        [{"params": [x], **options} for x, options in zip(p, GROUPS, strict=True)],
        deterministic=True,
    ),
    "lbfgs": lambda p: LBFGS(p, line_search_fn="strong_wolfe", deterministic=True, **NO_TOLERANCE),
    "lbfgs, untold": lambda p: LBFGS(p, line_search_fn="approximate_wolfe", **NO_TOLERANCE),
}


@pytest.mark.parametrize("make", MAKERS)
def test_it_goes_on_below_the_floor_of_float32(make: str) -> None:
    """The solution is known: float64 finds eleven digits of it, float32 has not found nine."""
    run = LeastSquares(MAKERS[make])
    report = run.run()
    assert (report.stop_reason, report.converged) == ("precision", True)
    floor, blocks = run.value, list(run.blocks)
    assert floor > 1e-13
    assert not torch.allclose(torch.cat(blocks).detach().double(), SOLUTION, rtol=1e-9, atol=0)

    run.continue_in_double()
    assert run.blocks[0].dtype == run.blocks[1].dtype == F64
    assert run.value == floor  # not a bit is lost
    again = run.optimizer.report()
    assert (again.stop_reason, again.converged, again.advice) == ("not started", False, "")
    for name in ("evaluations", "lbfgs_iterations", "adam_steps", "pairs_accepted"):
        assert getattr(again, name) == getattr(report, name), name
    assert again.loss_noise < 1e-14 if again.phase == "lbfgs" else again.loss_noise == 0.0

    run.run()
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert list(map(id, params)) == list(map(id, blocks))  # the same objects
    assert run.value < 1e-18
    torch.testing.assert_close(torch.cat(run.blocks).detach(), SOLUTION, rtol=1e-11, atol=0)
    assert run.optimizer.report().evaluations == run.calls  # counted on, over both dtypes


class Network:
    """A physics-informed network, 1-12-12-1: u'' = -pi^2 sin(pi x), u(-1) = u(1) = 0."""

    def __init__(self, make: Callable[[Any], Any], dtype: torch.dtype = F32) -> None:
        torch.manual_seed(1)
        layers = nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)
        self.model = nn.Sequential(*layers).to(dtype)
        self.x = torch.linspace(-1, 1, 33, dtype=F64).to(dtype)[:, None]
        self.optimizer = make(self.model.parameters())

    def loss(self) -> Tensor:
        x = self.x.detach().clone().requires_grad_()
        u = (1 - x * x) * self.model(x)
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
        return (second + math.pi**2 * torch.sin(math.pi * x)).square().mean()

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def run(self, steps: int) -> Any:
        return until_converged(self.optimizer, self.closure, steps)

    @property
    def error(self) -> float:
        """The largest error of u, in float64."""
        x = torch.linspace(-1, 1, 101, dtype=F64)[:, None]
        with torch.no_grad():
            u = (1 - x * x) * copy.deepcopy(self.model).double()(x)
        return float((u - torch.sin(math.pi * x)).abs().max())


@pytest.mark.parametrize("make", ["promised", "promised, pairs", "untold"])
def test_a_physics_informed_network(make: str) -> None:
    run = Network(MAKERS[make])
    report = run.run(1000)
    floor, error = float(run.loss().detach()), run.error
    assert report.stop_reason == "precision" and 1e-12 < floor < 1e-9
    run.model.double()  # the three lines of the docstring
    run.x = run.x.double()
    run.optimizer.continue_in(F64)
    run.run(500)
    reached = float(run.loss().detach())
    assert reached < 0.05 * floor
    # A valley's floor is not where rounding ends the way along it.
    assert floor - reached <= 2 * report.float64_gain
    assert run.error < 0.5 * error
    assert run.optimizer.report().curvature == report.curvature


# --- what is said beforehand ------------------------------------------------------------------


@pytest.mark.parametrize("noise", (0.0, 3.0))
@pytest.mark.parametrize("make", ["promised", "promised, pairs", "untold", "lbfgs, untold"])
def test_the_report_says_what_float64_may_still_give(make: str, noise: float) -> None:
    """With noise in the data the loss has a floor of its own, which float32 nearly reaches."""
    run = LeastSquares(MAKERS[make], noise)
    assert run.optimizer.report().advice == ""
    report = run.run()
    assert report.stop_reason == "precision"
    left = run.value - run.least
    assert left <= 2 * report.float64_gain  # float32 sees other data, too
    assert report.float64_gain <= (1e-3 * run.value if noise else 10 * run.value)
    assert "float64 may lower the loss by up to" in report.advice
    call = report.advice.rpartition(": ")[2]
    assert f"advice                {report.advice}" in str(report)
    run.data_in(F64)
    eval(call, {"torch": torch, "optimizer": run.optimizer})  # it can be taken literally
    after = run.run()
    assert (after.float64_gain, after.advice) == (0.0, "")
    assert run.value - run.least < max(1e-18, 1e-11 * run.least)


def test_nor_has_a_run_that_goes_on() -> None:
    run = LeastSquares(MAKERS["lbfgs"], 3.0)
    report = run.run(1)
    assert (report.stop_reason, report.float64_gain, report.advice) == ("max_iter", 0.0, "")


def test_float64_has_nothing_to_advise() -> None:
    run = LeastSquares(MAKERS["promised"], 0.3, F64)
    report = run.run()
    assert (report.stop_reason, report.float64_gain, report.advice) == ("precision", 0.0, "")


def test_the_advice_is_read_from_a_checkpoint_too() -> None:
    run, again = LeastSquares(MAKERS["promised"]), LeastSquares(MAKERS["promised"])
    report = run.run()
    again.optimizer.load_state_dict(run.optimizer.state_dict())
    assert again.optimizer.report().advice == report.advice != ""
    assert again.optimizer.report().float64_gain == report.float64_gain


# --- when it may be said ----------------------------------------------------------------------


def test_nothing_goes_on_without_it() -> None:
    """What a user meets who calls model.double() alone: the error names the method."""
    run = Network(MAKERS["promised"])
    run.run(200)
    run.model.double()
    run.x = run.x.double()
    with pytest.raises(ValueError, match=r"call optimizer.continue_in\(torch.float64\) to conv"):
        run.optimizer.step(run.closure)
    before = float(run.loss().detach())
    run.optimizer.continue_in(F64)
    run.run(50)
    assert float(run.loss().detach()) < before


@pytest.mark.parametrize("make", ["promised", "lbfgs"])
@pytest.mark.parametrize("steps", (0, 3, 150))
def test_the_model_may_be_converted_before_or_after(make: str, steps: int) -> None:
    runs = [Network(MAKERS[make]) for _ in range(3)]
    for when, run in zip(("before", "after", "never"), runs, strict=True):
        run.run(steps)
        if when == "before":
            run.model.double()
        run.optimizer.continue_in(F64)
        if when == "after":
            run.model.double()
        run.x = run.x.double()
        run.run(5)
    flats = [nn.utils.parameters_to_vector(run.model.parameters()) for run in runs]
    assert flats[0].dtype == F64
    assert torch.equal(flats[0], flats[1]) and torch.equal(flats[0], flats[2])


def test_said_twice_it_is_said_once() -> None:
    runs = [LeastSquares(MAKERS["promised"]) for _ in range(2)]
    for times, run in enumerate(runs, 1):
        run.run()
        for _ in range(times):
            run.continue_in_double()
        run.run(20)
    assert torch.equal(torch.cat(runs[0].blocks), torch.cat(runs[1].blocks))


def test_in_float64_it_is_a_second_try() -> None:
    """Nothing is converted; the point is evaluated again, and again found to be the end."""
    run = LeastSquares(MAKERS["promised"], 0.3, F64)
    run.run()
    memory, value = [block.data_ptr() for block in run.blocks], run.value
    run.optimizer.continue_in(F64)
    assert [block.data_ptr() for block in run.blocks] == memory
    assert not run.optimizer.report().converged
    assert run.run().converged and run.value <= value * (1 + 1e-12)


@pytest.mark.parametrize("make", ["promised", "lbfgs"])
def test_a_checkpoint_of_float32_in_a_model_of_float64(make: str) -> None:
    """The state is cast, as torch's is; with the call it goes on as the run itself would."""
    run, again, uncalled = (LeastSquares(MAKERS[make], dtype=d) for d in (F32, F64, F64))
    run.run()
    for other in (again, uncalled):
        other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        for ours, theirs in zip(other.blocks, run.blocks, strict=True):
            ours.data.copy_(theirs.data)
    run.continue_in_double()
    again.optimizer.continue_in(F64)
    for each in (run, again):
        each.run(40)
    assert torch.equal(torch.cat(run.blocks), torch.cat(again.blocks))
    # Without it the noise that float32 has taught stays.
    assert uncalled.optimizer.report().loss_noise > 1e-7
    uncalled.run(40)
    assert uncalled.optimizer.report().loss_noise > 1e-7 > again.optimizer.report().loss_noise


# --- what else holds the optimizer ------------------------------------------------------------


def test_schedulers_go_on() -> None:
    runs = [LeastSquares(lambda p: FusePV(p, 1e-2, switch=10**6)) for _ in range(2)]
    schedules = [torch.optim.lr_scheduler.StepLR(run.optimizer, 5, 0.5) for run in runs]
    for converts, run, schedule in zip((True, False), runs, schedules, strict=True):
        for step in range(20):
            if step == 7 and converts:
                run.continue_in_double()
            run.optimizer.step(run.closure)
            schedule.step()
    assert [run.optimizer.param_groups[0]["lr"] for run in runs] == [1e-2 / 16] * 2
    flats = [torch.cat(run.blocks).detach().double() for run in runs]
    torch.testing.assert_close(*flats, rtol=1e-4, atol=1e-5)
    assert not torch.equal(*flats)


def test_a_loss_that_is_kept_keeps_no_float32() -> None:
    """Its graph knows the parameters as they were: autograd would cast gradients to their dtype."""
    run = LeastSquares(lambda p: FusePV(p, 1e-2, switch=10**6))
    kept = run.optimizer.step(run.closure)
    assert kept.requires_grad
    run.continue_in_double()
    run.optimizer.step(run.closure)
    assert [block.grad.dtype for block in run.blocks] == [F64, F64]


def test_gradients_at_hand_are_converted() -> None:
    """loss.backward(); continue_in(...); step() takes the step that was due."""
    runs = [LeastSquares(lambda p: FusePV(p, 1e-2, switch=10**6)) for _ in range(2)]
    for converts, run in zip((True, False), runs, strict=True):
        run.loss().backward()
        if converts:
            run.optimizer.continue_in(F64)
        run.optimizer.step()
    moved = [torch.cat(run.blocks).detach().double() for run in runs]
    torch.testing.assert_close(*moved, rtol=1e-5, atol=0)
    assert moved[0].count_nonzero() == 12


def test_options_stay() -> None:
    run = LeastSquares(MAKERS["bfloat16 moments"])
    run.run(5)
    before = [dict(group) for group in run.optimizer.param_groups]
    run.continue_in_double()
    assert all(p.dtype == F64 for p in before[0].pop("params"))
    after = dict(run.optimizer.param_groups[0])
    after.pop("params")
    # Moments of two bytes are for parameters of four.
    assert before[0].pop("moment_dtype") == torch.bfloat16 and after.pop("moment_dtype") is None
    assert before[0] == after
    run.optimizer.add_param_group({"params": [torch.zeros(2, dtype=F64, requires_grad=True)]})


# --- what is refused --------------------------------------------------------------------------

REFUSED = {
    "no dtype": ("float64", TypeError, "dtype must be a torch.dtype, got 'float64'"),
    "half": (torch.float16, ValueError, "dtype must be .* got torch.float16"),
    "integers": (torch.int64, ValueError, "dtype must be .* got torch.int64"),
    "complex": (torch.complex128, ValueError, "dtype must be .* got torch.complex128"),
}


@pytest.mark.parametrize("steps", (0, 40))
@pytest.mark.parametrize(("dtype", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_other_dtypes_are_refused(dtype: Any, error: Any, message: str, steps: int) -> None:
    run = LeastSquares(MAKERS["promised"])
    run.run(steps)
    refused(run, dtype, error, message)


def test_before_the_first_step_there_is_nothing_to_convert() -> None:
    run, double = LeastSquares(MAKERS["promised"]), LeastSquares(MAKERS["promised"], dtype=F64)
    run.continue_in_double()
    assert not run.optimizer.state
    for each in (run, double):
        each.run(150)
    assert torch.equal(torch.cat(run.blocks), torch.cat(double.blocks))


def refused(run: LeastSquares, dtype: Any, error: Any, message: str) -> None:
    before = snapshot(run.optimizer)
    with pytest.raises(error, match=message):
        run.optimizer.continue_in(dtype)
    assert snapshot(run.optimizer) == before


def test_what_would_lose_digits_is_refused() -> None:
    run = LeastSquares(MAKERS["promised"], dtype=F64)
    refused(run, F32, ValueError, r"got torch.float32, but params\[0\] has torch.float64")
    run.run(40)
    for block in run.blocks:
        block.grad, block.data = None, block.data.float()
    run.data_in(F32)
    refused(run, F32, ValueError, "got torch.float32, but the state has torch.float64")
    with pytest.raises(ValueError, match=r"was torch.float64.*convert parameters before the fir"):
        run.optimizer.step(run.closure)


def test_more_than_a_dtype_is_refused() -> None:
    run = LeastSquares(MAKERS["promised"])
    run.run(40)
    right, block = run.blocks[1].data, run.blocks[1]
    block.grad, block.data = None, right.double().view(2, 3)
    message = r"params\[1\] is now torch.float64 of shape \(2, 3\).*; convert parameters before"
    refused(run, F64, ValueError, message)
    block.data = right
    run.optimizer.param_groups[0]["params"] = [run.blocks[0], torch.zeros(6, requires_grad=True)]
    refused(run, F64, ValueError, "param_groups no longer hold the 2 tensors")
    run.optimizer.param_groups[0]["params"] = run.blocks
    run.continue_in_double()
    run.run()
    assert run.value < 1e-18
