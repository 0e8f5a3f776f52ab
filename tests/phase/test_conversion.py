"""The state in a more exact dtype, in every way in which the optimizers are used."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from adam_cases import TOLERANCE, frozen, give_grads, make_params, torch_adam
from configurations import BF16, CONFIGURATIONS, F32, F64, each
from reported_cases import BRANCH, Net, Training, bits, changed, groups_without_lr, saved
from torch import Tensor

from fuse_ext import Adam, FusePV, Never
from fuse_ext.search.noise import NEW_FLOOR

# What is known of the loss as it was rounded, and where a gradient is kept depends on the dtype.
FORGOTTEN = {"pair_step", "settled", "arrival", "cuts", "failing", "grad_prev", "loss_noise"}
FORGOTTEN |= {*NEW_FLOOR, "watched_loss", "watched_grad"}
SOME = "adam lbfgs_strong_wolfe_promised pv_promised pv_found_pairs pv_diagonal pv_capturable"
SOME += " fuse_strong_wolfe"
NAMED = {config.id: config for config in CONFIGURATIONS}


def continue_in(training: Training, dtype: torch.dtype = F64) -> None:
    net = training.net
    training.optimizer.continue_in(dtype)
    net.inputs, net.targets = net.inputs.to(dtype), net.targets.to(dtype)


def twin(training: Training, state: dict[str, Any], dtype: torch.dtype = F64) -> Training:
    """A new optimizer of new parameters of this dtype, which takes a checkpoint over."""
    net = Net(F32)
    net.inputs, net.targets = training.net.inputs.to(dtype), training.net.targets.to(dtype)
    for p, value in zip(net.params, training.net.values, strict=True):
        p.data = value.to(dtype)
    # Moments of two bytes are for parameters of four.
    over = no_bf16_moments(training.config.options) if dtype == F64 else {}
    new = Training(training.config, net, step_number=training.step_number, **over)
    new.optimizer.load_state_dict(state)
    return new


def entries(training: Training) -> list[dict[str, Any]]:
    """A copy of each parameter's state."""
    return [copy.deepcopy(dict(training.optimizer.state.get(p, {}))) for p in training.net.params]


def assert_kept(
    before: list[dict[str, Any]], now: list[dict[str, Any]], forgotten: set[str]
) -> None:
    for old, new in zip(before, now, strict=True):
        assert old.keys() - forgotten <= new.keys()
        for name in old.keys() - forgotten:
            if isinstance(old[name], Tensor):
                wide = old[name].to(new[name].dtype)
                torch.testing.assert_close(wide, new[name], rtol=0, atol=0, msg=name)
            else:
                assert old[name] == new[name], name


@each(dtypes=(F32, BF16))
def test_nothing_but_the_rounding_is_forgotten(config, dtype):
    training = Training(config, Net(dtype))
    training.step(config.steps)
    values, state = training.net.values, saved(training.optimizer)  # which counts what is to count
    before = entries(training)
    params, keys = list(training.net.params), list(training.optimizer.state)
    continue_in(training)
    assert all(a is b for a, b in zip(params, training.net.params, strict=True))
    assert all(a is b for a, b in zip(keys, training.optimizer.state, strict=True))
    assert_kept([{"p": v} for v in values], [{"p": v} for v in training.net.values], set())
    now = entries(training)
    # The place of a pair in waiting is a number of the device's.
    assert_kept(before, now, FORGOTTEN | {"control"})
    kept = training.optimizer.param_groups[0].get("history_dtype")
    for entry in now:
        for name, value in entry.items():
            if isinstance(value, Tensor) and name not in ("step", "history_scale", "record"):
                assert value.dtype == (kept if name == "history" and kept else F64), name
        assert not entry.get("pair_step") and not entry.get("settled") and not entry.get("arrival")
        if "control" in entry:
            assert entry["control"].count_nonzero() > 0
    precision = {name: now[0][name] for name in NEW_FLOOR if name in now[0]}
    assert precision in ({}, NEW_FLOOR)
    if "loss_noise" in now[0]:
        assert now[0]["loss_noise"] == 8 * torch.finfo(F64).eps
        assert now[0]["first_loss"] == before[0]["first_loss"]
    assert frozen(saved(training.optimizer)["param_groups"]) == frozen(
        [{**group, **no_bf16_moments(group)} for group in state["param_groups"]]
    )
    counted = training.calls
    training.step(3)
    assert training.calls > counted and training.net.params[0].dtype == F64
    if config.phase != "adam" and config.driver != "pair_closure":
        counts = before[0]["func_evals"], training.optimizer.state[params[0]]["func_evals"]
        assert counts[1] - counts[0] == training.calls - counted


def no_bf16_moments(group: dict[str, Any]) -> dict[str, Any]:
    return {"moment_dtype": None} if "moment_dtype" in group else {}


