"""The C++ layout: what it notices of parameters and gradients, and its way of calling the ops."""

import gc
import math
import weakref

import pytest
import torch
from adam_cases import frozen, snapshot
from lbfgs_cases import NEVER_STOP
from torch.utils._python_dispatch import TorchDispatchMode

from fuse_ext import _C, LBFGS, Adam, Fuse, FusePV
from fuse_ext.curvature import ring as history
from fuse_ext.kernels import bound_ops, ops
from fuse_ext.kernels.scalars import index
from fuse_ext.vector import gradients, reduced_ops
from fuse_ext.vector.flat import FlatParams

OPTIMIZERS = {
    "Adam": lambda params: Adam(params, lr=0.1, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda params: Adam(
        params, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True, maximize=True
    ),
    "fixed": lambda params: LBFGS(params, lr=0.5, max_iter=2, history_size=3, **NEVER_STOP),
    "searched": lambda params: LBFGS(
        params, max_iter=2, history_size=3, line_search_fn="strong_wolfe", **NEVER_STOP
    ),
    "bf16": lambda params: LBFGS(params, history_dtype=torch.bfloat16, weight_decay=0.1),
    "int8": lambda params: LBFGS(params, history_dtype=torch.int8, maximize=True, lr=0.01),
    "FusePV": lambda params: FusePV(params, lr=0.1, switch=2),
    "Fuse": lambda params: Fuse(params, lr=0.1, theta=0.5),
}


class Subclass(torch.Tensor):
    """May redefine what a gradient is."""


def make_groups():
    shapes = [[(2, 3), (4,)], [], [(5,)]]
    return [{"params": [torch.randn(s).requires_grad_() for s in group]} for group in shapes]


def layout_of(groups):
    return FlatParams(groups).layout


def give_grads(groups):
    for group in groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)


# --- parameters -----------------------------------------------------------------------------


def replace(groups):
    groups[0]["params"][1] = torch.zeros(4).requires_grad_()


def reorder(groups):
    groups[0]["params"].reverse()


def move_between_groups(groups):
    groups[1]["params"].append(groups[0]["params"].pop())


def drop(groups):
    groups[2]["params"].pop()


def add(groups):
    groups[2]["params"].append(torch.zeros(1))


def add_group(groups):
    groups.append({"params": []})


def no_group(groups):
    groups[1] = None


def no_params(groups):
    del groups[1]["params"]


def tuple_of_params(groups):
    groups[0]["params"] = tuple(groups[0]["params"])


def change_dtype(groups):
    groups[0]["params"][0].data = groups[0]["params"][0].data.double()


def reshape(groups):
    groups[0]["params"][0].data = groups[0]["params"][0].data.view(3, 2)


def change_strides(groups):
    groups[0]["params"][0].data = torch.randn(3, 2).t()


def change_device(groups):
    elsewhere = torch.empty(2, 3, device="meta").requires_grad_()
    torch.utils.swap_tensors(groups[0]["params"][0], elsewhere)


def swap(groups):
    torch.utils.swap_tensors(groups[0]["params"][1], torch.zeros(5).requires_grad_())


