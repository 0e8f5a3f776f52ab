"""Fuse against Algorithm 3 written out, and at its two ends against Adam and LBFGS."""

import pytest
import torch
from adam_cases import BACKENDS, frozen, give_grads, make_params, steps, twin
from fuse_cases import DTYPES, SHAPES, closure_of, loss_of
from problems import Objective, rosenbrock

from fuse_ext import LBFGS, Adam, CosineTheta, Fuse, LinearTheta, Report
from fuse_ext.kernels import scalars as ring


def flat_of(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


class Algorithm3:
    """The blend on one float64 vector, with the two-loop recursion on lists of vectors."""

    def __init__(self, x, lr, betas, eps, lbfgs_lr, m, weight_decay=0.0, maximize=False):
        self.x, self.lr, self.betas, self.eps = x, lr, betas, eps
        self.lbfgs_lr, self.m, self.decay = lbfgs_lr, m, weight_decay
        self.sign = -1.0 if maximize else 1.0
        self.first, self.second = torch.zeros_like(x), torch.zeros_like(x)
        self.k, self.pairs = 0, []

    def gradient(self, grad):
        return self.sign * grad(self.x) + self.decay * self.x

    def step(self, theta, grad):
        g = self.gradient(grad)
        self.k += 1
        beta1, beta2 = self.betas
        self.first = beta1 * self.first + (1 - beta1) * g
        self.second = beta2 * self.second + (1 - beta2) * g * g
        m_hat, v_hat = self.first / (1 - beta1**self.k), self.second / (1 - beta2**self.k)
        x_adam = self.x - self.lr * m_hat / (v_hat.sqrt() + self.eps)
        t = self.lbfgs_lr if self.pairs else self.lbfgs_lr * min(1.0, 1.0 / g.abs().sum().item())
        x_lbfgs = self.x + t * self.direction(g)
        x_next = theta * x_adam + (1 - theta) * x_lbfgs
        s, self.x = x_next - self.x, x_next
        y = self.gradient(grad) - g
        if s @ y > 1e-4 * s.norm() * y.norm():
            self.pairs = [*self.pairs, (s, y)][-self.m :]

    def direction(self, g):
        p, alphas = -g, []
        for s, y in reversed(self.pairs):
            alphas.append((s @ p) / (s @ y))
            p = p - alphas[-1] * y
        if self.pairs:
            s, y = self.pairs[-1]
            p = (s @ y) / (y @ y) * p
        for (s, y), alpha in zip(self.pairs, reversed(alphas), strict=True):
            p = p + (alpha - (y @ p) / (s @ y)) * s
        return p


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ({}, {"weight_decay": 0.3}, {"maximize": True}), ids=str)
@pytest.mark.parametrize("theta", (1.0, 0.7, 0.25, 0.0, LinearTheta(10), CosineTheta(6)), ids=str)
def test_algorithm_3_written_out(theta, options, backend):
    params = make_params(torch.float64, SHAPES)
    optimizer = Fuse(
        params, lr=0.05, theta=theta, lbfgs_lr=0.8, history_size=4, backend=backend, **options
    )
    oracle = Algorithm3(flat_of(params), 0.05, (0.9, 0.999), 1e-8, 0.8, 4, **options)
    sign = -1.0 if options.get("maximize") else 1.0

    def grad(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(sign * loss_of([x]), x)[0]

    def closure():
        optimizer.zero_grad()
        loss = sign * loss_of(params)
        loss.backward()
        return loss

    for step in range(15):
        share = theta(step) if callable(theta) else theta
        assert optimizer.theta == share
        oracle.step(share, grad)
        loss = optimizer.step(closure)
        torch.testing.assert_close(flat_of(params), oracle.x, rtol=1e-7, atol=1e-9)
    assert optimizer.report().pairs_held == len(oracle.pairs)
    assert sign * loss.item() < sign * sign * loss_of(make_params(torch.float64, SHAPES)).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ({}, {"amsgrad": True}, {"weight_decay": 0.1}), ids=str)
def test_theta_1_is_adam_bit_for_bit(options, dtype, backend):
    params = make_params(dtype, SHAPES)
    twins = twin(params)
    fuse = Fuse(params, lr=0.1, theta=1.0, backend=backend, **options)
    adam = Adam(twins, lr=0.1, backend=backend, **options)
    for _ in range(20):
        fuse.step(closure_of(fuse, params))
        adam.step(closure_of(adam, twins))
        assert frozen(params) == frozen(twins)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("line_search", (None, "armijo", "strong_wolfe", "approximate_wolfe"))
def test_theta_0_is_lbfgs_up_to_rounding(line_search, backend):
    """The pairs are rounded differently: here s is the difference of two points."""
    params = make_params(torch.float64, SHAPES)
    twins = twin(params)
    common = {"history_size": 5, "deterministic": True, "backend": backend}
    fuse = Fuse(params, theta=0.0, line_search=line_search, lbfgs_lr=0.9, **common)
    lbfgs = LBFGS(twins, lr=0.9, max_iter=1, line_search_fn=line_search, **common)
    for _ in range(8):
        fuse.step(closure_of(fuse, params))
        lbfgs.step(closure_of(lbfgs, twins))
        torch.testing.assert_close(params, twins, rtol=1e-7, atol=1e-9)


