"""What training loops do around an optimizer: schedulers, scaling, clipping, edits of its state."""

import collections
import copy

import pytest
import torch
from adam_cases import (
    BACKENDS,
    TOLERANCE,
    assert_lockstep,
    frozen,
    give_grads,
    make_params,
    snapshot,
    steps,
    torch_adam,
    twin,
)
from torch.optim import lr_scheduler as schedulers

from fuse_ext import Adam, Fuse

SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [0.1, 0.05], total_steps=20),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda k: 1 / (k + 1), lambda k: 0.9**k]),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, 1e-3, 1e-1, step_size_up=3, cycle_momentum=True, base_momentum=0.7, max_momentum=0.95
    ),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 4), schedulers.ExponentialLR(o, 0.8)], [4]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=2, factor=0.1),
}


@pytest.mark.parametrize("tensor_lr", (False, True), ids=("float", "tensor"))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_they_drive_torch(name, tensor_lr):
    params = make_params(torch.float64)
    twins = twin(params)
    pairs = []
    for kind, tensors in ((Adam, params), (torch_adam, twins)):
        lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
        optimizer = kind([{"params": tensors[:2]}, {"params": tensors[2:]}], lr=lr)
        pairs.append((optimizer, SCHEDULERS[name](optimizer)))
    (ours, schedule), (theirs, oracle) = pairs
    for step in range(18):
        steps(1, ours, theirs)
        loss = (float(min(step, 5)),) if name == "ReduceLROnPlateau" else ()
        schedule.step(*loss)
        oracle.step(*loss)
        assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
        assert [g["betas"] for g in ours.param_groups] == [g["betas"] for g in theirs.param_groups]
        assert_lockstep(ours, theirs, params, twins, **TOLERANCE[torch.float64])


