"""Checkpoints: torch's and ours load into each other; every way of resuming is bit for bit."""

import copy
import pickle

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
from resume_cases import run, through_deepcopy, through_pickle, through_torch_save

from fuse_ext import LBFGS, Adam, Fuse, FusePV, GradNorm
from fuse_ext.kernels import scalars as ring

TORCH_KINDS = {
    "plain": lambda params, **options: torch_adam(params, **options),
    "foreach": lambda params, **options: torch_adam(params, **{**options, "foreach": True}),
    "fused": lambda params, **options: torch_adam(
        params, **{**options, "foreach": None, "fused": True}
    ),
    "AdamW": lambda params, **options: torch_adam(params, True, weight_decay=0.1, **options),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("amsgrad", (False, True), ids=("v", "amsgrad"))
@pytest.mark.parametrize("kind", TORCH_KINDS)
def test_torch_checkpoints_go_both_ways(kind, amsgrad, dtype):
    if kind == "fused" and dtype.is_complex:
        dtype = torch.float64  # torch's fused Adam takes no complex parameters
    make = TORCH_KINDS[kind]
    twins = make_params(dtype)
    theirs = make(twins, lr=0.02, amsgrad=amsgrad)
    steps(7, theirs)
    params = twin(twins)
    ours = Adam(params)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert_lockstep(ours, theirs, params, twins, rtol=0, atol=0)
    steps(10, ours, theirs)
    assert_lockstep(ours, theirs, params, twins, **TOLERANCE[dtype])
    again = twin(params)
    back = make(again)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert_lockstep(back, ours, again, params, rtol=0, atol=0)
    steps(10, ours, back)
    assert_lockstep(back, ours, again, params, **TOLERANCE[dtype])


def make_adam(params, backend):
    groups = [{"params": params[:2], "lr": 0.05}, {"params": params[2:], "weight_decay": 0.1}]
    return Adam(groups, amsgrad=True, backend=backend)


def make_fuse(params, backend):
    groups = [{"params": params[:2], "lr": 0.05}, {"params": params[2:], "lbfgs_lr": 0.5}]
    return Fuse(groups, theta=0.5, history_size=3, backend=backend)


def harmonic_theta(step: int) -> float:
    return 1 / (1 + step)


def make_waiting_fuse(params, backend):
    """Between its steps a pair waits for its second gradient, in a history of few bits."""
    return Fuse(
        params,
        theta=harmonic_theta,
        deterministic=True,
        history_size=3,
        history_dtype=torch.bfloat16,
        line_search="strong_wolfe",
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("through", (through_torch_save, through_pickle, through_deepcopy))
@pytest.mark.parametrize("make", (make_adam, make_fuse, make_waiting_fuse))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.complex64), ids=str)
def test_resuming_is_bit_for_bit(dtype, make, through, backend):
    params = make_params(dtype)
    optimizer = make(params, backend)
    run(optimizer, 6)
    copies, resumed = through(make, params, optimizer, backend)
    before = snapshot(resumed)
    run(optimizer, 5)
    assert snapshot(resumed) == before  # nothing is shared
    run(resumed, 5)
    assert frozen(copies) == frozen(params)
    assert frozen(resumed.state_dict()) == frozen(optimizer.state_dict())


LBFGS_KINDS = {
    "fixed step": lambda p, **options: LBFGS(p, lr=0.5, max_iter=1, **options),
    "int8": lambda p, **options: LBFGS(p, max_iter=2, history_dtype=torch.int8, **options),
    "capturable": lambda p, **options: LBFGS(p, lr=0.5, max_iter=1, capturable=True, **options),
    "Fuse": lambda p, **options: Fuse(p, theta=0.5, **options),
    "FusePV": lambda p, **options: FusePV(p, switch=2, line_search=None, lbfgs_lr=0.5, **options),
}


