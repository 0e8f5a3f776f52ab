"""estimate_memory against what optimizers at work report and hold."""

import pytest
import torch
from torch import nn

import fuse_ext
from fuse_ext.checks import FLOATING
from fuse_ext.optim.estimate_memory import OPTIMIZERS

SIZES = (1, 2, 127, 128, 129, 255, 257, 1000, 4096, 10_001)


def closure_of(params):
    """A convex quadratic that zeroes nothing twice and works for every dtype."""

    def closure():
        with torch.no_grad():
            for i, p in enumerate(params):
                p.grad = (1 + i) * p.detach().clone()
            return sum((p.abs().double() ** 2).sum() for p in params)

    return closure


def at_work(name, params, steps=3, **options):
    """The optimizer after some steps."""
    opt = getattr(fuse_ext, name)(params, **options)
    closure = closure_of(params)
    for _ in range(steps):
        opt.step(closure)
    return opt


def held(opt):
    """Bytes of the tensors in the optimizer's state, each storage once."""
    storages = {}
    for entry in opt.state.values():
        for value in entry.values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def phase(estimate, name):
    (found,) = [p for p in estimate.phases if p.phase == name]
    return found


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("history_size", [1, 10])
def test_lbfgs_holds_what_was_estimated(numel, dtype, history_size):
    params = [nn.Parameter(torch.ones(numel, dtype=dtype))]
    options = {"history_size": history_size}
    if dtype != torch.float64:
        options["history_dtype"] = dtype
    estimate = fuse_ext.estimate_memory(params, "LBFGS", **options)
    opt = at_work("LBFGS", params, lr=0.1, max_iter=1, **options)
    assert estimate.state_bytes == held(opt)
    assert estimate.numel == numel


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_holds_what_was_estimated(numel, amsgrad):
    params = [nn.Parameter(torch.ones(size)) for size in (numel, 3, 1)]
    opt = at_work("Adam", params, amsgrad=amsgrad)
    estimate = fuse_ext.estimate_memory(params, "Adam", amsgrad=amsgrad)
    assert estimate.state_bytes == held(opt)
    assert estimate.workspace_bytes == 0


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("history_dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_fuse_pv_reports_what_was_estimated_in_both_phases(numel, history_dtype, line_search):
    params = [nn.Parameter(torch.ones(numel)), nn.Parameter(torch.ones(2, 3))]
    options = {"history_dtype": history_dtype, "line_search": line_search}
    estimate = fuse_ext.estimate_memory(params, deterministic=True, **options)
    # So short a first trial that the search goes on past good ones, and keeps their gradients.
    opt = at_work("FusePV", params, 2, switch=3, lbfgs_lr=0.01, deterministic=True, **options)
    adam = opt.report()
    assert (adam.phase, adam.state_bytes) == ("adam", phase(estimate, "adam").state_bytes)
    closure = closure_of(params)
    for _ in range(4):
        opt.step(closure)
    report = opt.report()
    expected = phase(estimate, "lbfgs")
    assert report.phase == "lbfgs"
    assert report.state_bytes == expected.state_bytes == held(opt)
    assert report.workspace_bytes == expected.workspace_bytes
    both = phase(estimate, "adam").state_bytes + expected.state_bytes
    assert estimate.peak_bytes == max(both, expected.total_bytes)


@pytest.mark.parametrize("line_search", [None, "armijo", "strong_wolfe", "approximate_wolfe"])
def test_workspace_of_every_line_search(line_search):
    params = [nn.Parameter(torch.ones(1000))]
    options = {"deterministic": True, "line_search": line_search}
    for curvature in ("auto", "pairs", "dense"):
        told = {**options, "curvature": curvature}
        estimate = fuse_ext.estimate_memory(params, **told)
        opt = at_work("FusePV", params, 6, switch=0, lbfgs_lr=0.01, **told)
        assert opt.report().workspace_bytes == estimate.workspace_bytes
        assert opt.report().state_bytes == phase(estimate, "lbfgs").state_bytes


def test_fuse_holds_both_states():
    params = [nn.Parameter(torch.ones(1000)), nn.Parameter(torch.ones(7))]
    opt = at_work("Fuse", params, line_search="strong_wolfe", history_size=4)
    estimate = fuse_ext.estimate_memory(params, "Fuse", line_search="strong_wolfe", history_size=4)
    assert estimate.state_bytes == opt.report().state_bytes == held(opt)
    assert estimate.workspace_bytes == 3 * 4 * 1007  # x, the best trial's g, and g at x


def test_a_model_its_parameters_groups_and_a_number_give_the_same():
    model = nn.Linear(30, 70, bias=False)

    def estimate(params):  # a number has no shape to make a metric of
        return fuse_ext.estimate_memory(params, metric="diagonal")

    estimates = [
        estimate(model),
        estimate(model.parameters()),
        estimate(model.named_parameters()),
        estimate([{"params": model.weight, "lr": 0.1}]),
        estimate(2100),
    ]
    assert all(estimate == estimates[0] for estimate in estimates)


def test_several_groups_of_several_dtypes():
    groups = [
        {"params": [nn.Parameter(torch.ones(5, dtype=torch.bfloat16))], "lr": 0.1},
        {"params": [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(1))]},
        {"params": [nn.Parameter(torch.ones(9, dtype=torch.complex64))]},
    ]
    params = [p for group in groups for p in group["params"]]
    estimate = fuse_ext.estimate_memory(groups, line_search="strong_wolfe")
    opt = fuse_ext.FusePV(groups, switch=2, line_search="strong_wolfe")
    closure = closure_of(params)
    opt.step(closure)
    assert estimate.numel == opt.flat.numel
    assert opt.report().state_bytes == phase(estimate, "adam").state_bytes
    opt.step(closure)
    opt.step(closure)
    assert opt.report().state_bytes == phase(estimate, "lbfgs").state_bytes


