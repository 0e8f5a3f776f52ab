"""Tensors of every shape, memory order and density give what plain vectors give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    BACKENDS,
    BF16,
    DTYPES,
    F32,
    F64,
    Tensors,
    Watch,
    adam_arguments,
    copy_arguments,
    direction_arguments,
    make_ring,
    point_arguments,
    same_bits,
    set_out_arguments,
    stats_arguments,
    tensors_of,
    update_arguments,
)
from torch import Tensor

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def laid_out(shape: tuple[int, ...], order: tuple[int, ...], step: int, dtype: Any) -> Tensor:
    """Random numbers; ``order`` lists the dimensions from the slowest in memory to the fastest.

    A step of 2 leaves every other element of the fastest dimension out (not dense), a step of 0
    repeats one element along the slowest (expanded), and 1 is dense, behind an offset.
    """
    sizes = [shape[d] for d in order]
    if step == 2 and sizes:
        whole = torch.randn(*sizes[:-1], 2 * sizes[-1]).to(dtype)[..., ::2]
    elif step == 0 and sizes:
        whole = torch.randn(1, *sizes[1:]).to(dtype).expand(sizes)
    else:
        whole = torch.randn(math.prod(sizes) + 3).to(dtype)[3:].view(sizes)
    inverse = [order.index(d) for d in range(len(order))]
    return whole.permute(inverse)


def as_vector(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy as 1-D tensor in the memory order of ``like``, or row-major if that has gaps."""
    if torch.ops.aten.is_non_overlapping_and_dense(like):
        order = sorted(range(like.dim()), key=lambda d: -like.stride(d))
        tensor = tensor.permute(order)
    return tensor.clone(memory_format=torch.contiguous_format).view(-1)