CHANGES = (
    replace,
    reorder,
    move_between_groups,
    drop,
    add,
    add_group,
    no_group,
    no_params,
    tuple_of_params,
    change_dtype,
    reshape,
    change_strides,
    change_device,
    swap,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_it_notices_a_change(change):
    groups = make_groups()
    layout = layout_of(groups)
    assert layout.unchanged(groups)
    change(groups)
    assert not layout.unchanged(groups)


def test_what_does_not_matter_is_no_change():
    groups = make_groups()
    layout = layout_of(groups)
    with torch.no_grad():
        groups[0]["params"][0].mul_(2.0)
        groups[0]["params"][1].data = torch.zeros(4)
        torch.utils.swap_tensors(groups[2]["params"][0], torch.ones(5).requires_grad_())
    groups[0]["lr"] = 3.0
    groups[1]["params"] = []
    assert layout.unchanged(groups)
    assert torch.equal(groups[2]["params"][0], torch.ones(5))


def test_a_swapped_tensor_is_stepped_on():
    """torch puts another tensor behind the same Python object; C++ must not keep the old one."""
    param = torch.ones(3).requires_grad_()
    optimizer = Adam([param], lr=0.1)
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
        torch.utils.swap_tensors(param, torch.full((3,), 5.0).requires_grad_())
        assert torch.equal(param, torch.full((3,), 5.0))
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(param, torch.full((3,), 4.9))


@pytest.mark.parametrize("kind", (torch.Tensor, None), ids=("plain", "subclass"))
def test_places_change_with_every_move_and_with_nothing_else(kind):
    params = [torch.ones(3).requires_grad_(), torch.ones(2).as_subclass(kind or Subclass)]
    flat = FlatParams([{"params": params}])
    seen = [flat.places()]
    params[0].grad = torch.ones(3)
    assert flat.places() == seen[0]
    with torch.no_grad():
        params[1].add_(1.0)
    seen.append(flat.places())
    params[0].data = torch.ones(3)
    seen.append(flat.places())
    assert seen[0] != seen[1] != seen[2] != seen[0]


# --- gradients ------------------------------------------------------------------------------


def test_gradients_are_the_users_own():
    groups = make_groups()
    layout = layout_of(groups)
    assert layout.grads() is None  # none yet
    give_grads(groups)
    params = [p for group in groups for p in group["params"]]
    assert all(g is p.grad for g, p in zip(layout.grads(), params, strict=True))
    params[0].grad = None
    assert layout.grads() is None


@pytest.mark.parametrize(
    ("param", "grad"),
    [
        (torch.zeros(2, 2), torch.eye(2).to_sparse()),
        (torch.zeros(2), torch._neg_view(torch.ones(2))),
        (torch.zeros(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64)),
    ],
    ids=("sparse", "negated", "complex"),
)
def test_gradients_that_only_python_can_take(param, grad):
    param.requires_grad_().grad = grad
    assert layout_of([{"params": [param]}]).grads() is None


def test_a_subclass_of_tensor_goes_the_long_way():
    params = [torch.ones(3).as_subclass(Subclass).requires_grad_(), torch.ones(3).requires_grad_()]
    optimizers = [Adam([p], lr=0.1) for p in params]
    layouts = [optimizer.flat.layout for optimizer in optimizers]
    assert [layout.has_ops for layout in layouts] == [False, True]
    assert not layouts[0].unchanged(optimizers[0].param_groups)
    for _ in range(3):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.ones(3)
            optimizer.step()
    assert torch.equal(params[0].as_subclass(torch.Tensor), params[1])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_gradient_outlives_zero_grad(kind):
    param = torch.ones(4).requires_grad_()
    optimizer = OPTIMIZERS[kind]([param])

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    grad = weakref.ref(param.grad)
    optimizer.zero_grad()
    gc.collect()
    assert grad() is None


# --- the ops --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_both_ways_of_calling_the_ops_do_the_same(kind, monkeypatch):
    def run():
        torch.manual_seed(3)
        params = [torch.randn(s).requires_grad_() for s in ((3, 2), (150,), (0,))]
        optimizer = OPTIMIZERS[kind](params)

        def closure():
            optimizer.zero_grad()
            loss = sum(
                (p.square() * torch.arange(1, p.numel() + 1).view_as(p)).sum() for p in params
            )
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(6)]
        return losses, frozen(params), frozen(optimizer.state_dict())

    direct = run()
    for module in (reduced_ops, gradients):
        monkeypatch.setattr(module, "bind", bound_ops._Listed)
    assert run() == direct