@pytest.mark.parametrize("metric", ["auto", "diagonal", "kronecker"])
@pytest.mark.parametrize("moment_dtype", [None, torch.bfloat16])
def test_in_a_living_metric(metric, moment_dtype):
    params = [nn.Parameter(torch.randn(shape)) for shape in ((300, 4), (7,), (8, 3, 2, 2))]
    options = {"metric": metric, "moment_dtype": moment_dtype}
    estimate = fuse_ext.estimate_memory(params, **options)
    opt = fuse_ext.FusePV(params, switch=2, deterministic=False, **options)
    most = 0
    for _ in range(30):
        closure_of(params)()
        opt.step()
        report = opt.report()
        most = max(most, report.state_bytes + report.workspace_bytes)
    assert phase(estimate, "lbfgs").state_bytes == opt.report().state_bytes == held(opt)
    assert estimate.peak_bytes == most
    assert opt.report().workspace_bytes == 0


@pytest.mark.parametrize("name", ["FusePV", "LBFGS"])
@pytest.mark.parametrize("history_dtype", [None, torch.bfloat16])
def test_steps_for_graphs_keep_a_vector_more(name, history_dtype):
    params = [nn.Parameter(torch.ones(40, 25)), nn.Parameter(torch.ones(7))]
    rows = {"history_size": 4, "history_dtype": history_dtype}
    estimate = fuse_ext.estimate_memory(params, name, line_search=None, capturable=True, **rows)
    more = {"switch": 2, "lbfgs_lr": 0.01, "line_search": None}
    if name == "LBFGS":
        more = {"max_iter": 1, "lr": 0.01, "line_search_fn": None}
    opt = at_work(name, params, 4, capturable=True, **rows, **more)
    report, expected = opt.report(), estimate.phases[-1]
    assert report.state_bytes == expected.state_bytes
    assert report.workspace_bytes == expected.workspace_bytes
    # On the host that vector is the open row, where rows are as wide as it.
    eager = fuse_ext.estimate_memory(params, name, line_search=None, **rows)
    assert expected.state_bytes - eager.phases[-1].state_bytes == (0 if history_dtype else 4 * 1007)
    assert 0 < held(opt) - expected.state_bytes < 1024  # what the host would decide by
    adam = fuse_ext.estimate_memory(params, "Adam", capturable=True)
    assert adam.state_bytes == held(at_work("Adam", params, capturable=True))


@pytest.mark.parametrize("curvature", ["auto", "pairs"])
def test_several_iterations_a_step_search(curvature):
    params = [nn.Parameter(torch.ones(600))]
    estimate = fuse_ext.estimate_memory(params, max_iter=3, curvature=curvature)
    assert estimate.one_function is None
    opt = at_work("FusePV", params, 9, switch=2, max_iter=3, lbfgs_lr=0.01, curvature=curvature)
    assert opt.report().phase == "lbfgs"
    assert opt.report().state_bytes == phase(estimate, "lbfgs").state_bytes == held(opt)
    assert opt.report().workspace_bytes == phase(estimate, "lbfgs").workspace_bytes


