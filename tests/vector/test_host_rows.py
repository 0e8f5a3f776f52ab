"""Pairs in the host's memory: the way there and back, on one device that is taken for two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fuse_ext import LBFGS, Fuse, FusePV, estimate_memory
from fuse_ext.vector.host import rows
from fuse_ext.vector.host.rows import HostRows

Make = Callable[..., Any]
SEARCH = {"line_search_fn": "strong_wolfe", "max_iter": 2, "history_size": 5}
PV = {"lr": 1e-2, "switch": 4, "deterministic": True, "curvature": "pairs", "history_size": 5}
CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "fixed": (LBFGS, {"lr": 0.5, "max_iter": 2, "history_size": 5}),
    "search": (LBFGS, SEARCH),
    "bfloat16": (LBFGS, {**SEARCH, "history_dtype": torch.bfloat16}),
    "int8": (LBFGS, {**SEARCH, "history_dtype": torch.int8}),
    "reference": (LBFGS, {**SEARCH, "backend": "reference"}),
    "ascent": (LBFGS, {**SEARCH, "maximize": True}),
    "pv": (FusePV, PV),
    "pv, fixed step": (FusePV, {**PV, "line_search": None, "lbfgs_lr": 0.1}),
    "pv, finds out": (FusePV, {**PV, "deterministic": None}),
    "fuse": (Fuse, {"lr": 1e-2}),
    "fuse, int8": (Fuse, {"lr": 1e-2, "line_search": "armijo", "history_dtype": torch.int8}),
}


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters on the CPU are taken for ones on a device."""
    monkeypatch.setattr(rows, "is_remote", lambda device: True)


class Run:
    """A small network; a parameter nobody uses, and one that has no gradient for a while."""

    def __init__(self, kind: Make, options: dict[str, Any], **more: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
        self.x = torch.randn(64, 6)
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        params = [*self.net.parameters(), nn.Parameter(torch.ones(3)), self.phase]
        self.optimizer = kind(params, **options, **more)
        self.sign = -1.0 if options.get("maximize") else 1.0
        self.steps = 0

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        wanted = (self.x[:, :1] * self.x[:, 1:2]).sin()
        loss = (self.net(self.x) - wanted).square().mean()
        loss = self.sign * (loss + (self.phase * (1 + 2j)).abs().square().mean())
        loss.backward()
        if 8 <= self.steps < 11:
            self.net[0].bias.grad = None
        return loss.detach()

    def go(self, steps: int) -> Run:
        for _ in range(steps):
            self.optimizer.step(self.closure)
            self.steps += 1
        return self

    def load(self, other: Run) -> Run:
        """Goes on where another one is."""
        for mine, theirs in zip(self.params(), other.params(), strict=True):
            mine.detach().copy_(theirs.detach())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        self.steps = other.steps
        return self

    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def point(self) -> Tensor:
        return torch.cat(
            [
                torch.view_as_real(p.detach()).view(-1) if p.is_complex() else p.detach().view(-1)
                for p in self.params()
            ]
        )

    def counts(self) -> Any:
        report = self.optimizer.report()
        return report.lbfgs_iterations, report.evaluations, report.pairs_accepted, report.pairs_held


def bound(optimizer: Any) -> Any:
    phase = getattr(optimizer, "_phase", None)
    return (phase.history if phase is not None else optimizer._history)._bound


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_a_history_beside_the_parameters(name: str, two_devices: None) -> None:
    kind, options = CASES[name]
    beside = Run(kind, options).go(15)
    apart = Run(kind, options, history_device="cpu").go(15)
    assert isinstance(bound(apart.optimizer), HostRows)
    assert not isinstance(bound(beside.optimizer), HostRows)
    assert torch.equal(apart.point(), beside.point())
    assert apart.counts() == beside.counts() and beside.counts()[3] > 1


def test_weight_decay_is_added_before_the_gradient_is_sent(two_devices: None) -> None:
    options = {"lr": 0.5, "max_iter": 1, "history_size": 5, "weight_decay": 0.3}
    beside, apart = Run(LBFGS, options).go(8), Run(LBFGS, options, history_device="cpu").go(8)
    torch.testing.assert_close(apart.point(), beside.point(), rtol=0, atol=1e-5)
    without = Run(LBFGS, {**options, "weight_decay": 0.0}).go(8)
    assert (without.point() - beside.point()).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["search", "int8", "pv", "fuse"])
