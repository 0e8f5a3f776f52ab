"""The ops on a CUDA device against the same ops on the CPU. Needs a GPU: `make gpu-check`.

Everything here takes the device as a parameter, so that a machine without one can at least run
the comparisons on the CPU (test_the_comparisons_themselves).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_cases import dense_arguments, inverse_hessian, new_arguments, quadratic
from ops_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    NATIVE,
    adam_arguments,
    clone_arguments,
    direction_arguments,
    every_op,
    make_ring,
    make_tensors,
    point_arguments,
    same_bits,
    set_out_arguments,
    split,
    stats_arguments,
    tensors_of,
    update_arguments,
)
from torch import Tensor

from fuse_ext import _C, LBFGS, Adam
from fuse_ext.kernels import ops

gpu_waits = pytest.importorskip("benchmarks.harness.gpu_waits")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def why_not() -> str:
    if not _C.build_info()["cuda"]:
        return "needs an extension with CUDA kernels: FUSE_EXT_CUDA=1 and a CUDA build of torch"
    if not torch.cuda.is_available():
        return "needs a GPU: run `make gpu-check` on a machine where torch.cuda.is_available()"
    return ""


def cuda_only(test: Any) -> Any:
    skip = pytest.mark.skipif(bool(why_not()), reason=why_not() or "has a GPU")
    return pytest.mark.cuda(skip(test))


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments with tensors of their own on the device, strides kept."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            size, stride = value.size(), value.stride()
            return torch.empty_strided(size, stride, dtype=value.dtype, device=device).copy_(value)
        return [move(v) for v in value] if isinstance(value, list) else value

    return {name: move(value) for name, value in clone_arguments(arguments).items()}


def tolerances(name: str, tensor: Tensor) -> dict[str, float]:
    """Sums are added in another order; vectors are combined with one rounding fewer."""
    if tensor.dtype in (F32, F64):
        return {"rtol": 1e-4, "atol": 1e-3 if name in ("scalars", "stats") else 1e-4}
    return {"rtol": 2e-2, "atol": 1e-2}


def compare(name: str, arguments: dict[str, Any], device: torch.device) -> None:
    """The op on the device and on the CPU: Adam to the bit, the rest within rounding."""
    ours, cpus = moved(arguments, device), clone_arguments(arguments)
    getattr(NATIVE, name)(**ours)
    getattr(NATIVE, name)(**cpus)
    expected = tensors_of(cpus)
    for key, value in tensors_of(ours).items():
        value = value.cpu()
        if name == "adam_step" and key != "stats":
            assert same_bits(value, expected[key]), f"{name}: {key}"
        else:
            torch.testing.assert_close(
                value,
                expected[key],
                equal_nan=True,
                **tolerances(key, value),
                msg=lambda m, key=key: f"{name}: {key}: {m}",
            )


def cases(numel: int, dtype: torch.dtype, row: torch.dtype) -> dict[str, dict[str, Any]]:
    """Arguments of every op that reads tensors."""
    state = F64 if F64 in (dtype, row) else F32
    tensors = make_tensors(split(numel, 5), (dtype,), gaps=(0, 4))
    made = make_ring(tensors.numel, 5, 2, 5, row, state)
    for name in ("coef_s", "coef_y", "coef_g"):
        made.array(name).normal_()
    origin = torch.randn(tensors.numel, dtype=state)
    decay, scale = [0.1, 0.0, 0.2, 0.0, 0.0], [1.0, 2.0, 1.0, 0.5, 1.0]
    point = point_arguments(tensors, made, origin)
    moments = BF16 if row == BF16 else state
    return {
        "adam_step": adam_arguments(tensors, moments, amsgrad=True, weight_decay=0.1),
        "grad_stats": stats_arguments(tensors, made, decay),
        "lbfgs_update": update_arguments(tensors, made, True, decay),
        "lbfgs_direction": direction_arguments(tensors, made, decay, scale),
        "lbfgs_set_out": set_out_arguments(tensors, made, origin, decay, scale),
        "lbfgs_move": point | {"step": 0.5, "save": True},
        "dense_direction": dense_arguments(min(numel, 1003), state, held=2, room=3, shares=True),
        "fuse_blend": point | {"theta": 0.3, "step": 0.5},
    }


# float32 throughout, each dtype, each history; then long enough for the whole grid.
KINDS = [
    (5000, F32, F32),
    (5000, BF16, BF16),
    (5000, F16, F16),
    (5000, F64, F64),
    (3_000_003, F32, F32),
    (3_000_003, BF16, BF16),
    (3_000_003, F32, BF16),
]


@cuda_only
@pytest.mark.parametrize(("numel", "dtype", "row"), KINDS)
def test_every_op_as_on_the_cpu(numel: int, dtype: torch.dtype, row: torch.dtype) -> None:
    for name, arguments in cases(numel, dtype, row).items():
        compare(name, arguments, CUDA)


@cuda_only
@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize("awkward", [False, True])
@pytest.mark.parametrize("name", ops.NAMES)
def test_awkward_tensors(name: str, awkward: bool, decided: bool) -> None:
    compare(name, every_op(awkward, decided=decided)[name], CUDA)


def test_the_comparisons_themselves() -> None:
    for dtype in DTYPES:
        for name, arguments in cases(300, dtype, dtype).items():
            compare(name, arguments, CPU)
    for decided in (False, True):
        for name, arguments in every_op(True, decided=decided).items():
            compare(name, arguments, CPU)


def check_run(device: torch.device, numel: int, dtype: torch.dtype, iterations: int) -> None:
    """A quadratic with a matrix: each iteration as on the CPU, and H positive definite."""
    curvature, x = quadratic(numel, 1000.0)
    start = float((curvature @ x).norm())
    arguments = new_arguments(numel, dtype, room=4)
    arguments["matrix"].zero_()  # compared whole, also before it is read
    arguments["vectors"].zero_()
    for iteration in range(iterations):
        arguments["grad"].copy_(curvature @ x)
        compare("dense_direction", arguments, device)
        mine = moved(arguments, device)
        NATIVE.dense_direction(**mine)
        arguments = moved(mine, CPU)
        arguments["pair_step"] = 1.0 if iteration else 1e-3
        x += arguments["pair_step"] * arguments["direction"].double()
    assert float((curvature @ x).norm()) < 0.1 * start
    torch.linalg.cholesky(inverse_hessian(arguments))


@cuda_only
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("numel", [65, 257, 1000])
def test_a_run_with_a_matrix(numel: int, dtype: torch.dtype) -> None:
    check_run(CUDA, numel, dtype, 40)


@cuda_only
@pytest.mark.parametrize("held", [3, 31])
def test_a_large_matrix(held: int) -> None:
    for known in (True, False):
        arguments = dense_arguments(5003, F32, held=held, room=32, known=known)
        compare("dense_direction", arguments, CUDA)


def test_a_run_with_a_matrix_itself() -> None:
    check_run(CPU, 65, F32, 40)


@cuda_only
def test_no_op_waits_for_the_device() -> None:
    arguments = [(name, moved(a, CUDA)) for name, a in every_op(True).items()]
    arguments += [(name, moved(a, CUDA)) for name, a in every_op(True, decided=True).items()]
    dict(arguments)["lbfgs_two_loop"]["commit"] = True
    torch.cuda.synchronize()
    with gpu_waits.forbidden():
        for _ in range(2):
            for name, a in arguments:
                getattr(NATIVE, name)(**a)
    torch.cuda.synchronize()


class Iteration:
    """A fixed-step L-BFGS iteration on 1/2 sum h x^2, gradient included, without any host."""

    def __init__(self, device: torch.device, numel: int = 20_000) -> None:
        torch.manual_seed(0)
        made = make_ring(numel, 4, 0, 0)
        made.history.zero_()
        self.history, self.scalars = made.history.to(device), made.scalars.to(device)
        self.x, self.grad = torch.randn(numel, device=device), torch.empty(numel, device=device)
        self.origin = torch.empty(numel, device=device)
        self.h = torch.linspace(1, 10, numel, device=device)
        self.first()

    def first(self) -> None:
        torch.mul(self.h, self.x, out=self.grad)
        NATIVE.lbfgs_update(*self._tensors(), self.history, None, self.scalars, False)
        NATIVE.lbfgs_two_loop(self.scalars, 5, False, 0.0, 1e-8)
        self._go()

    def __call__(self) -> None:
        torch.mul(self.h, self.x, out=self.grad)
        NATIVE.lbfgs_update(*self._tensors(), self.history, None, self.scalars, True)
        NATIVE.lbfgs_two_loop(self.scalars, 5, True, 0.5, 1e-8)
        self._go()

    def _tensors(self) -> tuple[Any, ...]:
        return [self.x], [self.grad], [0], [], False

    def _go(self) -> None:
        params, grads, offsets, decay, maximize = self._tensors()
        NATIVE.lbfgs_direction(
            params, grads, offsets, decay, [], maximize, self.history, None, self.scalars
        )
        NATIVE.lbfgs_move([self.x], [0], self.origin, self.history, self.scalars, 0.5, True)


@cuda_only
def test_an_iteration_can_be_captured_in_a_graph() -> None:
    eager, captured = Iteration(CUDA), Iteration(CUDA)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured()
    torch.cuda.current_stream().wait_stream(side)
    eager()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    for _ in range(6):
        eager()
        graph.replay()
    torch.cuda.synchronize()
    assert same_bits(eager.x.cpu(), captured.x.cpu())
    assert same_bits(eager.scalars.cpu(), captured.scalars.cpu())
    assert float((eager.h * eager.x).norm()) < 1e-2 * float(eager.h.norm())


@cuda_only
def test_streams_and_tensors_that_move() -> None:
    """Gradients at new addresses at every step, on two streams in turn."""
    ours, cpus = (make_tensors([1000, 37]) for _ in range(2))
    torch.manual_seed(1)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    params = [p.cuda() for p in ours.params]
    cpus.params = [p.clone() for p in ours.params]
    arguments = adam_arguments(ours)
    mine = moved(arguments, CUDA) | {"params": params}
    cpu = clone_arguments(arguments) | {"params": cpus.params}
    torch.cuda.synchronize()
    for step in range(1, 50):
        grads = [torch.randn_like(p) for p in cpus.params]
        stream = streams[step % 2]
        stream.wait_stream(streams[1 - step % 2])
        with torch.cuda.stream(stream):
            NATIVE.adam_step(**mine | {"grads": [g.cuda() for g in grads], "step": step})
        NATIVE.adam_step(**cpu | {"grads": grads, "step": step})
    torch.cuda.synchronize()
    for a, b in zip(params, cpus.params, strict=True):
        assert same_bits(a.cpu(), b)


@cuda_only
@pytest.mark.parametrize("optimizer", [Adam, LBFGS])
def test_optimizers_reach_the_minimum(optimizer: Any) -> None:
    target = torch.randn(1000, device=CUDA)
    x = torch.zeros(1000, device=CUDA, requires_grad=True)
    instance = optimizer([x], lr=0.1 if optimizer is Adam else 1.0)

    def closure() -> Tensor:
        instance.zero_grad()
        loss = (x - target).square().sum()
        loss.backward()
        return loss

    for _ in range(300 if optimizer is Adam else 10):
        instance.step(closure)
    torch.testing.assert_close(x.detach(), target, rtol=1e-3, atol=1e-3)


@cuda_only
@pytest.mark.parametrize("line_search", ["strong_wolfe", "approximate_wolfe", "armijo"])
def test_a_trial_waits_once(line_search: str) -> None:
    """For loss, slope and norms together; and an iteration once more, for its direction."""
    x = torch.full((1000,), 3.0, device=CUDA, requires_grad=True)
    scale = torch.linspace(1, 100, 1000, device=CUDA)
    instance = LBFGS([x], max_iter=1, line_search_fn=line_search)

    def closure() -> Tensor:
        instance.zero_grad()
        loss = (scale * (x - x.log())).sum()
        loss.backward()
        return loss

    for _ in range(5):  # the first has more to find out
        instance.step(closure)
    evaluations = instance.report().evaluations
    with gpu_waits.noted() as waits:
        for _ in range(5):
            instance.step(closure)
    trials = instance.report().evaluations - evaluations
    assert len(waits) <= trials + 5


@cuda_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    assert torch.cuda.current_device() == 0
    for name, arguments in every_op(True).items():
        compare(name, arguments, torch.device("cuda", 1))


@cuda_only
def test_state_elsewhere_is_refused() -> None:
    arguments = moved(every_op(False)["adam_step"], CUDA)
    arguments["exp_avg"] = arguments["exp_avg"].cpu()
    with pytest.raises(ValueError, match="exp_avg is on cpu but the op runs on cuda"):
        NATIVE.adam_step(**arguments)