def without_sets(saved):
    """The checkpoint as it was before pairs had sets."""
    (entry,) = (entry for entry in saved["state"].values() if "scalars" in entry)
    slots = entry["history"].size(1)
    scalars = entry["scalars"][: ring.index("size_without_sets", slots)].clone()
    for name in ("usable", "set"):
        scalars[ring.index(name, slots)] = 0.0
    entry["scalars"] = scalars
    return entry


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LBFGS_KINDS)
@pytest.mark.parametrize("steps_before", (2, 8))  # of three pairs the ring holds some, and all
def test_checkpoints_from_before_pairs_had_sets(steps_before, kind, backend):
    def make(params):
        return LBFGS_KINDS[kind](params, history_size=3, backend=backend)

    params = make_params()
    optimizer = make(params)
    run(optimizer, steps_before)
    saved = copy.deepcopy(optimizer.state_dict())
    entry = without_sets(saved)
    before = frozen(saved)
    copies = twin(params)
    resumed = make(copies)
    resumed.load_state_dict(saved)
    for each in (optimizer, resumed):
        each.zero_grad()  # both evaluate the point at hand
    run(optimizer, 1)
    run(resumed, 1)
    assert frozen(saved) == before
    run(optimizer, 5)
    run(resumed, 5)
    assert frozen(copies) == frozen(params)
    saved = [copy.deepcopy(o.state_dict()) for o in (optimizer, resumed)]
    entries = [without_sets(s) for s in saved]
    assert frozen(saved[0]) == frozen(saved[1])
    assert entries[0]["scalars"].shape == entry["scalars"].shape