@pytest.mark.parametrize("to_host", [True, False])
def test_a_checkpoint_goes_on_wherever_rows_lie(
    name: str, to_host: bool, two_devices: None
) -> None:
    kind, options = CASES[name]
    places = ("cpu", None) if to_host else (None, "cpu")
    same, first = (Run(kind, options, history_device=place).go(7) for place in places)
    whole, second = (
        Run(kind, options, history_device=places[0]).load(before).go(7) for before in (same, first)
    )
    assert isinstance(bound(second.optimizer), HostRows) == to_host
    assert torch.equal(second.point(), whole.point())
    assert second.counts() == whole.counts()


def test_copies_have_rows_of_their_own(two_devices: None) -> None:
    kind, options = CASES["search"]
    run = Run(kind, options, history_device="cpu").go(8)
    other = copy.deepcopy(run)
    assert isinstance(bound(other.optimizer), HostRows)
    before = run.point()
    other.go(4)
    assert torch.equal(run.point(), before)
    assert torch.equal(run.go(4).point(), other.point())


def test_a_more_exact_dtype_takes_rows_along(two_devices: None) -> None:
    kind, options = CASES["int8"]
    runs = [Run(kind, options, history_device=place).go(6) for place in ("cpu", None)]
    for run in runs:
        run.optimizer.continue_in(torch.float64)
        run.net.double()
        run.x = run.x.double()
        run.go(6)
    assert isinstance(bound(runs[0].optimizer), HostRows)
    assert runs[0].optimizer.report().pairs_held == 5
    assert torch.equal(runs[0].point(), runs[1].point())


def test_it_changes_nothing_where_parameters_are_on_the_host() -> None:
    for kind, options in CASES.values():
        beside, said = Run(kind, options).go(8), Run(kind, options, history_device="cpu").go(8)
        assert not isinstance(bound(said.optimizer), HostRows)
        assert torch.equal(said.point(), beside.point())
        assert said.optimizer.report() == beside.optimizer.report()
    matrix = {"lr": 1e-2, "switch": 2, "deterministic": True}
    assert Run(FusePV, matrix, history_device="cpu").go(4).optimizer.report().curvature == "dense"


