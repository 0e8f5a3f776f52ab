"""The report's first lines, the log of steps, and the way to both through a wrapper."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse_ext import LBFGS, Adam, AfterSteps, Fuse, FusePV, Log, LossPlateau, Never, unwrap


class Fit:
    def __init__(self, optimizer: type = FusePV, width: int = 8, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))
        self.x = torch.randn(64, 3)
        self.y = torch.sin(self.x.sum(1, keepdim=True))
        self.optimizer = optimizer(self.model.parameters(), **options)
        self.losses: list[float] = []

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.model(self.x) - self.y).square().mean()
        loss.backward()
        return loss

    def train(self, steps: int) -> Fit:
        for _ in range(steps):
            self.losses.append(self.optimizer.step(self.closure).item())
        return self


def head(optimizer: Any, lines: int = 3) -> str:
    return "\n".join(str(optimizer.report()).splitlines()[:lines])


def test_a_report_says_first_what_matters() -> None:
    fit = Fit(lr=1e-2, deterministic=True)
    assert head(fit.optimizer).startswith("Adam, 0 steps: no loss yet\n")
    fit.train(5)
    told = head(fit.optimizer)
    assert told.startswith(f"Adam, 5 steps: loss {fit.losses[-1]:.6g}\n")
    assert "will be a dense inverse Hessian (broyden): deterministic=True; 41 parameters" in told
    assert "5 of 100 steps of a smooth loss; or a plateau" in told
    fit.train(120)
    told = head(fit.optimizer)
    assert told.startswith(f"Second phase, 25 iterations: loss {fit.losses[-1]:.6g}, not converged")
    assert "\nsecond_phase          a dense inverse Hessian" in told
    assert "\nswitch_reason         step 100 >= n=100" in told
    assert fit.optimizer.report().waiting == ""


def test_a_converged_run_says_so() -> None:
    fit = Fit(LBFGS, line_search_fn="strong_wolfe", max_iter=500, tolerance_grad=1e-3)
    fit.train(2)
    assert ", converged (gradient)\n" in head(fit.optimizer)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"switch": Never()}, ""),
        ({}, "will be Adam's averages in a metric that grows, for minibatches, unless"),
        ({"deterministic": False}, "will be Adam's averages in a metric that grows, for minib"),
        (
            {"deterministic": True, "curvature": "pairs"},
            "approximate_wolfe: as was asked",
        ),
        ({"line_search": "armijo"}, "10 pairs and armijo: the closure is not known to be one"),
        ({"deterministic": True, "width": 5000}, "25,001 parameters are too many for a matrix"),
        ({"curvature": "dense", "max_iter": 2}, "curvature='dense'; 41 parameters"),
    ],
)
def test_a_report_says_what_will_follow_and_why(options: dict[str, Any], says: str) -> None:
    told = Fit(**options).optimizer.report().second_phase
    assert says in told and bool(says) == bool(told)


def test_a_report_says_what_follows_once_it_is_there() -> None:
    assert "found to be one function" in Fit().train(30).optimizer.report().second_phase
    batches = Fit(deterministic=False).train(60).optimizer.report()
    assert "Kronecker-factored metric, for minibatches: deterministic=False" in batches.second_phase


def test_a_composite_says_what_it_waits_for() -> None:
    both = Fit(switch=AfterSteps(3) & LossPlateau(20)).train(5).optimizer.report()
    assert both.waiting == "a plateau of the loss shows after 20 steps at the earliest"
    either = Fit(switch=AfterSteps(9) | LossPlateau(20)).train(5).optimizer.report()
    assert either.waiting.startswith("5 of 9 steps; or a plateau")


def test_a_notebook_gets_html() -> None:
    fit = Fit(switch=AfterSteps(2)).train(4)
    html = fit.optimizer.report()._repr_html_()
    assert html.startswith("<b>Second phase") and "<details>" in html
    assert "step 2 &gt;= n=2" in html  # escaped
    assert html.count("<table>") == html.count("</table>") == 2


@pytest.mark.parametrize("optimizer", [FusePV, LBFGS, Fuse])
def test_the_loss_holds_no_graph_and_is_not_compared(optimizer: type) -> None:
    fit = Fit(optimizer).train(3)
    report = fit.optimizer.report()
    assert report.loss == pytest.approx(fit.losses[-1], rel=1e-6)
    again = Fit(optimizer)
    again.optimizer.load_state_dict(copy.deepcopy(fit.optimizer.state_dict()))
    assert again.optimizer.report().loss is None
    assert not fit.optimizer._loss.requires_grad


# --- the log --------------------------------------------------------------------------------


def test_a_log_keeps_every_step() -> None:
    fit = Fit(lr=1e-2, switch=AfterSteps(10), deterministic=True)
    log = Log(fit.optimizer)
    assert repr(log) == "<Log of no steps>"
    fit.train(25)
    assert len(log) == 25
    assert log.losses == pytest.approx(fit.losses)
    assert [step.phase for step in log] == ["adam"] * 10 + ["lbfgs"] * 15
    assert log.switches == [10]
    assert all(step.step_length == 0.0 and step.stop_reason == "" for step in list(log)[:10])
    assert all(step.step_length > 0.0 and step.stop_reason for step in list(log)[10:])
    assert log[-1].evaluations == fit.optimizer.report().evaluations
    assert log.columns()["loss"] == log.losses
    assert "25 steps" in repr(log)
    log.close()
    fit.train(1)
    assert len(log) == 25


def test_a_log_sees_both_ways_of_switching() -> None:
    fit = Fit(switch=AfterSteps(2))
    log = Log(fit.optimizer)
    fit.train(4)
    fit.optimizer.switch_back()
    fit.train(5)
    phases = [step.phase for step in log]
    assert phases == ["adam"] * 2 + ["lbfgs"] * 2 + ["adam"] * 2 + ["lbfgs"] * 3
    assert log.switches == [2, 6]


def test_a_log_of_steps_without_a_loss() -> None:
    fit = Fit(switch=Never())
    log = Log(fit.optimizer)
    fit.closure()
    fit.optimizer.step()
    assert math.isnan(log[0].loss)


def test_a_log_of_lbfgs_alone() -> None:
    fit = Fit(LBFGS, line_search_fn="strong_wolfe")
    log = Log(fit.optimizer)
    fit.train(3)
    assert [step.phase for step in log] == ["lbfgs"] * 3 and log.switches == [0]


def test_a_log_is_drawn_with_the_switch() -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fit = Fit(switch=AfterSteps(5), deterministic=True)
    log = Log(fit.optimizer)
    fit.train(12)
    figure, ax = plt.subplots()
    assert log.plot(ax) is ax
    curve, switch = ax.get_lines()
    assert list(curve.get_ydata()) == log.losses
    assert list(switch.get_xdata()) == [log[5].evaluations] * 2
    assert ax.get_yscale() == "log"
    log.plot(by="steps")  # into the present axes
    with pytest.raises(ValueError, match="by must be"):
        log.plot(by="epochs")
    plt.close(figure)


def test_tensorboard_gets_each_step_once() -> None:
    class Writer:
        def __init__(self) -> None:
            self.told: list[tuple[str, float, int]] = []

        def add_scalar(self, name: str, value: float, at: int) -> None:
            self.told.append((name, value, at))

    fit, writer = Fit(switch=AfterSteps(2)), Writer()
    log = Log(fit.optimizer)
    for steps in (3, 2):
        fit.train(steps)
        log.to_tensorboard(writer)
        log.to_tensorboard(writer)
    assert len(writer.told) == 5 * 4
    losses = [value for name, value, _ in writer.told if name == "fuse_ext/loss"]
    assert losses == log.losses
    phases = [value for name, value, _ in writer.told if name == "fuse_ext/second_phase"]
    assert phases == [0, 0, 1, 1, 1]


# --- wrappers -------------------------------------------------------------------------------


class Wrapper(torch.optim.Optimizer):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_a_wrapper_is_seen_through() -> None:
    optimizer = Fit().optimizer
    assert unwrap(optimizer) is optimizer
    assert unwrap(Wrapper(Wrapper(optimizer))) is optimizer
    for other in (torch.optim.SGD([torch.zeros(1)]), Wrapper(Adam([torch.zeros(1)])), 3):
        with pytest.raises(TypeError, match="must be one of fuse_ext's with a report"):
            unwrap(other)