@pytest.mark.parametrize("options", [{}, {"line_search": "strong_wolfe"}, {"curvature": "pairs"}])
@pytest.mark.parametrize("numel", [300, 20_000])
def test_what_is_held_once_the_closure_is_found_to_be_one_function(numel, options):
    params = [nn.Parameter(torch.ones(numel))]
    estimate = fuse_ext.estimate_memory(params, **options)
    known = fuse_ext.estimate_memory(params, deterministic=True, **options)
    assert estimate.one_function.total_bytes == known.phases[-1].total_bytes
    opt = at_work("FusePV", params, 4, switch=4, **options)
    most = opt.report().state_bytes
    # On one function after the switch a step finds out, and the next ones are on it.
    for _ in range(8):
        opt.step(closure_of(params))
    assert opt.report().state_bytes == estimate.one_function.state_bytes == held(opt)
    assert most <= estimate.peak_bytes < estimate.peak_of_one_function
    assert "one function" in str(estimate) and "one function" not in str(known)
    told = fuse_ext.estimate_memory(params, deterministic=False, **options)
    assert told.one_function is None and told.phases == estimate.phases
    assert told.peak_of_one_function == told.peak_bytes == estimate.peak_bytes


@pytest.mark.parametrize("shape", [(512, 2), (2, 512), (512, 8), (512, 32), (128, 10), (64, 3, 3)])
def test_bases_cost_a_bounded_number_of_bytes_a_parameter(shape):
    """Adam's 8, and 8 (a / b + b / a), where the longer side is at most 16 times the other."""
    params = [nn.Parameter(torch.randn(shape))]
    estimate = phase(fuse_ext.estimate_memory(params), "lbfgs")
    opt = fuse_ext.FusePV(params, switch=2, deterministic=False)
    for _ in range(25):
        closure_of(params)()
        opt.step()
    assert estimate.state_bytes == opt.report().state_bytes == held(opt)
    assert estimate.state_bytes <= 137 * params[0].numel()


def test_nothing_is_allocated():
    # A thousand times what this machine could hold.
    estimate = fuse_ext.estimate_memory(10**13, history_dtype=torch.bfloat16, line_search="armijo")
    assert estimate.bytes_per_parameter == pytest.approx(48, rel=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_phases_and_a_table(name):
    estimate = fuse_ext.estimate_memory(10**6, name)
    text = str(estimate)
    assert name in text and "1,000,000" in text
    for part in estimate.phases:
        assert part.phase in text
        assert part.total_bytes == part.state_bytes + part.workspace_bytes
    assert estimate.state_bytes <= estimate.peak_bytes


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        (0, {}, ValueError, "params must be at least 1, got 0"),
        (True, {}, TypeError, "params must be an int, got True"),
        (2.5, {}, TypeError, "params must be a module.*got float"),
        (torch.zeros(3), {}, TypeError, "params must be a module.*got Tensor"),
        ([], {}, ValueError, "params is empty"),
        (["w"], {}, TypeError, r"params\[0\] must be a tensor, got str"),
        ([torch.zeros(3, dtype=torch.int32)], {}, TypeError, r"params\[0\] has dtype"),
        (5, {"optimizer": "SGD"}, ValueError, "optimizer must be one of .*got 'SGD'"),
        (5, {"history_size": 0}, ValueError, "history_size must be at least 1, got 0"),
        (5, {"history_dtype": torch.int64}, ValueError, "history_dtype"),
        (5, {"line_search": "wolf"}, ValueError, "line_search must be"),
    ],
)
def test_bad_arguments_are_named(params, options, error, message):
    with pytest.raises(error, match=message):
        fuse_ext.estimate_memory(params, **options)


def test_the_same_parameter_twice():
    weight = nn.Parameter(torch.ones(3))
    assert fuse_ext.estimate_memory([weight, weight]) == fuse_ext.estimate_memory([weight])
    with pytest.raises(ValueError, match=r"params\[1\] is the same tensor as params\[0\]"):
        fuse_ext.estimate_memory([{"params": weight}, {"params": weight}])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_share_of_the_state(name):
    options = {"optimizer": name, "line_search": None, "metric": "diagonal"}
    share = fuse_ext.estimate_memory(10**6, shard_over=4, **options)
    assert share == fuse_ext.estimate_memory(250_000, **options)
    # The first rank has most: 2 of 7 rows, the one row that there is, and the number.
    params = [nn.Parameter(torch.ones(shape)) for shape in ((7, 3), (1, 5), ())]
    share = fuse_ext.estimate_memory(params, shard_over=4, **options)
    first = [nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (1, 5), ())]
    assert share == fuse_ext.estimate_memory(first, **options)


def test_what_has_no_share():
    with pytest.raises(ValueError, match="shard_over must be"):
        fuse_ext.estimate_memory(10, shard_over=0)
    numbers = [nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    with pytest.raises(ValueError, match=r"params\[0\] has torch.complex64"):
        fuse_ext.estimate_memory(numbers, shard_over=2)
    fuse_ext.estimate_memory(numbers)