def test_there_is_no_matrix_beside_rows_on_the_host(two_devices: None) -> None:
    matrix = {"lr": 1e-2, "switch": 2, "deterministic": True}
    run = Run(FusePV, matrix, history_device="cpu").go(4)
    assert run.optimizer.report().curvature == "pairs"


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (LBFGS, {"capturable": True, "max_iter": 1}, "capturable=True"),
        (FusePV, {"capturable": True, "line_search": None, "switch": 9}, "capturable=True"),
        (FusePV, {"curvature": "dense"}, "curvature='dense'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(kind: Make, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"history_device='cpu' does not go with {said}"):
        kind([nn.Parameter(torch.ones(3))], history_device="cpu", **options)
    with pytest.raises(ValueError, match="history_device must be None or 'cpu', got 'cuda'"):
        kind([nn.Parameter(torch.ones(3))], history_device="cuda", **options)


# --- what crosses ---------------------------------------------------------------------------


class Crossings(TorchDispatchMode):
    """Two devices in one: what is made of a tensor lies where that lies, and only copies cross.

    Args:
        host: Tensors of the host.
        device: Tensors of the device.

    Attributes:
        sent, brought: Sizes of copies to the host, and to the device.
    """

    def __init__(self, host: list[Tensor], device: list[Tensor]) -> None:
        super().__init__()
        self._kept: list[Tensor] = []  # an address must not be used again
        self._place: dict[int, str] = {}
        self.sent: list[int] = []
        self.brought: list[int] = []
        for place, tensors in (("host", host), ("device", device)):
            self._note(place, tensors)

    def _note(self, place: str, tensors: list[Tensor]) -> None:
        self._kept += tensors
        for tensor in tensors:
            self._place.setdefault(tensor.untyped_storage().data_ptr(), place)

    def _of(self, tensor: Tensor) -> str | None:
        return self._place.get(tensor.untyped_storage().data_ptr())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # Numbers of the host may go into a kernel.
        places = {self._of(x) for x in given if x.numel() and x.dim()} - {None}
        if func is torch.ops.aten.copy_.default and len(places) == 2:
            sizes = self.sent if self._of(args[0]) == "host" else self.brought
            sizes.append(args[0].numel())
            return result
        assert len(places) < 2, f"{func} mixes {[tuple(x.shape) for x in given]}"
        for place in places:
            assert place is not None
            self._note(place, [x for x in tree_leaves(result) if isinstance(x, Tensor)])
        return result


@contextmanager
def crossings(run: Run) -> Iterator[Crossings]:
    """Watches an optimizer whose history has been made."""
    entry = run.optimizer.state[run.params()[0]]
    names = ("history", "grad_prev", "history_scale", "scalars")
    staging = bound(run.optimizer)._staging
    host = [entry[name] for name in names if name in entry] + [staging.sent]
    row = [x for x in staging.row if x is not None]
    grads = [p.grad for p in run.params() if p.grad is not None]
    moments = [
        value
        for param in run.params()
        for name, value in run.optimizer.state[param].items()
        if name.startswith("exp_avg")
    ]
    params = [p.detach() for p in run.params()]
    with Crossings(host, [staging.gathered, *row, *params, *grads, *moments, run.x]) as seen:
        yield seen


@pytest.mark.parametrize("name", ["fixed", "search", "bfloat16", "int8", "pv", "fuse, int8"])
def test_a_gradient_and_a_direction_cross_an_iteration(name: str, two_devices: None) -> None:
    kind, options = CASES[name]
    # Of ops in plain PyTorch every one is seen.
    options = {**options, "backend": "reference"}
    if kind is LBFGS:
        options["deterministic"] = True  # pairs close at the next iteration's gradient
    run = Run(kind, options, history_device="cpu").go(12)
    numel = run.optimizer.flat.numel
    before = run.optimizer.report().lbfgs_iterations
    with crossings(run) as seen:
        run.go(3)
    iterations = run.optimizer.report().lbfgs_iterations - before
    assert iterations >= 3
    more = 0 if kind is not Fuse else iterations  # its pair is closed at once, and s comes here
    sent = [size for size in seen.sent if size == numel]
    brought = [size for size in seen.brought if size == numel]
    assert len(brought) == iterations
    assert len(sent) <= iterations + 2 * more and len(sent) >= iterations
    # Scales of int8 rows go beside them, and nothing else.
    others = [size for size in (*seen.sent, *seen.brought) if size != numel]
    assert all(size == -(-numel // 128) for size in others)
    assert bool(others) == (options.get("history_dtype") == torch.int8)


def test_mixing_the_two_is_seen() -> None:
    host, device = torch.ones(3), torch.ones(3)
    with Crossings([host], [device]) as seen:
        host.copy_(device * 2)
        with pytest.raises(AssertionError, match="mixes"):
            (host + 1).add_(device)
    assert seen.sent == [3] and not seen.brought


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_what_each_of_the_two_holds_is_foretold(dtype: Any, two_devices: None) -> None:
    options = {"history_size": 10, "history_dtype": dtype, "history_device": "cpu"}
    param = nn.Parameter(torch.linspace(-1, 1, 100_000))
    optimizer = LBFGS([param], lr=0.1, max_iter=1, **options)

    def closure() -> Tensor:
        param.grad = param.detach().clone()
        return 0.5 * param.detach().square().sum()

    for _ in range(3):
        optimizer.step(closure)
    report, history = optimizer.report(), optimizer._phase.history
    said = estimate_memory([param], "LBFGS", line_search=None, **options)
    assert said.host_bytes == history.host_nbytes == report.state_bytes + 4 * 100_000
    assert said.state_bytes == 0
    assert said.workspace_bytes == pytest.approx(report.workspace_bytes, rel=0.001)
    # A gradient, an origin, and the direction in the dtype of rows.
    width = {None: 4, torch.bfloat16: 2, torch.int8: 1 + 8 * 2 / 128 / 2}[dtype]
    assert said.workspace_bytes == pytest.approx((4 + 4 + width) * 100_000, rel=0.02)
    beside = estimate_memory(
        [param], "LBFGS", line_search=None, **{**options, "history_device": None}
    )
    assert beside.host_bytes == 0 and "on the host" in str(said) and "host" not in str(beside)
    assert said.host_bytes == beside.state_bytes + 4 * 100_000