@pytest.mark.parametrize("kind", [Adam, Fuse, FusePV])
def test_real_and_complex_parameters_are_saved_together(kind, tmp_path):
    """Reported: torch.save refuses what is seen in two dtypes, as moments in one buffer are."""

    def make():
        generator = torch.Generator().manual_seed(0)
        real = torch.randn(5, generator=generator)
        imaginary = torch.randn(3, generator=generator, dtype=torch.complex64)
        return [real.requires_grad_(), imaginary.requires_grad_()]

    params, copies = make(), make()
    optimizer, resumed = kind(params, lr=0.1), kind(copies, lr=0.1)

    def run(optimizer, params, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            sum(p.abs().square().sum() for p in params).backward()
            optimizer.step()

    run(optimizer, params, 3)
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    with torch.no_grad():
        for param, value in zip(copies, saved["params"], strict=True):
            param.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    run(optimizer, params, 3)
    run(resumed, copies, 3)
    assert frozen(copies) == frozen(params)


def test_no_other_length_of_the_scalars_loads():
    params = make_params()
    optimizer = LBFGS_KINDS["fixed step"](params)
    run(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    entry = without_sets(saved)
    entry["scalars"] = entry["scalars"][:-1]
    with pytest.raises(ValueError, match="scalars has shape"):
        LBFGS_KINDS["fixed step"](twin(params)).load_state_dict(saved)


def test_low_precision_moments_stay_float32_through_a_checkpoint():
    """torch's own load_state_dict would cast them to the parameter's dtype."""
    params = make_params(torch.bfloat16)
    optimizer = Adam(params, lr=0.1)
    steps(3, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    assert frozen(optimizer.state_dict()) == frozen(saved)


def test_low_precision_checkpoints_of_torch_go_both_ways():
    twins = make_params(torch.bfloat16)
    theirs = torch_adam(twins, lr=0.1)
    steps(3, theirs)
    params = twin(twins)
    ours = Adam(params)
    ours.load_state_dict(theirs.state_dict())
    assert_lockstep(ours, theirs, params, twins, check_dtype=False, rtol=0, atol=0)
    assert ours.state[params[0]]["exp_avg"].dtype == torch.float32
    steps(1, ours)
    back = torch_adam(twins)
    back.load_state_dict(ours.state_dict())
    assert back.state[twins[0]]["exp_avg"].dtype == torch.bfloat16
    steps(1, back)


def test_a_loaded_dictionary_is_not_shared():
    params = make_params()
    first = Adam(params)
    steps(2, first)
    saved = first.state_dict()
    second = Adam(twin(params))
    second.load_state_dict(saved)
    before = frozen(saved)
    steps(1, second)
    assert frozen(saved) == before
    after = snapshot(second)
    saved["state"][0]["exp_avg"].zero_()
    saved["state"][0]["step"].zero_()
    saved["param_groups"][0]["lr"] = 7.0
    assert snapshot(second) == after


def test_a_checkpoint_fits_a_model_in_another_memory_format():
    """The saved moments have the parameter's shape; how it lies in memory is no part of them."""
    twins = [torch.randn(4, 3, 2, 2).requires_grad_(), torch.randn(3, 5).requires_grad_()]
    theirs, first = torch_adam(twins, lr=0.1), Adam(twin(twins), lr=0.1)
    steps(3, theirs, first)
    params = [
        twins[0].detach().to(memory_format=torch.channels_last).requires_grad_(),
        twins[1].detach().t().contiguous().t().requires_grad_(),
    ]
    ours = Adam(params)
    ours.load_state_dict(first.state_dict())
    steps(3, theirs, ours)
    assert_lockstep(ours, theirs, params, twins, check_stride=False, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("make", (make_adam, make_fuse))
def test_before_the_first_step(make):
    params = make_params()
    optimizer = make(params, "auto")
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"] == {}
    copies, resumed = through_torch_save(make, params, optimizer, "auto")
    run(resumed, 3)
    run(optimizer, 3)
    assert frozen(copies) == frozen(params)
    # Loading an empty state starts the moments anew, as in torch.
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["state"] == {}
    fresh = make(copies, "auto")
    run(optimizer, 3)
    run(fresh, 3)
    assert frozen(copies) == frozen(params)


def test_options_missing_in_older_checkpoints_get_the_defaults():
    twins = make_params()
    theirs = torch_adam(twins, lr=0.1)
    steps(4, theirs)
    old = copy.deepcopy(theirs.state_dict())
    for name in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
        del old["param_groups"][0][name]
    old["param_groups"][0].pop("decoupled_weight_decay", None)
    for entry in old["state"].values():
        entry["step"] = int(entry["step"])  # a plain number before torch 1.12
    params = twin(twins)
    ours = Adam(params, weight_decay=0.3, decoupled_weight_decay=True)
    ours.load_state_dict(old)
    assert ours.param_groups[0]["decoupled_weight_decay"]
    assert ours.param_groups[0]["weight_decay"] == 0.0
    steps(4, ours, theirs)
    assert_lockstep(ours, theirs, params, twins, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_added_on_the_way(backend):
    params = make_params(torch.float64, [(3,), (2, 2), (4,)])
    twins = twin(params)
    ours, theirs = Adam(params[:1], lr=0.1, backend=backend), torch_adam(twins[:1], lr=0.1)
    steps(3, ours, theirs)
    for optimizer, tensors in ((ours, params), (theirs, twins)):
        optimizer.add_param_group({"params": tensors[1:], "lr": 0.01, "amsgrad": True})
    steps(3, ours, theirs)
    assert_lockstep(ours, theirs, params, twins, **TOLERANCE[torch.float64])


def test_a_refused_group_leaves_everything():
    params = make_params()
    optimizer = Adam(params)
    steps(2, optimizer)
    before = snapshot(optimizer)
    for group, error, message in (
        ({"params": make_params(), "lr": -1.0}, ValueError, r"lr must be at least 0.*-1\.0"),
        ({"params": [torch.zeros(2, dtype=torch.int64)]}, TypeError, r"params\[6\].*int64"),
        ({"params": [torch.zeros(2, device="meta")]}, ValueError, r"params\[6\] is on meta"),
        ({"params": params[:1]}, ValueError, "appear in more than one parameter group"),
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
        assert snapshot(optimizer) == before
    steps(1, optimizer)


def test_pickle_does_not_store_the_flat_buffers_once_per_parameter():
    params = make_params(shapes=[(100,)] * 40)
    optimizer = Adam(params)
    steps(1, optimizer)
    theirs = torch_adam(params)
    steps(1, theirs)
    assert len(pickle.dumps(optimizer)) < 2 * len(pickle.dumps(theirs))


def test_hooks_run_as_in_torch():
    events = {}
    for make in (Adam, torch.optim.Adam):
        log = events.setdefault(make, [])
        params = make_params(shapes=[(3,)])
        optimizer = make(params)
        optimizer.register_step_pre_hook(lambda o, args, kwargs, log=log: log.append("before"))
        optimizer.register_step_post_hook(lambda o, args, kwargs, log=log: log.append("after"))
        optimizer.register_state_dict_pre_hook(lambda o, log=log: log.append("saving"))
        optimizer.register_state_dict_post_hook(
            lambda o, d, log=log: log.append(("saved", sorted(d)))
        )

        def rename(o, d, log=log):
            log.append(("loading", sorted(d)))
            return {"state": d["moments"], "param_groups": d["param_groups"]}

        optimizer.register_load_state_dict_pre_hook(rename)
        optimizer.register_load_state_dict_post_hook(
            lambda o, log=log: log.append(("loaded", o.param_groups[0]["lr"]))
        )
        steps(1, optimizer)
        saved = optimizer.state_dict()
        saved["moments"] = saved.pop("state")
        saved["param_groups"][0]["lr"] = 0.5
        optimizer.load_state_dict(saved)
        assert "moments" in saved and "state" not in saved
        assert optimizer.state[params[0]]["step"] == 1
    assert events[Adam] == events[torch.optim.Adam]
    assert len(events[Adam]) == 6


def test_parameter_names_are_kept():
    network = torch.nn.Linear(2, 3)
    optimizer = Adam(network.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    give_grads(list(network.parameters()))
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    other = torch.optim.Adam(network.named_parameters())
    other.load_state_dict(saved)
    unnamed = Adam(network.parameters())
    unnamed.load_state_dict(saved)
    assert unnamed.param_groups[0]["param_names"] == ["weight", "bias"]


RECORDS = {
    "no tensor": lambda record: 3,
    "no text": lambda record: record.clone().fill_(255),
    "other text": lambda record: torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_changes_nothing(name):
    params = make_params()
    optimizer = FusePV(params, lr=0.1, switch=2)
    run(optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["record"] = RECORDS[name](saved["state"][0]["record"])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="record is no record"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


def test_a_record_grows_with_what_it_holds():
    """In powers of two, so that a new optimizer has a tensor of the same size."""
    params = make_params()
    sizes = []
    for window in (10, 1000):
        optimizer = FusePV(params, switch=GradNorm(1e-9, window))
        run(optimizer, 1500)
        saved = optimizer.state_dict()
        sizes.append(saved["state"][0]["record"].numel())
        resumed = FusePV(twin(params), switch=GradNorm(1e-9, window))
        resumed.load_state_dict(copy.deepcopy(saved))
        assert frozen(resumed.state_dict()) == frozen(saved)
    assert sizes == [2**14, 2**15]


def test_what_a_user_keeps_in_the_state_is_kept():
    """If it is no data, beside the record."""
    params = make_params()
    optimizer = FusePV(params, lr=0.1, switch=2)
    run(optimizer, 4)
    kept = {"mine": (1, 2), "words": ["a", None], 5: {"x": torch.ones(2)}}
    optimizer.state[params[0]].update(kept)
    optimizer.state[params[1]]["mine"] = 3.0
    resumed = FusePV(twin(params), switch=2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    first, second = list(resumed.state.values())[:2]
    assert first["mine"] == (1, 2) and first["words"] == ["a", None]
    assert torch.equal(first[5]["x"], torch.ones(2))
    assert second["mine"] == 3.0
