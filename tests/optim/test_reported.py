"""What users reported of frozen, unused and thawed parameters, and of FusePV's weight decay."""

import copy
import math

import pytest
import torch
from adam_cases import frozen as snapshot_of
from configurations import BF16, CONFIGURATIONS, F32, F64, SEARCHES, each
from reported_cases import BRANCH, LAYERS, Net, Training, bits, changed, groups_without_lr

from fuse_ext import LBFGS, AtOnce, FusePV, Never

COUPLED = {"weight_decay": 1e-2}
DECOUPLED = {**COUPLED, "decoupled_weight_decay": True}


def decay_of(config, decoupled):
    return DECOUPLED if decoupled and config.decouples else COUPLED


# --- (a), (g): without a gradient nothing moves ---------------------------------------------


@pytest.mark.parametrize(("layer", "decoupled"), ((0, False), (1, True)))
@each()
def test_what_never_has_a_gradient_keeps_its_bits(config, dtype, layer, decoupled):
    """Reported: a layer frozen from the start shrinks by weight decay, and -0.0 becomes 0.0.

    Right: as in torch, a parameter whose .grad is None is not touched, wherever it lies.
    """
    net = Net(dtype)
    net.freeze(layer)
    training = Training(config, net, **decay_of(config, decoupled))
    kept, rest = bits(net.layers[layer]), bits(net.others(layer))
    for _ in range(config.steps):
        training.step()
        assert changed(kept, net.layers[layer]) == [], training.step_number
    assert changed(rest, net.others(layer)) != []


@pytest.mark.parametrize("decoupled", (False, True))
@each(dtypes=(F32, BF16))
@pytest.mark.filterwarnings("ignore:the closure has left no gradient")
def test_without_any_gradient_nothing_moves(config, dtype, decoupled):
    """Reported: a step in which no parameter has a gradient decays and moves all of them.

    Right: nothing moves, nothing is raised, and training goes on afterwards; at the first step
    and in mid-run.
    """
    net = Net(dtype)
    training = Training(config, net, **decay_of(config, decoupled))
    for steps in (0, config.steps, 1):
        training.step(steps)
        training.no_gradients = True
        # Promised or seen to be one function: it goes on from the gradient it remembers.
        found = ("pv_found_one_function", "pv_found_pairs", "pv_strong_wolfe", "pv_max_iter")
        if config.one_function or config.id in found:
            training.step()
        kept = bits(net.params)
        training.step(2)
        assert changed(kept, net.params) == [], training.step_number
        training.no_gradients = False
        training.step(3)
        assert changed(kept, net.params) != []