def newest_pair(optimizer, params):
    """s and y of the last pair accepted, as saved in the state."""
    entry = optimizer.state[params[0]]
    history, scalars = entry["history"], entry["scalars"]
    slots = history.shape[1]
    slot = (int(ring.read_header(scalars).open) + slots - 1) % slots
    scale = ring.array(scalars, "row_scale", slots)[slot].item()
    return scale * history[0, slot], history[1, slot]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("theta", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pair_is_the_step_really_taken(dtype, theta, backend):
    """s bit for bit the change of the (rounded) parameters, y that of the gradients."""
    params = make_params(dtype, SHAPES)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    optimizer = Fuse(params, lr=0.1, theta=theta, backend=backend)
    closure = closure_of(optimizer, params)
    for k in range(6):
        closure()
        x, g = flat_of(params).to(state), flat_of([p.grad for p in params]).to(state)
        optimizer.step(closure)
        s, y = newest_pair(optimizer, params)
        assert optimizer.report().pairs_accepted == k + 1
        assert torch.equal(s, flat_of(params).to(state) - x)
        assert torch.equal(y, flat_of([p.grad for p in params]).to(state) - g)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_never_mix_batches(backend):
    params = make_params(torch.float64, [(6,)])
    optimizer = Fuse(params, lr=0.1, theta=0.5, backend=backend)
    for curvature in (1.0, 7.0, 2.0, 30.0):
        closure = closure_of(optimizer, params, curvature=curvature)
        closure()
        before = params[0].grad.clone()
        optimizer.step(closure)
        assert torch.equal(newest_pair(optimizer, params)[1], params[0].grad - before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("set_to_none", (False, True))
def test_adam_steps_with_the_gradient_where_the_line_search_began(set_to_none, backend):
    params = make_params(torch.float64, SHAPES)
    optimizer = Fuse(params, theta=0.5, lbfgs_lr=40.0, line_search="strong_wolfe", backend=backend)

    def closure():
        optimizer.zero_grad(set_to_none)
        loss = loss_of(params)
        loss.backward()
        return loss

    closure()
    first = [p.grad.clone() for p in params]
    optimizer.step(closure)
    assert optimizer.report().evaluations > 3
    for p, grad in zip(params, first, strict=True):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * grad)


@pytest.mark.parametrize(
    ("options", "per_step"),
    [
        ({}, 2),
        ({"same_batch_pairs": False}, 1),
        ({"deterministic": True}, 1),
        ({"line_search": "armijo", "deterministic": True}, None),
        ({"line_search": "strong_wolfe"}, None),
    ],
    ids=str,
)
def test_evaluations(options, per_step):
    params = make_params(torch.float64, SHAPES)
    optimizer, calls = Fuse(params, lr=0.1, theta=0.5, **options), []
    returned = []
    for step in range(1, 8):
        before = len(calls)
        loss = optimizer.step(closure_of(optimizer, params, calls))
        returned.append((loss.item(), calls[before]))
        assert optimizer.report().evaluations == len(calls)
        if per_step is not None:
            assert len(calls) == step * per_step
    assert all(loss == first for loss, first in returned)  # the loss where the step began
    pairs = optimizer.report().pairs_accepted
    assert pairs == (7 if per_step == 2 or options == {"line_search": "strong_wolfe"} else 6)


def test_without_a_closure():
    params = make_params(torch.float64, SHAPES)
    optimizer = Fuse(params, lr=0.1, theta=0.5)
    closure = closure_of(optimizer, params)
    losses = []
    for _ in range(20):
        losses.append(closure().item())
        assert optimizer.step() is None
    assert losses[-1] < 0.5 * losses[0]
    report = optimizer.report()
    assert report.evaluations == 0
    assert report.pairs_accepted == 19
    with pytest.raises(ValueError, match=r"closure=None needs line_search=None, got .*'armijo'"):
        Fuse(params, line_search="armijo").step()


def test_theta_is_a_function_of_the_steps_taken():
    seen = []
    params = make_params(torch.float64, SHAPES)
    optimizer = Fuse(params, theta=lambda step: seen.append(step) or 1 / (1 + step))
    closure = closure_of(optimizer, params)
    for _ in range(4):
        optimizer.step(closure)
    assert seen == [0, 1, 2, 3]
    assert optimizer.theta == 1 / 5
    assert Fuse(params).theta == 1.0
    linear, cosine = LinearTheta(10, 0.9, 0.1), CosineTheta(10, 0.9, 0.1)
    for schedule in (linear, cosine):
        values = [schedule(step) for step in range(13)]
        assert values[0] == pytest.approx(0.9)
        assert values[5] == pytest.approx(0.5)
        assert values[10:] == pytest.approx([0.1] * 3)
        assert values == sorted(values, reverse=True)
    assert repr(linear) == "LinearTheta(steps=10, start=0.9, end=0.1)"


@pytest.mark.parametrize("line_search", (None, "strong_wolfe"))
def test_both_backends_agree(line_search):
    params = make_params(torch.float32, SHAPES)
    twins = twin(params)
    for tensors, backend in zip((params, twins), BACKENDS, strict=True):
        optimizer = Fuse(
            tensors, lr=0.05, theta=LinearTheta(8), line_search=line_search, backend=backend
        )
        for _ in range(10):
            optimizer.step(closure_of(optimizer, tensors))
    torch.testing.assert_close(params, twins, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_parameters_move_as_pairs_of_reals(backend):
    """Autograd hands out their gradients as conjugated views; an odd offset needs padding."""
    z, target = torch.randn(2, 5, dtype=torch.complex128)
    real = torch.randn(3, dtype=torch.float64).requires_grad_()
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)
    params = [real, z.clone().requires_grad_()]
    twins = [*twin([real]), torch.view_as_real(z).clone().requires_grad_()]
    for tensors in (params, twins):
        optimizer = Fuse(
            tensors, lr=0.1, theta=0.3, lbfgs_lr=9.0, line_search="strong_wolfe", backend=backend
        )

        def closure(tensors=tensors, optimizer=optimizer):
            optimizer.zero_grad()
            x, value = tensors
            value = value if value.is_complex() else torch.view_as_complex(value)
            loss = (weight * (value.conj() - target).abs().square()).sum() + x.cosh().sum()
            loss.backward()
            return loss

        for _ in range(8):
            optimizer.step(closure)
    torch.testing.assert_close(params[0], twins[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.view_as_real(params[1]), twins[1], rtol=1e-9, atol=1e-12)


def test_report():
    params = make_params(torch.float32, [(1000,), (24,)])
    optimizer = Fuse(params, lr=0.01, theta=0.5, history_size=3)
    assert optimizer.report() == Report(phase="fuse")
    closure = closure_of(optimizer, params)
    for _ in range(5):
        optimizer.step(closure)
    report = optimizer.report()
    assert (report.phase, report.adam_steps, report.lbfgs_iterations) == ("fuse", 5, 5)
    assert (report.pairs_held, report.pairs_accepted, report.pairs_skipped) == (3, 5, 0)
    assert (report.evaluations, report.non_finite, report.step_length) == (10, 0, 1.0)
    assert report.stop_reason == "max_iter"
    # Adam's two moments and 2 (m + 1) rows, padded by less than 256 elements each.
    assert 1024 * 4 * (2 + 8) <= report.state_bytes <= 1024 * 4 * (2 + 8) + 8 * 256 * 4 + 4096
    assert report.workspace_bytes == 1024 * 4
    assert "pairs_held            3" in str(report)
    searching = Fuse(params, theta=0.5, history_size=3, line_search="strong_wolfe")
    for _ in range(3):
        searching.step(closure_of(searching, params))
    assert searching.report().workspace_bytes == 3 * 1024 * 4


def test_a_group_added_on_the_way_keeps_adams_moments():
    params = make_params(torch.float64, SHAPES)
    optimizer = Fuse(params[:2], lr=0.1, theta=0.5)
    for _ in range(4):
        optimizer.step(closure_of(optimizer, params[:2]))
    moments = frozen(optimizer.state[params[0]]["exp_avg"])
    optimizer.add_param_group({"params": params[2:]})
    assert frozen(optimizer.state[params[0]]["exp_avg"]) == moments
    assert (optimizer.report().pairs_held, optimizer.report().pairs_accepted) == (0, 4)
    losses = [optimizer.step(closure_of(optimizer, params)).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert optimizer.state[params[0]]["step"] == 24
    assert optimizer.state[params[2]]["step"] == 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_rosenbrock(backend):
    objective = Objective(rosenbrock(10))
    optimizer = Fuse(
        [objective.x],
        lr=0.02,
        theta=LinearTheta(40),
        line_search="strong_wolfe",
        deterministic=True,
        backend=backend,
    )
    for _ in range(120):
        optimizer.step(objective.closure)
    assert objective.gap < 1e-12


def test_a_small_regression_ends_below_adam():
    x = torch.randn(64, 3)
    y = x.sin().sum(1, keepdim=True)
    network = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    twin_network = torch.nn.Sequential(
        torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    )
    twin_network.load_state_dict(network.state_dict())
    losses = []
    for model, make, count in (
        (network, lambda p: Fuse(p, lr=0.01, theta=LinearTheta(50)), 100),
        (twin_network, lambda p: Adam(p, lr=0.01), 200),
    ):
        optimizer = make(model.parameters())

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        for _ in range(count):
            loss = optimizer.step(closure)
        losses.append(loss.item())
    assert losses[0] < 0.5 * losses[1]


def test_gradients_at_hand_drive_both_parts():
    params = make_params(torch.float32, SHAPES)
    optimizer = Fuse(params, lr=0.1, theta=0.5)
    give_grads(params)
    steps(3, optimizer)
    assert optimizer.report().adam_steps == 3