def test_a_scheduler_resumes_with_the_optimizer():
    params = make_params()
    optimizer = Adam(params, lr=0.1)
    schedule = schedulers.OneCycleLR(optimizer, 0.1, total_steps=20)
    for _ in range(7):
        steps(1, optimizer)
        schedule.step()
    copies = twin(params)
    resumed = Adam(copies)
    resumed_schedule = schedulers.OneCycleLR(resumed, 0.1, total_steps=20)
    resumed_schedule.load_state_dict(copy.deepcopy(schedule.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(7):
        steps(1, optimizer, resumed)
        schedule.step()
        resumed_schedule.step()
    assert frozen(copies) == frozen(params)
    assert frozen(resumed.state_dict()) == frozen(optimizer.state_dict())


@pytest.mark.parametrize("unscale_first", (False, True), ids=("in_kernel", "unscale_"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler(backend, unscale_first):
    """The trajectory of torch's fused Adam: gradients unscaled, steps with infinities skipped."""
    params = make_params(shapes=[(5,), (2, 3)])
    twins = twin(params)
    runs = []
    for tensors, make in (
        (params, lambda tensors: Adam(tensors, lr=0.1, backend=backend)),
        (twins, lambda tensors: torch.optim.Adam(tensors, lr=0.1, fused=True)),
    ):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        optimizer, scales = make(tensors), []
        for step in range(10):
            optimizer.zero_grad()
            loss = sum(((step + 1) * p).square().sum() for p in tensors)
            scaler.scale(loss).backward()
            if step in (0, 4):
                tensors[1].grad[0, 0] = float("inf")
            if unscale_first:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(tensors, 1.0, error_if_nonfinite=False)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
        runs.append((optimizer, scales))
    (ours, our_scales), (theirs, their_scales) = runs
    assert our_scales == their_scales
    assert our_scales[0] == 512.0
    assert_lockstep(ours, theirs, params, twins, **TOLERANCE[torch.float32])
    assert ours.state[params[0]]["step"] == 8
    if not unscale_first:
        expected = sum((p.grad / our_scales[-2]).square().sum().item() for p in params)
        assert ours.grad_norm_sq == pytest.approx(expected, rel=1e-5)


def test_grad_scaler_on_a_bfloat16_model_in_autocast():
    network = torch.nn.Linear(4, 1)
    optimizer, scaler = Adam(network.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    x = torch.randn(16, 4)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (network(x).float() - x.sum(1, keepdim=True)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("set_to_none", (False, True))
def test_tied_weights_clipping_and_zero_grad(set_to_none):
    def make():
        torch.manual_seed(1)
        first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4)
        second.weight = first.weight
        return torch.nn.Sequential(first, torch.nn.Tanh(), second)

    x = torch.randn(8, 4)
    networks = [make(), make()]
    for network, kind in zip(networks, (Adam, torch_adam), strict=True):
        optimizer = kind(network.parameters(), lr=0.05)
        assert len(optimizer.param_groups[0]["params"]) == 2
        for _ in range(10):
            optimizer.zero_grad(set_to_none)
            network(x).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
    torch.testing.assert_close(
        list(networks[0].parameters()), list(networks[1].parameters()), rtol=1e-5, atol=1e-6
    )
    assert networks[0][0].weight is networks[0][2].weight


@pytest.mark.parametrize("kind", (Adam, Fuse))
def test_repr_lists_the_options(kind):
    text = repr(kind(make_params(), lr=0.25))
    assert text.startswith(f"{kind.__name__} (\nParameter Group 0\n")
    assert "    lr: 0.25\n" in text
    assert "    betas: (0.9, 0.999)\n" in text


def test_a_step_counts_in_the_parameters_versions():
    """Autograd must see that a parameter saved for backward has changed."""
    p = torch.randn(3).requires_grad_()
    optimizer = Adam([p])
    loss = (p * p).sum()
    give_grads([p])
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def clear(optimizer, _):
    optimizer.state.clear()


def new_state(optimizer, _):
    optimizer.state = collections.defaultdict(dict)


def forget_one(optimizer, params):
    del optimizer.state[params[1]]


def new_entry(optimizer, params):
    entry = dict(optimizer.state[params[0]])
    entry["exp_avg"] = torch.ones_like(params[0])
    optimizer.state[params[0]] = entry


def zero_moment(optimizer, params):
    optimizer.state[params[1]]["exp_avg"].zero_()


def restart_bias_correction(optimizer, params):
    for p in params:
        optimizer.state[p]["step"].zero_()


def drop_a_group(optimizer, params):
    optimizer.param_groups.pop()


def regroup(optimizer, params):
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


def replace_a_parameter(optimizer, params):
    """As in Gaussian splatting: a longer tensor takes over the moments of the one it replaces."""
    group, old = optimizer.param_groups[0], params[0]
    entry = optimizer.state.pop(old)
    for name in ("exp_avg", "exp_avg_sq"):
        entry[name] = torch.cat((entry[name], torch.zeros(3)))
    params[0] = torch.cat((old.detach(), torch.full((3,), 0.5))).requires_grad_()
    group["params"][0] = params[0]
    optimizer.state[params[0]] = entry


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "edit",
    (
        clear,
        new_state,
        forget_one,
        new_entry,
        zero_moment,
        restart_bias_correction,
        drop_a_group,
        regroup,
        replace_a_parameter,
    ),
)
def test_edits_of_state_and_groups_take_effect_as_in_torch(edit, backend):
    params = make_params()
    twins = twin(params)
    options = {"backend": backend}
    pairs = []
    for kind, tensors in ((Adam, params), (torch_adam, twins)):
        groups = [{"params": tensors[:2], "lr": 0.1}, {"params": tensors[2:], "lr": 0.01}]
        pairs.append((kind(groups, **(options if kind is Adam else {})), tensors))
    (ours, _), (theirs, _) = pairs
    steps(3, ours, theirs)
    for optimizer, tensors in pairs:
        edit(optimizer, tensors)
    for _ in range(3):
        steps(1, ours, theirs)
        assert_lockstep(ours, theirs, params, twins, **TOLERANCE[torch.float32])


def test_an_entry_of_the_wrong_shape_is_refused():
    params = make_params()
    optimizer = Adam(params)
    steps(1, optimizer)
    optimizer.state[params[0]] = {**optimizer.state[params[0]], "exp_avg": torch.zeros(2)}
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"^state does not fit: exp_avg of params\[0\] has shape"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_fuse_refuses_replaced_parameters():
    params = make_params()
    optimizer = Fuse(params)
    steps(2, optimizer)
    optimizer.param_groups[0]["params"][0] = params[0].detach().clone().requires_grad_()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="param_groups no longer hold the 6 tensors"):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("kind", (Adam, Fuse))
def test_torch_compile_leaves_the_step_alone(kind):
    """The model's part of a compiled training step is compiled; no step is traced anew."""
    networks = [torch.nn.Linear(3, 2) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    x, graphs = torch.randn(5, 3), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def train(network, optimizer):
        loss = network(x).square().mean()
        loss.backward()
        optimizer.step()

    compiled = torch.compile(train, backend=backend)
    optimizers = [kind(network.parameters(), lr=0.1) for network in networks]
    for _ in range(5):
        for network, optimizer, run in zip(networks, optimizers, (compiled, train), strict=True):
            optimizer.zero_grad()
            run(network, optimizer)
    assert frozen(list(networks[0].parameters())) == frozen(list(networks[1].parameters()))
    assert len(graphs) == 1
