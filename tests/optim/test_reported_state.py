"""What users reported of state: cleared, resumed bit for bit; and of budgets that were not kept."""

import math
from collections import defaultdict

import pytest
import torch
from configurations import BF16, F32, F64, NEVER_STOP, each
from reported_cases import Net, Training, bits, changed, saved

from fuse_ext import LBFGS, AtOnce, FusePV

# --- 3: the state is cleared -------------------------------------------------------------------


@pytest.mark.parametrize(("how", "after"), (("clear", 16), ("new dict", 3)))
@each(dtypes=(F32, BF16))
def test_a_cleared_state_is_a_new_start(config, dtype, how, after):
    """Reported: after opt.state.clear() or opt.state = defaultdict(dict) errors, or a state half
    old.

    Right: it goes on as a new optimizer of the same options does, to the bit and phase by phase,
    and its state_dict loads.
    """
    net = Net(dtype)
    training = Training(config, net)
    training.step(after)
    if how == "clear":
        training.optimizer.state.clear()
    else:
        training.optimizer.state = defaultdict(dict)
    nets = [Net(dtype) for _ in range(3)]
    for other in nets:
        other.set(net.values)
    new, loaded, later = (Training(config, other, step_number=after) for other in nets)
    loaded.optimizer.load_state_dict(saved(training.optimizer))
    for i in range(12):
        for other in (training, new, loaded):
            other.step()
        assert changed(bits(nets[0].params), net.params) == [], i
        assert changed(bits(nets[0].params), nets[1].params) == [], i
        assert training.phase == new.phase == loaded.phase, i
        if i == 0:
            later.optimizer.load_state_dict(saved(training.optimizer))
            later.net.set(net.values)
            later.step_number = training.step_number
        else:
            later.step()
            assert changed(bits(nets[0].params), nets[2].params) == [], i


# --- 7: resumed, bit for bit -------------------------------------------------------------------


def assert_resumes(make, start, at, steps, run):
    """Runs once through with checkpoints, then goes on from each of them.

    Args:
        make: A training on a new net, given its step number.
        start: The training to watch.
        at: After which steps it is saved.
        steps: How many there are.
        run: What a step calls.
    """
    path, files, values = [], {}, {}
    for step in range(steps):
        if step in at:
            files[step], values[step] = saved(start.optimizer), start.net.values
        run(start)
        path.append(bits(start.net.params))
    for step in at:
        resumed = make(step)
        resumed.net.set(values[step])
        resumed.optimizer.load_state_dict(files[step])
        for i in range(step, min(steps, step + 12)):
            run(resumed)
            assert changed(path[i], resumed.net.params) == [], f"saved at {step}, step {i}"


@each()
def test_resuming_is_bit_for_bit(config, dtype):
    """Reported: a run resumed from a checkpoint differed from the one that was not interrupted.

    Right: the same bits at every later step, without the gradients that a checkpoint leaves out.
    """
    at = (3, 6, 7, 20) if config.living else (2, 6, 18)

    def make(step):
        return Training(config, Net(dtype), step_number=step)

    assert_resumes(make, make(0), at, 32 if config.living else 24, Training.step)


class Convex:
    """Least squares, as a net; it converges within 30 steps."""

    def __init__(self, make, dtype):
        generator = torch.Generator().manual_seed(12)
        self.a = torch.randn(30, 6, generator=generator, dtype=F64).to(dtype)
        self.b = torch.randn(30, generator=generator, dtype=F64).to(dtype)
        self.params = [torch.zeros(4, dtype=dtype), torch.zeros(2, dtype=dtype)]
        for p in self.params:
            p.requires_grad_()
        self.net, self.optimizer, self.calls = self, make(self.params), 0

    def closure(self):
        self.calls += 1
        self.optimizer.zero_grad()
        loss = (self.a @ torch.cat(self.params) - self.b).square().mean()
        loss.backward()
        return loss

    def step(self):
        self.optimizer.step(self.closure)

    @property
    def values(self):
        return [p.detach().clone() for p in self.params]

    def set(self, values):
        with torch.no_grad():
            for p, value in zip(self.params, values, strict=True):
                p.copy_(value)


RESUMED = {
    "lbfgs": lambda p: LBFGS(p, line_search_fn="strong_wolfe", deterministic=True),
    "lbfgs_never_stop": lambda p: LBFGS(
        p, line_search_fn="strong_wolfe", deterministic=True, tolerance_grad=0, tolerance_change=0
    ),
    "lbfgs_max_eval": lambda p: LBFGS(
        p, line_search_fn="strong_wolfe", deterministic=True, max_iter=3, max_eval=3
    ),
    "lbfgs_armijo": lambda p: LBFGS(
        p, line_search_fn="armijo", deterministic=True, **NEVER_STOP, max_iter=1
    ),
    "pv": lambda p: FusePV(p, switch=AtOnce(), deterministic=True),
    "pv_max_eval": lambda p: FusePV(p, switch=AtOnce(), deterministic=True, max_iter=5, max_eval=6),
    "pv_max_eval_3": lambda p: FusePV(
        p, switch=AtOnce(), deterministic=True, max_iter=5, max_eval=3
    ),
}