# --- (b): frozen in mid-run -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "how"), ((0, "frozen"), (1, "frozen and decays"), (BRANCH, "unused"))
)
@each()
def test_what_is_frozen_in_mid_run_keeps_its_bits(config, dtype, layer, how):
    """Reported: a layer frozen after some steps goes on moving along the history, and decays.

    Right: from the next step on it keeps its bits, whether it was frozen or is simply used no
    more, and where each step descends the rest goes on descending.
    """
    decay = COUPLED if "decays" in how else {}
    net = Net(dtype)
    training = Training(config, net, **decay)
    training.step(config.steps * 3 // 4)
    if how == "unused":
        net.uses_branch = False
    else:
        net.freeze(layer)
    kept, rest = bits(net.layers[layer]), bits(net.others(layer))
    penalty = decay.get("weight_decay", 0.0)
    objective, rounding = training.objective(penalty), 20 * torch.finfo(dtype).eps
    for i in range(config.steps // 2):
        training.step()
        assert changed(kept, net.layers[layer]) == [], i
        before, objective = objective, training.objective(penalty)
        if config.descends:
            assert objective <= before * (1 + rounding), i
    assert changed(rest, net.others(layer)) != []


# --- (c): no trace in the others -------------------------------------------------------------


@pytest.mark.parametrize("layer", range(LAYERS))
# Stochastic rounding of moments knows an element's place. Float64 shares all that decides here.
@each(lambda config: config.id != "adam_bf16_moments", dtypes=(F32, BF16))
def test_frozen_parameters_leave_no_trace(config, dtype, layer):
    """Reported: the others train differently when the optimizer holds a frozen layer as well.

    Its size, its weight decay and its place in the vector must not count: with layers of whole
    blocks the bits are those of an optimizer that was never given it. The branch is unused and
    huge instead.
    """
    ours, theirs = Net(dtype, aligned=True), Net(dtype, aligned=True)
    decay = COUPLED
    for net in (ours, theirs):
        net.freeze(layer)
        net.uses_branch = layer != BRANCH
    if layer == BRANCH:
        decay = {}
        with torch.no_grad():
            ours.layers[layer][0].mul_(1e4)
    Training(config, ours, **decay).step(config.steps)
    Training(config, theirs, theirs.others(layer), **decay).step(config.steps)
    if config.living:  # whose norms torch sums in an order that depends on the vector's length
        for p, q in zip(ours.others(layer), theirs.others(layer), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        return
    if config.dense:  # whose products are summed in an order that depends on it, too
        for p, q in zip(ours.others(layer), theirs.others(layer), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
        return
    assert changed(bits(theirs.others(layer)), ours.others(layer)) == []


# --- (d): thawed -----------------------------------------------------------------------------


class LeastSquares:
    """Two blocks of unknowns with unlike scales; float64, by default with a fixed step."""

    def __init__(self, make):
        generator = torch.Generator().manual_seed(3)
        a = torch.randn(60, 12, generator=generator, dtype=F64)
        a[:, 6:] *= torch.linspace(1.0, 3.0, 6, dtype=F64)
        self.a = a
        noise = torch.randn(60, generator=generator, dtype=F64)
        self.b = a @ torch.linspace(-1, 1, 12, dtype=F64) + 0.3 * noise
        self.blocks = [torch.zeros(6, dtype=F64, requires_grad=True) for _ in range(2)]
        self.optimizer = make(self.blocks)
        self.calls = 0

    def closure(self):
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def loss(self):
        return (self.a @ torch.cat(self.blocks) - self.b).square().mean()

    def step(self, count):
        """The losses after each step."""
        losses = []
        for _ in range(count):
            self.optimizer.step(self.closure)
            losses.append(self.loss().item())
        return losses

    def freeze(self, block, frozen=True):
        self.blocks[block].requires_grad_(not frozen)
        if frozen:
            self.blocks[block].grad = None

    def least(self, free=(0, 1)):
        """The least loss over some blocks, with the others where they are."""
        columns = [i for block in free for i in range(6 * block, 6 * block + 6)]
        x = torch.cat(self.blocks).detach()
        rest = self.b - self.a @ x + self.a[:, columns] @ x[columns]
        solution = torch.linalg.lstsq(self.a[:, columns], rest[:, None]).solution[:, 0]
        return float((self.a[:, columns] @ solution - rest).square().mean())


NEVER_STOP = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "max_iter": 1}
THAWED = {
    "lbfgs_fixed": lambda p: LBFGS(p, lr=1.0, history_size=10, **NEVER_STOP),
    "lbfgs_fixed_short": lambda p: LBFGS(p, lr=0.5, history_size=10, **NEVER_STOP),
    "lbfgs_capturable": lambda p: LBFGS(p, lr=1.0, history_size=10, capturable=True, **NEVER_STOP),
    "pv_same_batch": lambda p: FusePV(p, switch=AtOnce(), line_search=None, pairs="same_batch"),
    "pv_promised": lambda p: FusePV(p, switch=AtOnce(), deterministic=True),
    "lbfgs_strong_wolfe": lambda p: LBFGS(p, line_search_fn="strong_wolfe", **NEVER_STOP),
    "lbfgs_promised": lambda p: LBFGS(
        p, line_search_fn="strong_wolfe", deterministic=True, **NEVER_STOP
    ),
}


# From these thaws a new optimizer stays within the bounds, with a fixed step as well.
@pytest.mark.parametrize(("before", "block"), ((0, 0), (0, 1), (6, 0)))
@pytest.mark.parametrize("frozen_for", (1, 3, 8, 30))
@pytest.mark.parametrize("kind", THAWED)
def test_thawing_does_not_blow_up(kind, frozen_for, before, block):
    """Reported: after a thaw a fixed step went from 0.13 to 2.5: no curvature is known there.

    Right: the layer moves again within two steps, the loss stays below 1.5 times what it was and
    goes on to fall.
    """
    problem = LeastSquares(THAWED[kind])
    problem.step(before)
    problem.freeze(block)
    at_thaw, least = problem.step(frozen_for)[-1], problem.least()
    problem.freeze(block, False)
    kept = bits(problem.blocks[block])
    losses = problem.step(2)
    assert changed(kept, problem.blocks[block]) == [0] or at_thaw <= least * (1 + 1e-9)
    losses += problem.step(18)
    assert max(losses) <= 1.5 * at_thaw
    assert losses[-1] - least <= max(0.1 * (at_thaw - least), 1e-12)


@pytest.mark.parametrize("kind", ("pv_promised", "lbfgs_promised"))
def test_what_thaws_after_convergence_is_looked_at(kind):
    """Reported: deterministic=True, converged with a layer frozen, never saw that it was thawed.

    Right: the layer moves within two steps, and the minimum over all is reached.
    """
    problem = LeastSquares(THAWED[kind])
    problem.freeze(0)
    problem.step(150)
    assert problem.optimizer.report().converged
    assert math.isclose(problem.loss().item(), problem.least((1,)), rel_tol=1e-12)
    problem.freeze(0, False)
    problem.step(2)
    assert problem.blocks[0].detach().abs().max() > 0.0
    problem.step(60)
    assert math.isclose(problem.loss().item(), problem.least(), rel_tol=1e-12)


@each(lambda config: config.phase == "lbfgs")
def test_a_network_thaws(config, dtype):
    """Reported: as above, in every kind of L-BFGS; the loss after the thaw must go on falling."""
    net = Net(dtype)
    training = Training(config, net)
    training.step(10)
    net.freeze(1)
    training.step(6)
    net.freeze(1, False)
    kept, at_thaw = bits(net.layers[1]), training.objective()
    training.step(2)
    assert changed(kept, net.layers[1]) != []
    losses = []
    for _ in range(18):
        training.step()
        losses.append(training.objective())
    assert max(losses) <= 1.5 * at_thaw
    assert losses[-1] < at_thaw


# --- (e), (f): Adam's moments; a branch in every second batch --------------------------------


@each(lambda config: config.phase == "adam")
def test_moments_wait_while_frozen(config, dtype):
    """Reported: frozen for some steps, a layer had lost its moments or its count of steps.

    Right: moments and step count are then as before, to the bit, and go on from there.
    """
    net = Net(dtype)
    training = Training(config, net)
    training.step(4)
    state = training.optimizer.state
    names = [name for name in state[net.layers[1][0]] if name != "fuse_pv"]
    before = [snapshot_of({name: state[p][name] for name in names}) for p in net.layers[1]]
    net.freeze(1)
    training.step(5)
    for p, entry in zip(net.layers[1], before, strict=True):
        assert snapshot_of({name: state[p][name] for name in names}) == entry
    net.freeze(1, False)
    training.step()
    assert float(state[net.layers[1][0]]["step"]) == 5.0


@each(
    lambda config: config.phase == "lbfgs" and not config.one_function and not config.capturable,
    dtypes=(F32, BF16),
)
def test_a_branch_in_every_second_batch_trains(config, dtype):
    """Reported: where every second batch leaves a branch out, training became unstable.

    Right: the branch rests, to the bit, in the batches without it, and the loss with it falls.
    """
    net = Net(dtype)
    training = Training(config, net)
    first = training.objective()
    for i in range(60):
        net.uses_branch = i // (2 if config.driver == "batch_id" else 1) % 2 == 0
        kept = bits(net.layers[BRANCH])
        training.step()
        if not net.uses_branch:
            assert changed(kept, net.layers[BRANCH]) == [], i
        net.uses_branch = True
        assert training.objective() < 2.0 * first, i
    assert training.objective() < 0.85 * first


# --- (h): lr = 0 -----------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "decoupled"), ((0, False), (1, True)))
@each(dtypes=(F32, BF16))
def test_a_group_without_lr_is_frozen(config, dtype, layer, decoupled):
    """Reported: a group with lr=0 decays, or is moved along the history.

    Right: it stays where it is, as torch's Adam with lr=0.
    """
    net = Net(dtype)
    groups = groups_without_lr(net, layer, config)
    training = Training(config, net, groups, **decay_of(config, decoupled))
    before = [p.detach().clone() for p in net.layers[layer]]
    for i in range(config.steps):
        training.step()
        for p, q in zip(net.layers[layer], before, strict=True):
            assert torch.equal(p, q), i


@each(lambda c: c.kind is LBFGS or c.options.get("switch") == 0, dtypes=(F32,))
def test_a_group_without_lr_keeps_its_bits(config, dtype):
    """Right: even -0.0 stays what it is beside lr=0, as if frozen.

    (In Adam, as in torch's, x - 0 m can be 0.0.)
    """
    net = Net(dtype)
    training = Training(config, net, groups_without_lr(net, 1, config))
    kept = bits(net.layers[1])
    for i in range(config.steps):
        training.step()
        assert changed(kept, net.layers[1]) == [], i


@each(dtypes=(F32,))
def test_a_group_without_lr_leaves_no_trace(config, dtype):
    """Right: beside a group with lr=0 the others have the bits that they have beside a frozen one.

    Nothing that is at rest may count: neither its gradient nor its weight decay nor its size.
    """
    held, frozen = Net(dtype, aligned=True), Net(dtype, aligned=True)
    frozen.freeze(1)
    groups = [{"params": layer} for layer in frozen.layers]
    Training(config, held, groups_without_lr(held, 1, config), **COUPLED).step(config.steps)
    Training(config, frozen, groups, **COUPLED).step(config.steps)
    assert changed(bits(frozen.others(1)), held.others(1)) == []


# --- (i): the reported example ---------------------------------------------------------------


def blobs():
    """Ten classes of 64 features, as in images of digits: centres in [0, 1] and noise."""
    generator = torch.Generator().manual_seed(11)
    centres = torch.rand(10, 64, generator=generator)
    labels = torch.randint(0, 10, (640,), generator=generator)
    noise = torch.randn(640, 64, generator=generator)
    return centres[labels] + 0.5 * noise, labels


def test_a_frozen_first_layer_of_a_classifier():
    """Reported: FusePV(weight_decay=1e-2) on a net with a frozen first layer drove it towards 0.

    Right: the layer keeps its bits, and the accuracy is Adam's.
    """
    x, labels = blobs()
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    start[0].requires_grad_(False)
    accuracy = {}
    for kind in (FusePV, torch.optim.Adam):
        model = copy.deepcopy(start)
        optimizer = kind(model.parameters(), lr=1e-3, weight_decay=1e-2)
        for step in range(200):
            rows = slice(step % 10 * 64, step % 10 * 64 + 64)

            def closure(model=model, optimizer=optimizer, rows=rows):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x[rows]), labels[rows])
                loss.backward()
                return loss

            optimizer.step(closure)
        accuracy[kind] = float((model(x).argmax(1) == labels).float().mean())
        assert changed(bits(start[0].parameters()), model[0].parameters()) == []
    assert accuracy[FusePV] > accuracy[torch.optim.Adam] - 0.02


# --- weight decay of FusePV ------------------------------------------------------------------

DECAY = 0.3
MODES = {
    **{name: {"switch": 0, "line_search": name} for name in SEARCHES},
    "promised": {"switch": 0, "deterministic": True},
    "found": {"switch": 5},
    "fixed": {"switch": 0, "line_search": None, "pairs": "same_batch", "lbfgs_lr": 0.5},
    "max_iter": {"switch": 0, "max_iter": 5},
}


@pytest.mark.parametrize("decoupled", (False, True), ids=("coupled", "decoupled"))
@pytest.mark.parametrize("mode", MODES)
def test_weight_decay_is_a_penalty_with_a_line_search_or_fixed_step(mode, decoupled):
    """Reported: unclear what is minimised. Right: f + wd/2 |x|^2, decoupled or not."""
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(30, 5, generator=generator, dtype=F64)
    b = torch.randn(30, generator=generator, dtype=F64)
    x = torch.ones(5, dtype=F64, requires_grad=True)
    options = {"weight_decay": DECAY, "decoupled_weight_decay": decoupled, **MODES[mode]}
    optimizer = FusePV([x], lr=0.01, **options)

    def closure():
        optimizer.zero_grad()
        loss = (a @ x - b).square().sum() / 2
        loss.backward()
        return loss

    for _ in range(100):
        optimizer.step(closure)
    minimum = torch.linalg.solve(a.T @ a + DECAY * torch.eye(5, dtype=F64), a.T @ b)
    torch.testing.assert_close(x.detach(), minimum, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["pv_diagonal", "pv_kronecker"])
def test_coupled_weight_decay_on_minibatches_is_a_penalty(name):
    """Right: without decoupled_weight_decay the run is that on the loss with wd/2 |x|^2."""
    config = next(c for c in CONFIGURATIONS if c.id == name)
    ours, theirs = Training(config, Net(F64), weight_decay=DECAY), Training(config, Net(F64))
    loss = theirs.net.loss
    theirs.net.loss = lambda rows: (
        loss(rows) + DECAY / 2 * sum(p.square().sum() for p in theirs.net.params)
    )
    for training in (ours, theirs):
        training.step(40)
    for p, q in zip(ours.net.params, theirs.net.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_weight_decay_in_the_adam_phase_is_adams():
    """Right: before the switch decay is torch's, coupled (Adam) and decoupled (AdamW)."""
    for decoupled, kind in ((False, torch.optim.Adam), (True, torch.optim.AdamW)):
        ours, theirs = Net(F64), Net(F64)
        config = next(c for c in CONFIGURATIONS if c.id == "pv_adam")
        options = {"weight_decay": DECAY, "decoupled_weight_decay": decoupled, "switch": Never}
        Training(config, ours, **options).step(10)
        optimizer = kind(theirs.params, lr=0.01, weight_decay=DECAY)
        for _ in range(10):
            optimizer.zero_grad()
            theirs.loss().backward()
            optimizer.step()
        for p, q in zip(ours.params, theirs.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
