"""FlatParams: where every parameter lies in the flat vector, and the views back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuse_ext.vector.flat import FlatParams

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)


def contiguous(shape, dtype):
    return torch.randn(shape, dtype=dtype)


def permuted(shape, dtype):
    return torch.randn(shape[::-1], dtype=dtype).permute(tuple(range(len(shape)))[::-1])


def strided(shape, dtype):
    return torch.randn((*shape, 2), dtype=dtype)[..., 0]


def offset(shape, dtype):
    return torch.randn((3, *shape), dtype=dtype)[1]


tensors = st.builds(
    lambda layout, shape, dtype: layout(tuple(shape), dtype),
    st.sampled_from((contiguous, permuted, strided, offset)),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(DTYPES),
)
layouts = st.lists(st.lists(tensors, max_size=4), min_size=1, max_size=4).filter(any)


def lay_out(groups) -> FlatParams:
    return FlatParams([{"params": group} for group in groups])


def as_reals(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@given(layouts)
def test_parameters_lie_in_order_without_overlap(groups):
    flat = lay_out(groups)
    at = 0
    for param, start, size in zip(flat.params, flat.offsets, flat.sizes, strict=True):
        assert size == as_reals(param).numel()
        padding = start - at
        assert padding == (at % 2 if param.is_complex() else 0)
        at = start + size
    assert flat.numel == at
    double = (torch.float64, torch.complex128)
    wanted = torch.float64 if any(p.dtype in double for p in flat.params) else torch.float32
    assert flat.dtype == wanted


@given(layouts)
def test_group_slices_are_the_groups(groups):
    flat = lay_out(groups)
    assert len(flat.group_slices) == len(groups)
    for group, place in zip(groups, flat.group_slices, strict=True):
        assert [id(p) for p in flat.params[place]] == [id(p) for p in group]


@given(layouts)
def test_pieces_are_views_in_the_parameters_shape(groups):
    """Writing through every piece fills the vector; each reads back what it was given."""
    flat = lay_out(groups)
    vector = torch.zeros(flat.numel, dtype=flat.dtype)
    for i, param in enumerate(flat.params):
        piece = flat.piece(vector, i)
        assert piece.shape == param.shape
        assert piece.is_complex() == param.is_complex()
        assert piece.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
        piece.copy_(param)
    for i, param in enumerate(flat.params):
        torch.testing.assert_close(
            flat.piece(vector, i), param, rtol=0, atol=0, check_dtype=False, check_stride=False
        )


@given(layouts)
def test_dense_pieces_keep_the_parameters_memory_order(groups):
    """What lets the kernels stream both: element k of the piece is element k in memory."""
    flat = lay_out(groups)
    vector = torch.arange(flat.numel, dtype=torch.float64)
    for i, param in enumerate(flat.params):
        real = as_reals(param)
        if param.numel() == 0 or not torch.ops.aten.is_non_overlapping_and_dense(real):
            continue
        piece = as_reals(flat.piece(vector, i))
        assert piece.stride() == real.stride()
        in_memory = piece.as_strided((piece.numel(),), (1,), flat.offsets[i])
        assert in_memory.tolist() == list(range(flat.offsets[i], flat.offsets[i] + flat.sizes[i]))


@given(layouts, st.data())
def test_one_value_per_group_is_spread_over_its_parameters(groups, data):
    flat = lay_out(groups)
    values = data.draw(
        st.lists(st.sampled_from((0.0, 1.0)), min_size=len(groups), max_size=len(groups))
    )
    spread = flat.per_segment(values, neutral=1.0)
    if set(values) == {1.0}:
        assert spread == []
    else:
        assert spread == [v for v, group in zip(values, groups, strict=True) for _ in group]


@given(layouts)
def test_only_parameters_with_gradients_take_part(groups):
    flat = lay_out(groups)
    for i, param in enumerate(flat.params):
        param.requires_grad_()
        if i % 2:
            param.grad = torch.ones_like(param)
    part, grads = flat.gradients()
    odd = list(range(1, len(flat.params), 2))
    assert part.indices == odd
    assert part.absent == tuple(range(0, len(flat.params), 2))
    assert part.offsets == [flat.offsets[i] for i in odd]
    assert part.pick(flat.sizes) == [flat.sizes[i] for i in odd] and part.pick([]) == []
    for i, param, grad in zip(odd, part.params, grads, strict=True):
        assert param is flat.params[i]
        assert not grad.is_complex()
        assert grad.numel() == flat.sizes[i]
        assert grad.sum() == param.numel()
    assert flat.gradients()[0] is part


@given(layouts)
def test_a_share_of_zero_takes_no_part(groups):
    flat = lay_out(groups)
    for param in flat.params:
        param.requires_grad_().grad = torch.ones_like(param)
    assert flat.gradients()[0] is flat.gradients([0.5] * len(flat.params))[0] is flat.whole
    shares = [float(i % 2) for i in range(len(flat.params))]
    part, grads = flat.gradients(shares)
    assert part.absent == tuple(range(0, len(flat.params), 2))
    assert len(grads) == len(part.params)


def test_gradients_are_the_users_own_tensors():
    """Line searches write to them; a lazily conjugated one is replaced by what it stands for."""
    z = torch.randn(3, dtype=torch.complex64).requires_grad_()
    x = torch.randn(2).requires_grad_()
    x.grad = torch.ones(2)
    z.conj().backward(torch.full((3,), 1 + 2j, dtype=torch.complex64))
    assert z.grad.is_conj()
    flat = lay_out([[x, z]])
    _, grads = flat.gradients()
    assert grads[0] is x.grad
    assert grads[1].tolist() == [[1.0, -2.0]] * 3
    grads[1].zero_()
    assert z.grad.tolist() == [0j] * 3


def test_replaced_parameters_are_noticed():
    a, b, c = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    groups = [{"params": [a, b]}, {"params": [c]}]
    flat = FlatParams(groups)
    assert not flat.replaced()
    groups[0]["params"][1] = torch.zeros(2)
    assert flat.replaced()
    groups[0]["params"][1] = b
    assert not flat.replaced()
    groups[1]["params"].insert(0, groups[0]["params"].pop())
    assert flat.replaced()
    groups[0]["params"].append(groups[1]["params"].pop(0))
    assert not flat.replaced()
    groups.pop()
    assert flat.replaced()


def test_what_may_change_and_what_may_not():
    p = torch.zeros(2, 3)
    flat = lay_out([[p]])
    p.data = torch.ones(2, 3)  # other memory of the same form, as sharding and offloading do
    p += 1
    flat.check_unchanged()
    for changed in (p.double(), torch.zeros(3, 2), torch.zeros(3, 2).t(), torch.zeros(2, 3, 1)):
        p.data = changed
        with pytest.raises(ValueError, match=r"params\[0\] is now torch.* but was torch.float32"):
            flat.check_unchanged()
    p.data = torch.zeros(2, 3)
    flat.check_unchanged()
