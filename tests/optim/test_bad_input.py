"""Bad input to Adam and Fuse: an error that names the argument and its value, nothing changed."""

import copy
import math

import numpy as np
import pytest
import torch
from adam_cases import BACKENDS, frozen, give_grads, make_params, snapshot, steps, torch_adam, twin

from fuse_ext import Adam, CosineTheta, Fuse, LinearTheta

NAN, INF = math.nan, math.inf

# Arguments of both optimizers: name, value, error, message.
OPTIONS = [
    ("lr", -0.1, ValueError, r"lr must be at least 0 and finite, got -0\.1"),
    ("lr", NAN, ValueError, "lr must be .*, got nan"),
    ("lr", INF, ValueError, "lr must be .*, got inf"),
    ("lr", "0.1", TypeError, "lr must be a number, got '0.1'"),
    ("lr", None, TypeError, "lr must be a number, got None"),
    ("lr", True, TypeError, "lr must be a number, got True"),
    ("lr", torch.tensor([0.1, 0.2]), ValueError, "lr must have one element, got a tensor of 2"),
    ("lr", torch.tensor(-1.0), ValueError, r"lr must be .*, got -1\.0"),
    ("betas", (1.0, 0.9), ValueError, r"betas\[0\] must be in \[0, 1\), got 1\.0"),
    ("betas", (0.9, 1.5), ValueError, r"betas\[1\] must be in \[0, 1\), got 1\.5"),
    ("betas", (-0.1, 0.9), ValueError, r"betas\[0\] must be .*, got -0\.1"),
    ("betas", (0.9, NAN), ValueError, r"betas\[1\] must be .*, got nan"),
    ("betas", (0.9,), ValueError, r"betas must be a pair, got \(0\.9,\)"),
    ("betas", 0.9, ValueError, r"betas must be a pair, got 0\.9"),
    ("eps", -1e-8, ValueError, "eps must be .*, got -1e-08"),
    ("eps", NAN, ValueError, "eps must be .*, got nan"),
    ("weight_decay", -0.1, ValueError, r"weight_decay must be .*, got -0\.1"),
    ("weight_decay", INF, ValueError, "weight_decay must be .*, got inf"),
    ("backend", "cuda", ValueError, "backend must be one of auto, native, reference, got 'cuda'"),
]
FUSE_OPTIONS = [
    ("theta", -0.1, ValueError, r"theta must be in \[0, 1\], got -0\.1"),
    ("theta", 1.5, ValueError, r"theta must be in \[0, 1\], got 1\.5"),
    ("theta", NAN, ValueError, r"theta must be in \[0, 1\], got nan"),
    ("theta", "linear", TypeError, "theta must be a number, got 'linear'"),
    ("lbfgs_lr", -1.0, ValueError, r"lbfgs_lr must be .*, got -1\.0"),
    ("history_size", 0, ValueError, "history_size must be at least 1, got 0"),
    ("history_size", 2.5, TypeError, r"history_size must be an int, got 2\.5"),
    ("history_dtype", torch.int16, ValueError, "history_dtype must be .* got torch.int16"),
    ("line_search", "wolf", ValueError, "line_search must be .* got 'wolf'"),
    ("line_search", 3, TypeError, "line_search must be .* got 3"),
    ("curvature_tol", 2.0, ValueError, r"curvature_tol must be in \[0, 1\], got 2\.0"),
]
KINDS = {"Adam": Adam, "Fuse": Fuse}