def test_errors_of_the_ops_keep_their_types():
    param = torch.zeros(3).requires_grad_()
    layout = layout_of([{"params": [param]}])
    moments, stats = [torch.zeros(3), torch.zeros(3)], torch.zeros(1, dtype=torch.float64)
    numbers = (1, 0.1, 0.9, 0.99, 1e-8, 0.0, 0.0, False, False)

    def step(grads, *tensors):
        layout.adam_step(grads, *tensors, None, stats, None, *numbers)

    with pytest.raises(ValueError, match=r"grads\[0\] has shape \[2\]"):
        step([torch.zeros(2)], *moments)
    with pytest.raises(TypeError, match=r"grads\[0\] has dtype Int"):
        step([torch.zeros(3, dtype=torch.int32)], *moments)
    with pytest.raises(ValueError, match="grads has 0 entries"):
        step([], *moments)
    with pytest.raises(ValueError, match="exp_avg_sq has shape"):
        step([torch.zeros(3)], moments[0], torch.zeros(4))
    with pytest.raises(TypeError):
        step(None, *moments)
    assert torch.equal(param, torch.zeros(3))


def test_a_refused_gradient_changes_nothing():
    params = [torch.ones(3).requires_grad_(), torch.eye(2).requires_grad_()]
    optimizer = Adam(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params[1].grad = torch.eye(2).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=r"grads\[1\] has layout"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_layouts_are_made_of_tensors_only():
    with pytest.raises(TypeError):
        _C.Layout([torch.zeros(3)], [0])
    assert not _C.Layout([[None]], [0]).has_ops


# --- options --------------------------------------------------------------------------------


def fixed_step(lr):
    param = torch.ones(2).requires_grad_()
    optimizer = LBFGS([param], lr=lr, max_iter=1, history_size=2, **NEVER_STOP)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * param.square().sum()
        loss.backward()
        return loss

    return optimizer, closure


def test_edits_of_the_groups_are_seen_by_the_next_step():
    optimizer, closure = fixed_step(0.5)
    group = optimizer.param_groups[0]
    progress = []
    for lr in (0.5, 0.5, 0.25, 0.25, 0.125):
        group["lr"] = lr
        optimizer.step(closure)
        progress.append(optimizer._phase.progress.step_length)
    assert progress == [0.25, 0.5, 0.25, 0.25, 0.125]  # the first is lr / |g|_1
    group["line_search_fn"] = "armijo"
    optimizer.step(closure)
    assert optimizer._phase.progress.line_search == "armijo"
    group["line_search_fn"] = "golden"
    for _ in range(2):
        with pytest.raises(ValueError, match="line_search_fn"):
            optimizer.step(closure)
    group["line_search_fn"] = None
    group["max_iter"], group["max_eval"] = 3, 10
    before = optimizer.state[group["params"][0]]["n_iter"]
    optimizer.step(closure)
    assert optimizer.state[group["params"][0]]["n_iter"] == before + 3


def test_a_step_size_changed_in_place_is_seen():
    lr = torch.tensor(0.5)
    optimizer, closure = fixed_step(lr)
    optimizer.step(closure)
    optimizer.step(closure)
    assert optimizer._phase.progress.step_length == 0.5
    lr.fill_(0.25)
    optimizer.step(closure)
    assert optimizer._phase.progress.step_length == 0.25


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("search", ("strong_wolfe", "approximate_wolfe", None))
def test_as_on_a_device_a_trial_reads_loss_and_norms_at_once(backend, search, monkeypatch):
    """CPU tensors made to go the way of a device's: no loss is read, nor anything else alone."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def run(as_on_a_device):
        torch.manual_seed(2)
        param = torch.rand(40).add_(1.0).requires_grad_()
        lr = 1.0 if search else 0.1
        optimizer = LBFGS([param], lr, 1, line_search_fn=search, backend=backend)

        def closure():
            optimizer.zero_grad()
            loss = (param.square() - param.log()).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        history = optimizer._phase.history
        if as_on_a_device:
            history._with_loss = torch.zeros(len(history._stats) + 1, dtype=torch.float64)
            history._stats = history._with_loss[:-1]
        optimizer.step(closure)  # the reference's empty ring reads for itself
        with Reads() as reads:
            losses = [optimizer.step(closure) for _ in range(6)]
        return [loss.item() for loss in losses], frozen([param]), reads.count

    (losses, params, apart), (again, same, together) = run(False), run(True)
    assert (losses, params) == (again, same)
    if backend == "reference":  # what C++ reads of a CPU tensor goes past the dispatcher
        assert apart - together >= 6


# --- the move that comes with the direction -------------------------------------------------


@torch.no_grad()
def ring_in_use(backend, dtype=None):
    """A history of 5 x.x with two pairs, its parameters, and arguments of update_direction."""
    torch.manual_seed(3)
    groups = [{"params": [torch.randn(2, 3).requires_grad_(), torch.randn(5).requires_grad_()]}]
    flat = FlatParams(groups)
    ring = history.History(flat, ops.select(backend, flat.device), {}, 3, dtype)
    origin = torch.zeros(flat.numel)
    pair_step = None
    for _ in range(3):
        grads = [10.0 * p.detach() for p in flat.params]
        ring.update_direction(grads, [], [], False, pair_step, 1e-8)
        ring.move(origin, 0.01, True)
        pair_step = 0.01
    grads = [10.0 * p.detach() for p in flat.params]
    return ring, flat, (grads, [], [], False, pair_step, 1e-8)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
@torch.no_grad()
def test_the_move_with_the_direction_is_the_one_after_it(backend, dtype):
    (one, at_once, arguments), (two, in_turn, same) = (ring_in_use(backend, dtype) for _ in "ab")
    origins = [torch.zeros(at_once.numel) for _ in range(2)]
    header, moved = one.update_direction(*arguments, origins[0], 0.25, 0.0)
    assert moved and header.count == 3
    assert two.update_direction(*same) == (header, False)
    two.move(origins[1], 0.25, True)
    assert torch.equal(*origins)
    assert all(map(torch.equal, at_once.params, in_turn.params))


@pytest.mark.parametrize("backend", ["native", "reference"])
@torch.no_grad()
def test_what_is_no_direction_moves_nothing(backend):
    """The slope is known only after the pass that moves; then the parameters go back."""
    ring, flat, arguments = ring_in_use(backend)
    before = [p.detach().clone() for p in flat.params]
    header, moved = ring.update_direction(*arguments, torch.zeros(flat.numel), 0.25, 1e30)
    assert not moved and header.direction_dot_grad < 0.0
    assert all(map(torch.equal, flat.params, before))
    arguments[0][0].fill_(math.inf)
    _, moved = ring.update_direction(*arguments, torch.zeros(flat.numel), 0.25, 0.0)
    assert not moved
    assert all(map(torch.equal, flat.params, before))


@pytest.mark.parametrize("backend", ["native", "reference"])
@torch.no_grad()
def test_without_pairs_the_step_is_not_known_yet(backend):
    ring, flat, arguments = ring_in_use(backend)
    ring.reset()
    before = [p.detach().clone() for p in flat.params]
    *rest, _, tolerance = arguments
    origin = torch.zeros(flat.numel)
    header, moved = ring.update_direction(*rest, None, tolerance, origin, 0.25, 0.0)
    assert not moved and header.count == 0
    assert all(map(torch.equal, flat.params, before))


@pytest.mark.parametrize("backend", ["native", "reference"])
@torch.no_grad()
def test_pairs_of_other_sets_make_no_step_known(backend):
    ring, flat, arguments = ring_in_use(backend)
    *rest, _, tolerance = arguments
    before = [p.detach().clone() for p in flat.params]
    origin = torch.zeros(flat.numel)
    ring.scalars[index("set", ring.slots)] = 1.0
    header, moved = ring.update_direction(*rest, None, tolerance, origin, 0.25, 0.0)
    assert not moved and (header.count, header.usable) == (2, 0)
    assert torch.equal(ring.rows[0, int(header.open)], -torch.cat([g.flatten() for g in rest[0]]))
    assert all(map(torch.equal, flat.params, before))
    ring.scalars[index("set", ring.slots)] = 0.0
    header, moved = ring.update_direction(*rest, None, tolerance, origin, 0.25, 0.0)
    assert moved and (header.count, header.usable) == (2, 2)
    ring.reset()
    assert ring.header().usable == 0
