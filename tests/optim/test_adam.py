"""Adam beside torch.optim.Adam and AdamW: every state buffer, every option, every dtype."""

import math

import pytest
import torch
from adam_cases import (
    BACKENDS,
    TOLERANCE,
    assert_lockstep,
    give_grads,
    make_params,
    steps,
    torch_adam,
    twin,
)

from fuse_ext import Adam

OPTIONS = {
    "default": {},
    "lr": {"lr": 0.05, "eps": 1e-3},
    "betas": {"betas": (0.5, 0.9)},
    "no_memory": {"betas": (0.0, 0.0)},
    "amsgrad": {"amsgrad": True, "lr": 0.02},
    "l2": {"weight_decay": 0.3},
    "decoupled": {"weight_decay": 0.3, "lr": 0.05, "decoupled_weight_decay": True},
    "maximize": {"maximize": True},
    "all": {"maximize": True, "amsgrad": True, "weight_decay": 0.1, "lr": 0.01, "eps": 1e-5},
    "tensor_lr": {"lr": torch.tensor(0.003, dtype=torch.float64)},
    "frozen": {"lr": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hundred_steps_in_lockstep(backend, dtype, options):
    params = make_params(dtype)
    twins = twin(params)
    ours, theirs = Adam(params, backend=backend, **options), torch_adam(twins, **options)
    for count in (1, 1, 8, 90):
        steps(count, ours, theirs)
        assert_lockstep(ours, theirs, params, twins, **TOLERANCE[dtype])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_parameters_keep_float32_moments(backend, dtype, options):
    """The oracle is torch's float32 Adam, its parameters rounded after each step."""
    params = make_params(dtype)
    twins = [p.detach().float().requires_grad_() for p in params]
    ours, theirs = Adam(params, backend=backend, **options), torch_adam(twins, **options)
    info = torch.finfo(dtype)
    for _ in range(100):
        give_grads(params)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.float()
            q.data.copy_(p.data)
        ours.step()
        theirs.step()
        for p, q in zip(params, twins, strict=True):
            # Near a tie the last bit may fall either way.
            rounded = q.to(dtype).float()
            torch.testing.assert_close(p.float(), rounded, rtol=info.eps, atol=info.tiny)
            q.data.copy_(p.data)
    assert_lockstep(ours, theirs, params, twins, check_dtype=False, **TOLERANCE[torch.float32])
    assert all(ours.state[p]["exp_avg"].dtype == torch.float32 for p in params)


def test_mixed_dtypes_share_one_flat_state():
    """An odd number of reals before a complex parameter, and float64 arithmetic for all."""
    dtypes = (torch.float32, torch.complex64, torch.float64, torch.complex128, torch.bfloat16)
    params = [make_params(dtype, [(3,)])[0] for dtype in dtypes]
    twins = twin(params)
    ours, theirs = Adam(params, lr=0.1), torch_adam(twins, lr=0.1)
    steps(20, ours, theirs)
    for p, q in zip(params, twins, strict=True):
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if p.dtype != torch.bfloat16 else {}
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_with_their_own_options_and_missing_gradients(backend):
    """A parameter without a gradient is skipped and its step count stays, as in torch."""
    params = make_params(shapes=[(3,), (2, 2), (5,), (), (4,), (0,)])
    twins = twin(params)

    def groups(tensors):
        return [
            {"params": tensors[:2], "lr": 0.1, "betas": (0.8, 0.99)},
            {"params": tensors[2:5], "weight_decay": 0.1, "eps": 1e-4},
            {"params": tensors[5:], "maximize": True, "amsgrad": True},
        ]

    ours, theirs = Adam(groups(params), backend=backend), torch_adam(groups(twins))
    for _ in range(60):
        give_grads(params, twins)
        for p, q in zip(params, twins, strict=True):
            if torch.rand(()) < 0.3:
                p.grad = q.grad = None
        ours.step()
        theirs.step()
        assert_lockstep(ours, theirs, params, twins, **TOLERANCE[torch.float32])
    assert len({ours.state[p]["step"].item() for p in params}) > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", (0, 1, 4))
def test_one_missing_gradient_in_a_uniform_run(backend, missing):
    params = make_params(torch.float64)
    twins = twin(params)
    ours, theirs = Adam(params, lr=0.1, backend=backend), torch_adam(twins, lr=0.1)
    for step in range(6):
        give_grads(params, twins)
        if step == missing:
            params[1].grad = twins[1].grad = None
        ours.step()
        theirs.step()
        assert_lockstep(ours, theirs, params, twins, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_any_gradient_nothing_happens(backend):
    params = make_params()
    twins = twin(params)
    ours, theirs = Adam(params, backend=backend), torch_adam(twins)
    ours.step()
    theirs.step()
    assert_lockstep(ours, theirs, params, twins, rtol=0, atol=0)
    assert ours.grad_norm_sq == 0.0
    steps(3, ours, theirs)
    assert_lockstep(ours, theirs, params, twins, **TOLERANCE[torch.float32])


LAYOUTS = {
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "one_channel": lambda: torch.randn(4, 1, 2, 2).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(6, 4).t(),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "every_second": lambda: torch.randn(4, 6)[:, ::2],
    "offset": lambda: torch.randn(9)[3:8],
    "complex": lambda: torch.randn(4, 3, dtype=torch.complex64).t(),
    "complex_every_second": lambda: torch.randn(3, 4, dtype=torch.complex64)[:, ::2],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_layout", ("same", "contiguous", "strided"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(backend, layout, grad_layout):
    tensor = LAYOUTS[layout]()
    strides = tensor.stride()
    params = [torch.randn(3), tensor, torch.randn(2)]
    params = [p.requires_grad_() for p in params]
    twins = [p.detach().clone(memory_format=torch.contiguous_format) for p in params]
    twins = [q.requires_grad_() for q in twins]
    ours, theirs = Adam(params, lr=0.1, backend=backend), torch_adam(twins, lr=0.1)
    for _ in range(5):
        give_grads(twins, params)
        grad = twins[1].grad
        if grad_layout == "same":
            tensor.grad = torch.zeros_like(tensor).copy_(grad)
        elif grad_layout == "strided":
            tensor.grad = torch.stack((grad, torch.full_like(grad, math.nan)), -1)[..., 0]
        ours.step()
        theirs.step()
        assert_lockstep(ours, theirs, params, twins, check_stride=False, **TOLERANCE[torch.float32])
    assert tensor.stride() == strides


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_gradients_of_another_dtype(backend, grad_dtype):
    params = make_params(shapes=[(5,), (2, 3)])
    twins = twin(params)
    ours, theirs = Adam(params, lr=0.1, backend=backend), torch_adam(twins, lr=0.1)
    for _ in range(10):
        give_grads(params, twins)
        for p, q in zip(params, twins, strict=True):
            p.grad.data = p.grad.to(grad_dtype)
            q.grad.copy_(p.grad)
        ours.step()
        theirs.step()
    assert params[0].grad.dtype == grad_dtype
    assert_lockstep(ours, theirs, params, twins, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazily_conjugated_and_negated_gradients(backend):
    """What autograd itself leaves in .grad: views whose memory holds other values."""
    z = torch.randn(3, dtype=torch.complex64).requires_grad_()
    x = torch.randn(()).requires_grad_()
    twins = twin([z, x])
    weight = torch.randn(3, dtype=torch.complex64)
    (z.conj() * weight).real.sum().backward()
    torch.complex(torch.zeros(()), x).conj().backward(torch.ones((), dtype=torch.complex64))
    assert z.grad.is_conj() and x.grad.is_neg()
    for p, q in zip((z, x), twins, strict=True):
        q.grad = p.grad.resolve_conj().resolve_neg()
    ours, theirs = Adam([z, x], lr=0.1, backend=backend), torch_adam(twins, lr=0.1)
    ours.step()
    theirs.step()
    assert_lockstep(ours, theirs, [z, x], twins, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ({}, {"maximize": True}, {"amsgrad": True}), ids=str)
def test_without_decay_an_infinite_parameter_leaves_the_moments_finite(backend, options):
    param = torch.nn.Parameter(torch.tensor([math.inf, 1.0]))
    optimizer = Adam([param], backend=backend, **options)
    param.grad = torch.tensor([2.0, 3.0])
    optimizer.step()
    state = optimizer.state[param]
    sign = -1.0 if options.get("maximize") else 1.0
    torch.testing.assert_close(state["exp_avg"], sign * torch.tensor([0.2, 0.3]))
    torch.testing.assert_close(state["exp_avg_sq"], torch.tensor([0.004, 0.009]))
    assert param[0] == math.inf


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("a", (1e-8, 1e-2, 1.0))
def test_epsilon_inside_the_root_is_equation_2c(backend, dtype, a):
    beta1, beta2, lr = 0.9, 0.99, 0.03
    (param,) = make_params(dtype, [(6,)])
    x = param.detach().double()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    optimizer = Adam(
        [param], lr=lr, betas=(beta1, beta2), eps=a, eps_inside_root=True, backend=backend
    )
    for k in range(1, 41):
        give_grads([param])
        g = param.grad.double()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        x = x - lr * math.sqrt(1 - beta2**k) / (1 - beta1**k) * m / torch.sqrt(v + a)
        optimizer.step()
        torch.testing.assert_close(param.detach().double(), x, **TOLERANCE[dtype])


@pytest.mark.parametrize("default", (torch.bfloat16, torch.float64), ids=str)
def test_steps_are_counted_in_torchs_dtype_whatever_the_default(default):
    """In bfloat16 a count would end at 256."""
    params = make_params(torch.float32, [(2,)])
    twins = twin(params)
    torch.set_default_dtype(default)
    try:
        ours, theirs = Adam(params), torch_adam(twins)
        steps(300, ours, theirs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours.state[params[0]]["step"] == 300
    assert_lockstep(ours, theirs, params, twins, **TOLERANCE[torch.float32])


def test_both_backends_agree_on_many_elements():
    """Long enough for several blocks, with a tail."""
    params = make_params(shapes=[(10_001,), (3, 777)])
    twins = twin(params)
    native, reference = (
        Adam(tensors, amsgrad=True, weight_decay=0.1, backend=backend)
        for tensors, backend in zip((params, twins), BACKENDS, strict=True)
    )
    for _ in range(5):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        native.step()
        reference.step()
        expected = sum(p.grad.double().square().sum().item() for p in params)
        assert native.grad_norm_sq == pytest.approx(expected, rel=1e-5)
        assert reference.grad_norm_sq == pytest.approx(expected, rel=1e-5)
    assert_lockstep(native, reference, params, twins, **TOLERANCE[torch.float32])


def test_grad_norm_sq_is_of_the_raw_gradient_over_all_groups():
    """Eq. 3's summand: before weight decay, of every parameter that had a gradient."""
    params = make_params(shapes=[(3,), (4,), (5,)])
    optimizer = Adam(
        [{"params": params[:1], "maximize": True}, {"params": params[1:]}], weight_decay=10.0
    )
    assert optimizer.grad_norm_sq == 0.0
    give_grads(params)
    params[1].grad = None
    optimizer.step()
    expected = sum(p.grad.double().square().sum().item() for p in (params[0], params[2]))
    assert optimizer.grad_norm_sq == pytest.approx(expected, rel=1e-6)


def test_real_training_follows_torch():
    """Gradients that depend on the parameters: 100 steps of a small network in float64."""
    x = torch.randn(32, 3, dtype=torch.float64)
    networks = [
        torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        for _ in range(2)
    ]
    networks[1].load_state_dict(networks[0].state_dict())
    losses = []
    for network, kind in zip(networks, (Adam, torch.optim.Adam), strict=True):
        optimizer = kind(network.parameters(), lr=0.02)

        def closure(network=network, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (network(x) - x.sin().sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(100)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < 0.1 * losses[0][0]