@pytest.mark.parametrize("dtype", (F32, F64))
@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_where_it_converges_is_bit_for_bit(kind, dtype):
    """Reported: with a small max_eval, or after convergence, a resumed run took other steps.

    What an evaluation remembered spares must not count in the budget, nor decide whether the run
    is at its end.
    """
    assert_resumes(
        lambda _: Convex(RESUMED[kind], dtype),
        Convex(RESUMED[kind], dtype),
        range(1, 26, 2 if dtype == F32 else 3),
        30,
        Convex.step,
    )


# --- 9: max_eval -------------------------------------------------------------------------------


class Valley:
    """Rosenbrock's function; with noise of 1e-3 at each call, or NaN beyond a wall."""

    def __init__(self, what, config, dtype, **over):
        self.x = torch.tensor([-1.2, 1.0], dtype=dtype, requires_grad=True)
        self.noise = torch.Generator().manual_seed(13)
        self.what, self.calls = what, 0
        self.optimizer = config.make([self.x], **over)

    def value(self):
        a, b = self.x
        return 100 * (b - a * a) ** 2 + (1 - a) ** 2

    def closure(self):
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.value()
        if self.what == "noise":
            loss = loss + 1e-3 * torch.randn((), generator=self.noise).item()
        elif self.what == "nan":
            loss = loss + 0.0 * (1.25 - self.x.square().sum().sqrt() / 1.5).log()
        loss.backward()
        return loss


def budgeted(config):
    if config.phase != "lbfgs" or config.living or config.capturable:
        return False
    return config.uses_line_search or config.options.get("pairs") == "same_batch"


def plain(config):
    return budgeted(config) and config.driver == "closure"


@pytest.mark.filterwarnings("ignore:FusePV met a loss", "ignore:deterministic=True, but")
@pytest.mark.parametrize("what", ("plain", "noise", "nan"))
@each(plain, dtypes=(F64,))
def test_max_eval_is_kept(config, dtype, what):
    """Reported: the first search of a step takes up to 25 evaluations, whatever max_eval says.

    Right: no step makes more calls than max_eval.
    """
    for max_eval in (2, 3, 6, 26):
        for max_iter in (1, 5):
            valley = Valley(what, config, dtype, max_eval=max_eval, max_iter=max_iter)
            for step in range(15):
                before = valley.calls
                valley.optimizer.step(valley.closure)
                assert valley.calls - before <= max_eval, (max_eval, max_iter, step)
            assert valley.x.detach().isfinite().all()


@pytest.mark.parametrize("max_iter", (1, 5))
@each(lambda config: plain(config) and config.uses_line_search)
def test_a_small_max_eval_still_makes_progress(config, dtype, max_iter):
    """Reported fear: cut short, a search might fail at every step in the same way.

    Right: with three calls a step the loss falls from 24.2 into the valley, and no step raises it.
    """
    valley = Valley("plain", config, dtype, max_eval=3, max_iter=max_iter)
    least = math.inf
    for step in range(60):
        valley.optimizer.step(valley.closure)
        now = valley.value().item()
        if step >= (config.adam_steps or 0):
            assert now <= least + 20 * torch.finfo(dtype).eps * (1 + least), step
            least = min(least, now)
    assert least < 6.0


SEARCHING = {
    "lbfgs": (LBFGS, {"line_search_fn": "strong_wolfe"}),
    "pv": (FusePV, {"line_search": "approximate_wolfe"}),
    "pv_promised": (FusePV, {"deterministic": True}),
}


@pytest.mark.parametrize("kind", SEARCHING)
def test_a_search_needs_two_evaluations(kind):
    """Right: max_eval=1 with a line search is refused; older checkpoints with it still load.

    It was LBFGS's default with max_iter=1, and one whole search was made all the same.
    """
    make, options = SEARCHING[kind]
    params = [torch.zeros(3, requires_grad=True)]
    with pytest.raises(ValueError, match="max_eval"):
        make(params, max_eval=1, **options)
    optimizer = make(params, max_eval=2, **options)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["max_eval"] = 1
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["max_eval"] == 26


def test_a_search_without_max_eval_works_for_one_iteration():
    """Right: the default, which torch would make 1 for max_iter=1, stays usable and loadable."""
    convex = Convex(lambda p: LBFGS(p, max_iter=1, line_search_fn="strong_wolfe"), F64)
    for _ in range(20):
        convex.step()
    solution = torch.linalg.lstsq(convex.a, convex.b[:, None]).solution[:, 0]
    torch.testing.assert_close(torch.cat(convex.params).detach(), solution, rtol=1e-3, atol=1e-4)
    other = Convex(lambda p: LBFGS(p, max_iter=1, line_search_fn="strong_wolfe"), F64)
    other.optimizer.load_state_dict(saved(convex.optimizer))
    other.step()