@each(dtypes=(F32, BF16))
def test_checkpoints_before_and_after(config, dtype):
    """Saved before, loaded in float64 and told so, or saved after: all go on alike, bit for bit."""
    training = Training(config, Net(dtype))
    training.step(config.steps)
    state = saved(training.optimizer)
    if training.optimizer.param_groups[0].get("moment_dtype") is None:
        before = twin(training, state)
        before.optimizer.continue_in(F64)
    else:
        before = twin(training, state, dtype)
        continue_in(before)
    continue_in(training)
    after = twin(training, saved(training.optimizer))
    after.step(7)
    for run in (before, training):
        run.step(7)
        assert changed(bits(run.net.params), after.net.params) == []
    later = twin(training, saved(training.optimizer))
    for run in (training, later):
        run.step(7)
    assert changed(bits(training.net.params), later.net.params) == []


@each(lambda config: config.descends, dtypes=(F32,))
def test_it_goes_on_downhill(config, dtype):
    training = Training(config, Net(dtype))
    training.step(config.steps)
    before = float(training.net.loss().detach())
    continue_in(training)
    losses = training.step(12)
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert all(b <= a * (1 + 1e-14) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize("layer", (0, BRANCH))
@each(lambda config: config.id in SOME.split(), dtypes=(F32,))
def test_what_is_frozen_is_converted_and_stays(config, dtype, layer):
    """Frozen by requires_grad, from the start or in mid-run; or by lr = 0 in its own group."""
    for how in ("from the start", "in mid-run", "lr = 0"):
        net = Net(dtype)
        groups = groups_without_lr(net, layer, config) if how == "lr = 0" else None
        training = Training(config, net, groups)
        if how == "from the start":
            net.freeze(layer)
        training.step(config.steps)
        if how == "in mid-run":
            net.freeze(layer)
        kept = bits([p.detach().double() for p in net.layers[layer]])
        rest = bits([p.detach().double() for p in net.others(layer)])
        continue_in(training)
        training.step(4)
        assert changed(kept, net.layers[layer]) == [], how
        assert len(changed(rest, net.others(layer))) == len(rest), how
        net.freeze(layer, False)
        training.step(2)
        moved = changed(kept, net.layers[layer])
        assert (moved == []) if how == "lr = 0" else moved, how


# --- oracles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F32, torch.complex64))
@pytest.mark.parametrize("kind", (Adam, lambda p, **options: FusePV(p, switch=Never(), **options)))
def test_adam_goes_on_as_torchs_does(kind, dtype):
    """torch casts the state of a checkpoint to the parameters' dtype, if they are real."""
    twins = make_params(dtype)
    theirs = torch_adam(twins, lr=0.02, amsgrad=True)
    for _ in range(5):
        give_grads(twins)
        theirs.step()
    params = [p.detach().clone().requires_grad_() for p in twins]
    ours = kind(params, lr=0.02, amsgrad=True)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    ours.continue_in(F64)
    wide = torch.complex128 if dtype.is_complex else F64
    state = copy.deepcopy(theirs.state_dict())
    twins = [p.detach().to(wide).requires_grad_() for p in twins]
    theirs = torch_adam(twins, lr=0.02, amsgrad=True)
    theirs.load_state_dict(state)
    for entry in theirs.state.values():
        entry.update({key: m.to(wide) for key, m in entry.items() if key != "step"})
    for _ in range(10):
        give_grads(params, twins)
        ours.step()
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        assert p.dtype == wide
        torch.testing.assert_close(p, q, **TOLERANCE[F64])
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"):
            torch.testing.assert_close(
                ours.state[p][name], theirs.state[q][name], rtol=1e-12, atol=0
            )


def turned(values: Tensor) -> Tensor:
    """The same values, column after column."""
    return values.t().contiguous().t()


def spread(values: Tensor) -> Tensor:
    """The same values, column after column, with gaps: torch gives a copy of it other strides."""
    wide = torch.full((values.shape[1], 2 * values.shape[0]), math.nan, dtype=values.dtype)
    wide[:, ::2] = values.t()
    return wide[:, ::2].t()


def laid_out(name: str, lay: Any) -> Training:
    """A run whose weights lie in memory as they are laid."""
    net = Net(F32)
    for layer in net.layers:
        layer[0].data = lay(layer[0].data)
    training = Training(NAMED[name], net)
    training.step(training.config.steps)
    return training


@pytest.mark.parametrize("lay", (turned, spread))
@pytest.mark.parametrize("name", ("adam", "lbfgs_fixed", "pv_diagonal"))
def test_strides(name, lay):
    """Rows and moments follow the order of memory, which a conversion must not mix up."""
    run, plain = laid_out(name, lay), laid_out(name, Tensor.contiguous)
    for one in (run, plain):
        continue_in(one)
        one.step(10)
    for p, q in zip(run.net.params, plain.net.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    # What is saved knows the strides that there are now.
    again = twin(run, saved(run.optimizer))
    for one in (run, again):
        one.step(3)
    assert changed(bits(run.net.params), again.net.params) == []


@pytest.mark.parametrize("name", ("adam", "lbfgs_fixed", "pv_diagonal"))
def test_a_conversion_that_lays_elements_out_anew(name):
    run = laid_out(name, spread)
    for p in run.net.params:
        p.grad, p.data = None, p.data.double()
    before = frozen(entries(run))
    with pytest.raises(
        ValueError, match=r"params\[0\] is now .* strides \(1, 4\) .* was .*\(2, 8\)"
    ):
        run.optimizer.continue_in(F64)
    assert frozen(entries(run)) == before


# --- what goes on -------------------------------------------------------------------------------


def test_one_look_is_not_compared_with_another_dtypes():
    run = Training(NAMED["pv_found_one_function"], Net(F32))
    run.step(NAMED["pv_found_one_function"].options["switch"] + 1)
    assert run.optimizer.report().stop_reason == "watch"
    continue_in(run)
    run.step()
    assert run.optimizer.report().stop_reason == "watch"  # looks twice again
    run.step(3)
    assert run.optimizer.report().line_search != "none"


def test_from_bfloat16_by_way_of_float32():
    run = Training(NAMED["adam_bf16_moments"], Net(BF16))
    run.step(10)
    continue_in(run, F32)
    group = run.optimizer.param_groups[0]
    assert run.net.params[0].dtype == F32 and group["moment_dtype"] == BF16
    run.step(3)
    continue_in(run, F64)
    assert run.net.params[0].dtype == F64 and group["moment_dtype"] is None
    before = run.step(1)
    assert run.step(20)[-1] < before[0]


def test_pairs_of_float64_for_parameters_of_float32():
    """The previous gradient lies apart only as long as rows and parameters differ."""
    options = {"line_search_fn": "strong_wolfe", "history_dtype": F64, "max_iter": 1}
    net = Net(F32)
    run = Training(NAMED["lbfgs_strong_wolfe"], net, **options)
    run.step(10)
    assert run.optimizer.state[net.params[0]]["grad_prev"].dtype == F32
    continue_in(run)
    assert "grad_prev" not in run.optimizer.state[net.params[0]]
    before = run.step()
    assert run.step(10)[-1] < before[0]


def test_a_host_that_takes_over_from_the_device():
    """With capturable taken back in between, what the device has counted goes on."""
    run = Training(NAMED["lbfgs_capturable"], Net(F32))
    run.step(10)
    run.optimizer.param_groups[0]["capturable"] = False
    continue_in(run)
    assert run.optimizer.report().lbfgs_iterations == 10
    before = run.step()
    assert run.step(10)[-1] < before[0]
    assert run.optimizer.report().lbfgs_iterations == 21


@pytest.mark.parametrize("name", ("lbfgs_strong_wolfe_promised", "pv_promised", "pv_diagonal"))
def test_a_state_that_was_cleared(name):
    """The optimizer begins anew, in the new dtype."""
    run = Training(NAMED[name], Net(F32))
    run.step(16)
    run.optimizer.state.clear()
    continue_in(run)
    values = run.net.values
    fresh = Training(NAMED[name], Net(F32))
    for p, value in zip(fresh.net.params, values, strict=True):
        p.data = value
    fresh.net.inputs, fresh.net.targets = run.net.inputs, run.net.targets
    fresh.step_number = run.step_number
    for one in (run, fresh):
        one.step(8)
    assert changed(bits(run.net.params), fresh.net.params) == []


def test_what_rounding_made_fail_counts_no_more():
    run = Training(NAMED["lbfgs_strong_wolfe"], Net(F32))
    run.step(5)
    entry = run.optimizer.state[run.net.params[0]]
    entry.update(cuts=2, failing=2.5, step_cuts=2)
    continue_in(run)
    assert (entry["cuts"], entry["failing"], entry["step_cuts"]) == (0, 0, 2)


@pytest.mark.parametrize("name", ("lbfgs_capturable", "lbfgs_fixed"))
def test_no_pair_mixes_two_dtypes(name):
    """With one function promised a pair waits from step to step, on the device as on the host."""
    run = Training(NAMED[name], Net(F32), deterministic=True)
    counted = []
    for converts in (False, True, False):
        if converts:
            continue_in(run)
        run.step(1 if converts else 5)
        report = run.optimizer.report()
        counted.append(report.pairs_accepted + report.pairs_skipped)
    assert counted[1] == counted[0]  # the one that waited is given up, the next one waits
    assert counted[2] == counted[1] + 5


def test_what_the_device_alone_has_counted_goes_along():
    run = Training(NAMED["pv_capturable"], Net(F32))
    run.step(2)
    run.optimizer._phase._counted[0] += 3  # as a graph's replays do
    continue_in(run)
    assert run.optimizer.report().adam_steps == 5