@pytest.mark.parametrize(("name", "value", "error", "message"), OPTIONS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_options(kind, name, value, error, message):
    params = make_params()
    before = frozen(params)
    with pytest.raises(error, match=message):
        kind(params, **{name: value})
    if name != "backend":  # and in a group, where another one is fine
        with pytest.raises(error, match=message):
            kind([{"params": params[:1]}, {"params": params[1:], name: value}])
    assert frozen(params) == before


@pytest.mark.parametrize(("name", "value", "error", "message"), FUSE_OPTIONS)
def test_options_of_fuse(name, value, error, message):
    with pytest.raises(error, match=message):
        Fuse(make_params(), **{name: value})


def test_differentiable_is_refused():
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        Adam(make_params(), differentiable=True)


def test_options_of_fuse_must_agree():
    params = make_params()
    groups = [{"params": params[:1]}, {"params": params[1:], "history_size": 3}]
    with pytest.raises(ValueError, match=r"history_size must be the same .* 10 in group 0 and 3"):
        Fuse(groups)


@pytest.mark.parametrize("schedule", (LinearTheta, CosineTheta))
def test_schedules_of_theta(schedule):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        schedule(0)
    with pytest.raises(TypeError, match=r"steps must be an int, got 10\.0"):
        schedule(10.0)
    with pytest.raises(ValueError, match=r"start must be in \[0, 1\], got 2\.0"):
        schedule(10, start=2.0)
    with pytest.raises(ValueError, match=r"end must be in \[0, 1\], got -1\.0"):
        schedule(10, end=-1.0)


def test_numbers_of_numpy_are_numbers():
    params = make_params()
    twins = twin(params)
    options = {"lr": 0.125, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.5}
    of_numpy = {name: np.float32(value) for name, value in options.items() if name != "betas"}
    of_numpy["betas"] = (np.float32(0.5), np.float32(0.75))
    ours, same = Adam(params, **of_numpy), Adam(twins, **options)
    steps(2, ours, same)
    assert frozen(params) == frozen(twins)


def params_of(*tensors):
    return lambda: list(tensors)


PARAMS = {
    "none": ([], ValueError, "empty parameter list"),
    "an empty group": ([{"params": []}], ValueError, "params is empty"),
    "integers": (
        [torch.zeros(2), torch.zeros(2, dtype=torch.int64)],
        TypeError,
        r"params\[1\] has dtype torch.int64; supported are float32",
    ),
    "booleans": ([torch.zeros(2, dtype=torch.bool)], TypeError, r"params\[0\].*torch.bool"),
    "sparse": ([torch.zeros(2).to_sparse()], TypeError, r"params\[0\] has layout torch.sparse"),
    "two devices": (
        [torch.zeros(2), torch.zeros(2, device="meta")],
        ValueError,
        r"params\[1\] is on meta but params\[0\] is on cpu",
    ),
    "no tensor": ([torch.zeros(2), [1.0, 2.0]], TypeError, "can only optimize Tensors.*list"),
    "a string": (["weight"], TypeError, "can only optimize Tensors.*str"),
    "a bare tensor": (torch.zeros(2), TypeError, "params argument .* should be an iterable"),
    "a non-leaf": ([torch.zeros(2, requires_grad=True) * 2], ValueError, "non-leaf"),
    "expanded": (
        [torch.zeros(1).expand(3)],
        ValueError,
        r"params\[0\] has shape \(3,\) and strides \(0,\): several .* share memory",
    ),
    "conjugated": (
        [torch.zeros(2, dtype=torch.complex64).conj()],
        ValueError,
        r"params\[0\] is a conjugated or negated view",
    ),
    "negated": (
        [torch.zeros(2, dtype=torch.complex64).conj().imag],
        ValueError,
        r"params\[0\] is a conjugated or negated view",
    ),
}


@pytest.mark.parametrize(("params", "error", "message"), PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_parameters(kind, params, error, message):
    if isinstance(params, list):
        params = [dict(p) if isinstance(p, dict) else p for p in params]
    with pytest.raises(error, match=message):
        kind(params)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_duplicate_parameters(kind):
    p = torch.zeros(2)
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        kind([{"params": [p]}, {"params": [p]}])


def test_native_kernels_are_not_promised_where_there_are_none():
    p = torch.zeros(2, device="meta")
    with pytest.raises(RuntimeError, match="backend='native' has no kernels for device meta"):
        Adam([p], backend="native")
    Adam([p])


def bad_shape(p):
    p.grad.data = torch.zeros(5)


def bad_dtype(p):
    p.grad.data = torch.zeros(p.shape, dtype=torch.int32)


def complex_for_real(p):
    p.grad.data = torch.zeros(p.shape, dtype=torch.complex64)


def sparse(p):
    p.grad = torch.ones(p.shape).to_sparse()


GRADS = {
    "shape": (bad_shape, ValueError, r"grads\[3\] has shape \(?\[?5,?\)?\]?.* params\[3\]"),
    "dtype": (bad_dtype, TypeError, r"grads\[3\] has dtype"),
    "complex": (complex_for_real, TypeError, r"grads\[3\] has dtype"),
    "sparse": (sparse, TypeError, r"grads\[3\] has layout (torch.sparse_coo|Sparse)"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("warm", (False, True), ids=("first_step", "later"))
@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize(("spoil", "error", "message"), GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradients(kind, spoil, error, message, groups, warm, backend):
    """The spoilt one is the last of all: what came before it must not have been stepped."""
    params = make_params(shapes=[(3,), (2,), (4,), (2, 3)])
    param_groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:]}]
    optimizer = kind(params if groups == 1 else param_groups, backend=backend)
    if warm:
        steps(2, optimizer)
    give_grads(params)
    spoil(params[3])
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    after = snapshot(optimizer)
    if kind is Fuse and not warm:  # its state is set up when the first step begins
        assert all("step" not in entry for entry in after["state"])
        before["state"] = after["state"]
    assert after == before
    params[3].grad = torch.zeros_like(params[3])
    optimizer.step()


def as_half(network):
    network.half()


def as_double(network):
    network.double()


def as_channels_last(network):
    network.to(memory_format=torch.channels_last)


def grown(network):
    network.bias.data = torch.zeros(7)


def reshaped(network):
    network.weight.data = network.weight.data.reshape(2, 3, 2, 2)


CONVERSIONS = {
    as_half: r"params\[0\] is now torch.float16 .* was torch.float32",
    as_double: r"params\[0\] is now torch.float64 .* was torch.float32",
    as_channels_last: r"params\[0\] is now .* strides \(12, 1, 6, 3\) .* strides \(12, 4, 2, 1\)",
    grown: r"params\[1\] is now .* shape \(7,\) .* shape \(2,\)",
    reshaped: r"params\[0\] is now .* shape \(2, 3, 2, 2\)",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_models_converted_after_the_first_step(kind, convert, backend):
    network = torch.nn.Conv2d(3, 2, 2)
    if convert is reshaped:
        network = torch.nn.Conv2d(2, 3, 2)
    optimizer = kind(network.parameters(), backend=backend)
    steps(1, optimizer)
    convert(network)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=CONVERSIONS[convert]):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("convert", (as_double, as_half, as_channels_last))
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_models_converted_before_the_first_step(kind, convert):
    networks = [torch.nn.Conv2d(3, 2, 2) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    early = kind(networks[0].parameters(), lr=0.1)
    for network in networks:
        convert(network)
    late = kind(networks[1].parameters(), lr=0.1)
    steps(3, early, late)
    assert frozen(list(networks[0].parameters())) == frozen(list(networks[1].parameters()))
    assert frozen(early.state_dict()) == frozen(late.state_dict())


def test_an_option_spoilt_in_the_last_group_stops_all_groups():
    params = make_params()
    optimizer = Adam([{"params": params[:1]}, {"params": params[1:]}])
    steps(1, optimizer)
    optimizer.param_groups[1]["lr"] = None
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="NoneType"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_a_closure_that_raises_leaves_adam_as_it_was():
    params = make_params()
    optimizer = Adam(params)
    steps(2, optimizer)
    before = snapshot(optimizer)

    def closure():
        raise KeyError("no data")

    with pytest.raises(KeyError, match="no data"):
        optimizer.step(closure)
    assert snapshot(optimizer) == before


def test_options_changed_to_what_has_no_state():
    params = make_params()
    optimizer = Adam([{"params": params[:1]}, {"params": params[1:]}])
    steps(1, optimizer)
    optimizer.param_groups[1]["amsgrad"] = True
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"amsgrad of param_groups\[1\] became True"):
        optimizer.step()
    assert snapshot(optimizer) == before


def remove(*path):
    def change(saved):
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return change


def put(value, *path):
    def change(saved):
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value

    return change


def of(kind, **options):
    def change(saved):
        params = make_params()
        optimizer = kind(params, **options)
        give_grads(params)
        optimizer.step(lambda: torch.tensor(1.0))
        saved.clear()
        saved.update(optimizer.state_dict())

    return change


def with_fewer_parameters(saved):
    saved["param_groups"][0]["params"].pop()


STATE_DICTS = {
    "no state": (remove("state"), ValueError, "state_dict has no 'state', only"),
    "no groups": (remove("param_groups"), ValueError, "state_dict has no 'param_groups', only"),
    "state a list": (
        put([], "state"),
        TypeError,
        r"state_dict\['state'\] must be a dict, got list",
    ),
    "no params": (
        remove("param_groups", 0, "params"),
        ValueError,
        r"param_groups\[0\] has no 'params'",
    ),
    "more groups": (
        lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
        ValueError,
        r"groups of \[6, 6\] tensors, the optimizer of \[6\]",
    ),
    "fewer parameters": (
        with_fewer_parameters,
        ValueError,
        r"groups of \[5\] tensors, the optimizer of \[6\]",
    ),
    "no step": (
        remove("state", 1, "step"),
        ValueError,
        r"params\[1\] has no 'step'|lacks \['step'\] of params\[1\]",
    ),
    "no exp_avg": (remove("state", 5, "exp_avg"), ValueError, r"(has no |lacks \[)'exp_avg'"),
    "shape": (
        put(torch.zeros(5, 3), "state", 1, "exp_avg_sq"),
        ValueError,
        r"exp_avg_sq of params\[1\] has shape \(5, 3\), the parameter \(3, 5\)",
    ),
    "complex": (
        put(torch.zeros(7, dtype=torch.complex64), "state", 0, "exp_avg"),
        ValueError,
        r"exp_avg of params\[0\] is torch.complex64, the parameter torch.float32",
    ),
    "a list": (put([0.0], "state", 0, "exp_avg"), ValueError, r"exp_avg of params\[0\] is list"),
    "step negative": (
        put(torch.tensor(-1.0), "state", 0, "step"),
        ValueError,
        r"step of params\[0\] is tensor\(-1\.\)",
    ),
    "step NaN": (put(NAN, "state", 0, "step"), ValueError, r"step of params\[0\] is nan"),
    "step a vector": (put(torch.ones(2), "state", 0, "step"), ValueError, r"step of params\[0\]"),
    "step a word": (put("one", "state", 0, "step"), ValueError, r"step of params\[0\] is 'one'"),
    "lr": (put(-1.0, "param_groups", 0, "lr"), ValueError, r"lr must be .*, got -1\.0"),
    "betas": (put((0.9, 1.0), "param_groups", 0, "betas"), ValueError, r"betas\[1\]"),
    "eps": (put(NAN, "param_groups", 0, "eps"), ValueError, "eps must be .* nan"),
    "differentiable": (
        put(True, "param_groups", 0, "differentiable"),
        ValueError,
        "differentiable=True",
    ),
    "SGD": (of(torch.optim.SGD, lr=0.1), ValueError, "not of .*: param_groups.0. has no 'betas'"),
    "RMSprop": (of(torch.optim.RMSprop), ValueError, "has no 'betas', only.*'alpha'"),
    "Adagrad": (of(torch.optim.Adagrad), ValueError, "has no 'betas'"),
    "Adamax": (of(torch.optim.Adamax), ValueError, "has no '(exp_avg_sq|history_size)', only"),
    "LBFGS": (of(torch.optim.LBFGS), ValueError, "has no 'betas'"),
}
FUSE_STATE_DICTS = {
    "torch's Adam": (of(torch.optim.Adam), ValueError, "has no 'history_size'"),
    "history": (
        put(torch.zeros(2, 11, 7), "state", 0, "history"),
        ValueError,
        r"history has shape \(2, 11, 7\), expected \(2, 11, 36\)",
    ),
    "no history": (remove("state", 0, "history"), ValueError, r"lacks \['history'\]"),
    "history_size": (
        put(5, "param_groups", 0, "history_size"),
        ValueError,
        r"history has shape \(2, 11, 36\), expected \(2, 6, 36\)",
    ),
    "line_search": (put("wolf", "param_groups", 0, "line_search"), ValueError, "'wolf'"),
}
CASES = [(Adam, name, *case) for name, case in STATE_DICTS.items()]
CASES += [(Fuse, name, *case) for name, case in (STATE_DICTS | FUSE_STATE_DICTS).items()]


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [(kind, *case) for kind, _, *case in CASES],
    ids=[f"{kind.__name__}-{name}" for kind, name, *_ in CASES],
)
def test_state_dicts(kind, change, error, message):
    optimizer = kind(make_params())
    steps(2, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    given, before = frozen(saved), snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before
    assert frozen(saved) == given
    steps(1, optimizer)


@pytest.mark.parametrize("saved", (None, [], "state", torch.zeros(2)))
def test_state_dicts_that_are_none(saved):
    with pytest.raises(TypeError, match="state_dict must be a dict, got"):
        Adam(make_params()).load_state_dict(saved)


def test_a_checkpoint_of_adam_is_no_checkpoint_of_fuse_and_the_reverse():
    params = make_params()
    theirs = torch_adam(params)
    steps(1, theirs)
    with pytest.raises(ValueError, match="not of Fuse"):
        Fuse(params).load_state_dict(theirs.state_dict())