@st.composite
def tensor_pairs(draw: st.DrawFn, grad_steps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A parameter and its gradient, each with a layout and dtype of its own."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    dims = range(len(shape))
    if draw(st.integers(0, 4)) == 0 and shape:  # longer than a vector register, now and then
        shape = (*shape[:-1], 37)
    param = laid_out(
        shape,
        tuple(draw(st.permutations(dims))),
        draw(st.sampled_from((1, 2))),
        draw(st.sampled_from((F32, F64, BF16, torch.float16))),
    )
    grad = laid_out(
        shape,
        tuple(draw(st.permutations(dims))),
        draw(st.sampled_from(grad_steps)),
        draw(st.sampled_from(DTYPES)),
    )
    return param, grad


def check_same_as_vectors(
    backend: str, pairs: list[tuple[Tensor, Tensor]], *, scatter: bool
) -> None:
    """Runs every op on the tensors and on vector copies of them; all results have equal bits."""
    torch.manual_seed(1)
    op = BACKENDS[backend]
    sizes = [param.numel() for param, _ in pairs]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    awkward = Tensors([p for p, _ in pairs], [g for _, g in pairs], offsets, sum(sizes))
    plain = Tensors(
        [as_vector(p, p) for p, _ in pairs],
        [as_vector(g, p) for p, g in pairs],
        offsets,
        sum(sizes),
    )
    decay = [0.5 * (i % 2) for i in range(len(pairs))]
    lr_scale = [1.0 + i % 3 for i in range(len(pairs))]

    def run(name: str, arguments: dict[str, Any]) -> None:
        """``arguments`` are those for ``plain``, but ``params`` and ``grads`` of both."""
        results = []
        for tensors in (awkward, plain):
            mine = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
            mine |= {k: getattr(tensors, k) for k in ("params", "grads") if k in arguments}
            getattr(op, name)(**mine)
            results.append(mine)
        for key in arguments:
            if isinstance(arguments[key], Tensor):
                assert same_bits(results[0][key], results[1][key]), f"{name}: {key}"
        for i, (x, g) in enumerate(zip(awkward.params, awkward.grads, strict=True)):
            assert same_bits(as_vector(x, x), plain.params[i]), f"{name}: params[{i}]"
            assert same_bits(as_vector(g, x), plain.grads[i]), f"{name}: grads[{i}]"

    made = make_ring(plain.numel, 2, 1, 2, BF16, F64)
    for name in ("coef_s", "coef_y", "coef_g"):
        made.array(name).copy_(torch.randn_like(made.array(name)))
    origin = torch.randn(plain.numel, dtype=F64)
    run("adam_step", adam_arguments(plain, F64, amsgrad=True, weight_decay=0.1))
    run("grad_stats", stats_arguments(plain, made, decay))
    run("lbfgs_update", update_arguments(plain, made, True, decay, True))
    run("lbfgs_direction", direction_arguments(plain, made, decay, lr_scale))
    run("lbfgs_set_out", set_out_arguments(plain, made, origin, decay, lr_scale))
    run("lbfgs_move", point_arguments(plain, made, origin) | {"step": 0.5, "save": True})
    run("fuse_blend", point_arguments(plain, made, origin) | {"theta": 0.3, "step": 0.5})
    run("grad_gather", copy_arguments(plain, origin))
    if scatter:
        run("grad_scatter", copy_arguments(plain, origin))


@each_backend
@given(data=st.data())
@settings(max_examples=100)
def test_layouts_that_can_be_written(backend: str, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(tensor_pairs((1, 2)), min_size=1, max_size=4))
    check_same_as_vectors(backend, pairs, scatter=True)


@each_backend
@given(data=st.data())
def test_expanded_gradients(backend: str, data: st.DataObject) -> None:
    """As the gradient of a sum has them: one element for many."""
    pairs = data.draw(st.lists(tensor_pairs((0, 1)), min_size=1, max_size=4))
    check_same_as_vectors(backend, pairs, scatter=False)


@each_backend
@pytest.mark.parametrize(
    "kind", ["channels_last", "channels_last_3d", "transposed", "sliced rows", "scalar", "flipped"]
)
def test_common_layouts(backend: str, kind: str) -> None:
    param, grad = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    if kind == "channels_last":
        param = param.to(memory_format=torch.channels_last)
    elif kind == "channels_last_3d":
        param = torch.randn(2, 3, 4, 5, 7).to(memory_format=torch.channels_last_3d)
        grad = torch.randn(2, 3, 4, 5, 7)
    elif kind == "transposed":
        param, grad = torch.randn(40, 70).t(), torch.randn(70, 40)
    elif kind == "sliced rows":
        param, grad = torch.randn(40, 70)[::3, 5:60], torch.randn(55, 14).t()
    elif kind == "scalar":
        param, grad = torch.tensor(2.0), torch.tensor(3.0)
    else:
        grad = grad.flip(0).transpose(0, 2).contiguous().transpose(0, 2)
    check_same_as_vectors(backend, [(param, grad)], scatter=True)


def two_adam_steps(backend: str, param: Tensor, grad: Tensor) -> Tensor:
    """The parameter after two steps, as a plain copy."""
    arguments = adam_arguments(
        Tensors([param], [grad], [0], param.numel()),
        draw=lambda n: torch.zeros(n, dtype=F64),
    )
    for step in (1, 2):
        BACKENDS[backend].adam_step(**arguments | {"step": step})
    return param.detach().clone()


@each_backend
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("kind", ["leaf", "inference", "inference outside of its mode"])
def test_kinds_of_tensors(backend: str, kind: str, sliced: bool) -> None:
    values, grad = torch.randn(6, 8), torch.randn(6, 4 if sliced else 8)
    select = (slice(None), slice(None, None, 2 if sliced else None))
    expected = two_adam_steps(backend, values.clone()[select], grad)
    with torch.inference_mode(kind != "leaf"):
        param, grad = values.clone()[select], grad.clone()
    if kind == "leaf":
        param = param.requires_grad_()
        with torch.no_grad():
            assert same_bits(two_adam_steps(backend, param, grad), expected)
        assert param.requires_grad and param.grad_fn is None
    elif kind == "inference":
        with torch.inference_mode():
            assert same_bits(two_adam_steps(backend, param, grad), expected)
    elif backend == "native":
        # There is no counter to bump, and a kernel needs none.
        assert same_bits(two_adam_steps(backend, param, grad), expected)


def test_a_leaf_in_grad_mode_is_changed_as_by_any_kernel() -> None:
    """The ops have no derivative; also a sliced leaf must not fail halfway."""
    for values in (torch.randn(6, 8), torch.randn(6, 16)[:, ::2]):
        grad = torch.randn(6, 8)
        expected = two_adam_steps("native", values.clone(), grad)
        param = values.detach().requires_grad_()
        actual = two_adam_steps("native", param, grad)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@each_backend
@pytest.mark.parametrize("name", ["grads", "grads of another order"])
def test_lazily_negated_gradients(backend: str, name: str) -> None:
    """The imaginary part of a conjugate carries a negative bit instead of negated memory."""
    lazy = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    param = torch.randn(4, 6)
    if name != "grads":
        lazy, param = lazy.t(), torch.randn(6, 4)
    grad = lazy.resolve_neg().contiguous()
    assert same_bits(
        two_adam_steps(backend, param.clone(), lazy), two_adam_steps(backend, param.clone(), grad)
    )


@each_backend
def test_gradients_of_autograd(backend: str) -> None:
    """What autograd leaves in .grad works, an expanded gradient included."""
    param = torch.randn(5, 4, requires_grad=True)
    param.sum().backward()
    expanded = torch.ones(()).expand(5, 4)
    with torch.no_grad():
        assert param.grad is not None
        ours = two_adam_steps(backend, param.detach().clone(), param.grad)
        assert same_bits(ours, two_adam_steps(backend, param.detach().clone(), expanded))


@each_backend
def test_tensors_with_a_shared_storage(backend: str) -> None:
    """Parameters that are parts of one buffer change only there."""
    buffer, grad = torch.randn(40), torch.randn(10)
    before = buffer.clone()
    watch = Watch({"buffer": buffer})
    two_adam_steps(backend, buffer[10:20], grad)
    assert same_bits(buffer[:10], before[:10]) and same_bits(buffer[20:], before[20:])
    assert watch.changed() == watch.bumped() == set(tensors_of({"buffer": buffer}))
