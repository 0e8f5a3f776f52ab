"""Bad arguments of the ops: the message names the argument, and nothing has changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_cases import dense_arguments
from ops_cases import (
    BACKENDS,
    BF16,
    CPU,
    F16,
    F32,
    F64,
    Watch,
    adam_arguments,
    copy_arguments,
    decide_arguments,
    direction_arguments,
    give_control,
    make_ring,
    make_tensors,
    move_arguments,
    point_arguments,
    set_out_arguments,
    stats_arguments,
    tensors_of,
    update_arguments,
)
from torch import Tensor

from fuse_ext.kernels import fixed_step, ops
from fuse_ext.kernels import scalars as ring

Arguments = dict[str, Any]
SIZES = [6, 4]
NUMEL = sum(SIZES)
LISTLESS = ("lbfgs_two_loop", "lbfgs_decide", "dense_direction")
LISTS = [name for name in ops.NAMES if name not in LISTLESS]
WITH_GRADS = [name for name in LISTS if name not in ("lbfgs_move", "fuse_blend")]


def good(name: str) -> Arguments:
    """Arguments that work."""
    tensors = make_tensors(SIZES)
    tensors.params = [p.view(-1, 2) for p in tensors.params]
    tensors.grads = [g.view(-1, 2) for g in tensors.grads]
    made = make_ring(NUMEL, 3, 1, 2)
    point = point_arguments(tensors, made, torch.randn(NUMEL))
    decided = replace(made)
    give_control(decided)
    return {
        "adam_step": lambda: adam_arguments(tensors, amsgrad=True),
        "grad_stats": lambda: stats_arguments(tensors, made),
        "dense_direction": lambda: dense_arguments(NUMEL),
        "lbfgs_update": lambda: update_arguments(tensors, made),
        "lbfgs_two_loop": lambda: {
            "scalars": made.scalars,
            "slots": made.slots,
            "commit": True,
            "step_length": 1.0,
            "curvature_tol": 0.0,
            "broyden": ring.new_broyden(made.slots, CPU),
        },
        "lbfgs_decide": lambda: decide_arguments(decided),
        "lbfgs_direction": lambda: direction_arguments(tensors, made),
        "lbfgs_set_out": lambda: set_out_arguments(tensors, made, point["origin"]),
        "lbfgs_move": lambda: move_arguments(tensors, made, point["origin"]),
        "fuse_blend": lambda: point | {"theta": 0.5, "step": 0.5},
        "grad_gather": lambda: copy_arguments(tensors, torch.randn(NUMEL)),
        "grad_scatter": lambda: copy_arguments(tensors, torch.randn(NUMEL)),
    }[name]()


def check_refused(
    backend: str, name: str, arguments: Arguments, kind: type[Exception], message: str
) -> None:
    alive = {k: t for k, t in tensors_of(arguments).items() if t.layout == torch.strided}
    watch = Watch(alive)
    # Exactly this class: RuntimeError is the base of many of torch's.
    with pytest.raises(kind) as caught:
        getattr(BACKENDS[backend], name)(**arguments)
    assert caught.type is kind
    text = str(caught.value).replace("(", "[").replace(")", "]").replace("torch.", "")
    assert message in text, text
    assert watch.changed() == watch.bumped() == set()


def entry(name: str, value: Any, i: int = 1) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        made = value(arguments[name][i]) if callable(value) else value
        arguments[name] = [made if k == i else old for k, old in enumerate(arguments[name])]

    return change


def entry_dropped(name: str) -> Callable[[Arguments], None]:
    return argument(name, lambda values: values[:1])


def argument(name: str, value: Any) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        arguments[name] = value(arguments[name]) if callable(value) else value

    return change


Bad = tuple[Callable[[Arguments], None], type[Exception], str]
# What may be wrong with the lists of tensors; both backends check it.
BAD_PARAMS: dict[str, Bad] = {
    "fewer offsets": (argument("offsets", [0]), ValueError, "offsets has 1 entries for 2 params"),
    "negative offset": (entry("offsets", -1, 0), ValueError, "offsets[0]=-1 does not fit"),
    "overlap": (
        entry("offsets", 5),
        ValueError,
        "offsets[1]=5 does not fit: params[1] has 4 elements, the state 10, taken up to 6",
    ),
    "past the end": (entry("offsets", 7), ValueError, "offsets[1]=7 does not fit"),
    "huge offset": (entry("offsets", 2**63 - 1), ValueError, f"offsets[1]={2**63 - 1} does not"),
    "integer params": (entry("params", Tensor.long), TypeError, "params[1] has dtype"),
    "complex params": (
        entry("params", lambda p: p.to(torch.complex64)),
        TypeError,
        "supported are float32, float64, bfloat16 and float16",
    ),
    "sparse params": (entry("params", Tensor.to_sparse), TypeError, "params[1] has layout"),
    "float64 params": (
        entry("params", Tensor.double),
        TypeError,
        "params[1] has dtype float64 but the state float32, which would round it",
    ),
}
BAD_GRADS: dict[str, Bad] = {
    "fewer grads": (entry_dropped("grads"), ValueError, "grads has 1 entries for 2 params"),
    "no grads": (argument("grads", []), ValueError, "grads has 0 entries for 2 params"),
    "shape": (
        entry("grads", lambda g: g.view(4, 1)),
        ValueError,
        "grads[1] has shape [4, 1] but params[1] has [2, 2]",
    ),
    "integer grads": (entry("grads", Tensor.int), TypeError, "grads[1] has dtype"),
    "sparse grads": (entry("grads", Tensor.to_sparse), TypeError, "grads[1] has layout"),
    "CSR grads": (entry("grads", Tensor.to_sparse_csr), TypeError, "grads[1] has layout"),
}
BAD_TENSORS = [
    (name, bad)
    for name in LISTS
    for bad in [*BAD_PARAMS, *(BAD_GRADS if name in WITH_GRADS else ())]
    # Without a state of its own grad_stats computes in the widest dtype.
    if (name, bad) != ("grad_stats", "float64 params")
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "bad"), BAD_TENSORS)
def test_bad_tensors(backend: str, name: str, bad: str) -> None:
    arguments = good(name)
    change, kind, message = (BAD_PARAMS | BAD_GRADS)[bad]
    change(arguments)
    check_refused(backend, name, arguments, kind, message)


@pytest.mark.parametrize("name", LISTS)
def test_overlapping_parameters(name: str) -> None:
    arguments = good(name)
    entry("params", lambda p: p[:1].expand(2, 2))(arguments)
    message = "params[1] has shape [2, 2] and strides [0, 1]: several elements share one place"
    check_refused("native", name, arguments, ValueError, message)


def test_overlapping_gradients_cannot_be_written() -> None:
    arguments = good("grad_scatter")
    entry("grads", lambda g: g[:1].expand(2, 2))(arguments)
    message = "grads[1] has shape [2, 2] and strides [0, 1]: several elements share one place"
    check_refused("native", "grad_scatter", arguments, ValueError, message)


# What may be wrong with the rest, op by op.
RING_OPS = (
    "grad_stats",
    "lbfgs_update",
    "lbfgs_direction",
    "lbfgs_set_out",
    "lbfgs_move",
    "fuse_blend",
)
BAD_STATE: list[tuple[str, Callable[[Arguments], None], type[Exception], str]] = [
    ("adam_step", argument("exp_avg", Tensor.half), TypeError, "exp_avg has dtype"),
    ("adam_step", argument("exp_avg", Tensor.long), TypeError, "float32, float64 or bfloat16"),
    ("adam_step", argument("exp_avg", Tensor.bfloat16), TypeError, "exp_avg_sq has dtype Float"),
    (
        "adam_step",
        argument("exp_avg", lambda t: t.view(2, 5)),
        ValueError,
        "exp_avg has shape [2, 5] and strides [5, 1]; expected a contiguous vector of 10",
    ),
    (
        "adam_step",
        argument("exp_avg", lambda t: torch.zeros(20)[::2]),
        ValueError,
        "exp_avg has shape [10] and strides [2]; expected a contiguous vector of 10",
    ),
    ("adam_step", argument("exp_avg_sq", Tensor.double), TypeError, "exp_avg_sq has dtype"),
    ("adam_step", argument("exp_avg_sq", torch.zeros(9)), ValueError, "exp_avg_sq has shape [9]"),
    ("adam_step", argument("max_exp_avg_sq", Tensor.half), TypeError, "max_exp_avg_sq has dtype"),
    (
        "adam_step",
        argument("max_exp_avg_sq", torch.zeros(11)),
        ValueError,
        "max_exp_avg_sq has shape [11]",
    ),
    ("adam_step", argument("stats", Tensor.float), TypeError, "stats has dtype"),
    ("adam_step", argument("stats", torch.zeros(2, dtype=F64)), ValueError, "stats has shape [2]"),
    ("adam_step", argument("counts", torch.zeros(2)), TypeError, "counts has dtype"),
    ("adam_step", argument("counts", torch.zeros(3, dtype=F64)), ValueError, "counts has shape"),
    ("grad_stats", argument("stats", Tensor.float), TypeError, "stats has dtype"),
    ("grad_stats", argument("stats", torch.zeros(4, dtype=F64)), ValueError, "stats has shape [4]"),
    ("lbfgs_two_loop", argument("slots", 5), ValueError, "scalars has shape"),
    ("lbfgs_two_loop", argument("slots", 1), ValueError, "slots=1 must be at least 2"),
    ("lbfgs_two_loop", argument("slots", 0), ValueError, "slots=0 must be at least 2"),
    ("lbfgs_two_loop", argument("slots", -3), ValueError, "slots=-3 must be at least 2"),
    ("lbfgs_two_loop", argument("scalars", Tensor.float), TypeError, "scalars has dtype"),
    ("lbfgs_two_loop", argument("broyden", Tensor.float), TypeError, "broyden has dtype"),
    ("lbfgs_two_loop", argument("broyden", torch.zeros(9, dtype=F64)), ValueError, "broyden has"),
    ("lbfgs_decide", argument("slots", 5), ValueError, "scalars has shape"),
    ("lbfgs_decide", argument("control", Tensor.float), TypeError, "control has dtype"),
    ("lbfgs_decide", argument("loss", torch.zeros(2)), ValueError, "loss has 2 elements, not one"),
    *(
        (name, argument("control", torch.zeros(3, dtype=F64)), ValueError, "control has shape [3]")
        for name in ("lbfgs_decide", "lbfgs_move")
    ),
    *(
        (name, argument("origin", made), kind, message)
        for name in ("lbfgs_move", "lbfgs_set_out")
        for made, kind, message in (
            (Tensor.half, TypeError, "origin has dtype"),
            (torch.zeros(9), ValueError, "origin has shape [9]"),
        )
    ),
    ("lbfgs_set_out", argument("origin", Tensor.double), TypeError, "origin has dtype Double"),
    ("fuse_blend", argument("origin", Tensor.bfloat16), TypeError, "origin has dtype"),
    ("fuse_blend", argument("origin", torch.zeros(2, 5)), ValueError, "origin has shape [2, 5]"),
    ("grad_gather", argument("flat", Tensor.half), TypeError, "flat has dtype"),
    ("grad_gather", argument("flat", torch.zeros(2, 5)), ValueError, "flat has shape [2, 5]"),
    ("grad_scatter", argument("flat", Tensor.long), TypeError, "flat has dtype"),
    ("grad_scatter", argument("flat", torch.zeros(20)[::2]), ValueError, "flat has shape [10]"),
    *(
        (name, argument("grad_prev", made), kind, message)
        for name in ("lbfgs_update", "lbfgs_direction", "lbfgs_set_out")
        for made, kind, message in (
            (torch.zeros(NUMEL, dtype=F16), TypeError, "grad_prev has dtype"),
            (torch.zeros(NUMEL + 1), ValueError, "grad_prev has shape [11]"),
            (torch.zeros(2 * NUMEL)[::2], ValueError, "grad_prev has shape [10] and strides [2]"),
        )
    ),
    *(
        (name, change, kind, message)
        for name in RING_OPS
        for change, kind, message in (
            (argument("history", Tensor.long), TypeError, "history has dtype"),
            (argument("history", lambda h: h[0]), ValueError, "history has shape [4, 10]"),
            (
                argument("history", lambda h: torch.cat([h, h])),
                ValueError,
                "history has shape [4, 4, 10]",
            ),
            (
                argument("history", lambda h: h[:, :1]),
                ValueError,
                "history has shape [2, 1, 10]",
            ),
            (
                argument("history", lambda h: h.transpose(1, 2).contiguous().transpose(1, 2)),
                ValueError,
                "expected [2, slots, numel] with contiguous rows and at least 2 slots",
            ),
            (argument("history", lambda h: h[:, :3]), ValueError, "scalars has shape"),
            (argument("scalars", Tensor.float), TypeError, "scalars has dtype"),
            (argument("scalars", lambda s: s.view(1, -1)), ValueError, "scalars has shape [1, "),
        )
    ),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    BAD_STATE,
    ids=[f"{i}-{name}: {message}" for i, (name, _, _, message) in enumerate(BAD_STATE)],
)
def test_bad_state(
    name: str, change: Callable[[Arguments], None], kind: type[Exception], message: str
) -> None:
    arguments = good(name)
    change(arguments)
    check_refused("native", name, arguments, kind, message)


@pytest.mark.parametrize("name", [*RING_OPS, "lbfgs_two_loop", "lbfgs_decide"])
@pytest.mark.parametrize("entry_", ["open", "count"])
@pytest.mark.parametrize("value", [-1.0, 4.0, 1e30, math.nan, math.inf])
def test_damaged_scalars_never_index(name: str, entry_: str, value: float) -> None:
    """As a checkpoint from elsewhere might hold."""
    arguments = good(name)
    arguments["scalars"][ring.index(entry_, 4)] = value
    check_refused("native", name, arguments, ValueError, "scalars say slot")


BAD_EITHER: list[tuple[str, Callable[[Arguments], None], type[Exception], str]] = [
    ("adam_step", argument("step", 0), ValueError, "step=0 must be at least 1"),
    ("adam_step", argument("step", -2), ValueError, "step=-2 must be at least 1"),
    *(
        ("adam_step", argument(name, made), kind, f"{name} has {message}")
        for name, made, kind, message in (
            ("lr_tensor", torch.ones(2), ValueError, "2 elements, not one"),
            ("lr_tensor", torch.ones(1, dtype=F16), TypeError, "dtype"),
            ("step_tensor", torch.ones(1, dtype=F16), TypeError, "dtype"),
            ("step_tensor", torch.ones(0), ValueError, "shape [0] and strides [1]; expected cont"),
            ("step_tensor", torch.ones(4)[::2], ValueError, "shape [2] and strides [2]; expected"),
        )
    ),
    ("adam_step", argument("step_tensor", torch.tensor(-1.0)), ValueError, "step=0 must be at"),
    *(
        (
            name,
            argument("control", fixed_step.new_control(CPU)),
            ValueError,
            "grad_prev is missing: with control it must outlive a gradient that is refused",
        )
        for name in ("lbfgs_update", "lbfgs_direction")
    ),
    (
        "adam_step",
        argument("found_inf", torch.zeros(2)),
        RuntimeError,
        "a Tensor with 2 elements cannot be converted to Scalar",
    ),
    (
        "adam_step",
        argument("grad_scale", torch.ones(2)),
        RuntimeError,
        "a Tensor with 2 elements cannot be converted to Scalar",
    ),
    (
        "grad_stats",
        argument("scalars", None),
        ValueError,
        "history and scalars must be given together",
    ),
    (
        "grad_stats",
        argument("history", None),
        ValueError,
        "history and scalars must be given together",
    ),
    *(
        (name, argument("weight_decay", [0.1]), ValueError, "weight_decay has 1 entries for 2")
        for name in ("grad_stats", "lbfgs_update", "lbfgs_direction", "lbfgs_set_out")
    ),
    *(
        (name, argument("lr_scale", [1.0] * 3), ValueError, "lr_scale has 3 entries for 2")
        for name in ("lbfgs_direction", "lbfgs_set_out")
    ),
    *(
        (name, argument("history", to), TypeError, "grad_prev is missing")
        for name in ("lbfgs_update", "lbfgs_direction", "lbfgs_set_out")
        for to in (Tensor.bfloat16, Tensor.half)
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    BAD_EITHER,
    ids=[f"{i}-{name}: {message}" for i, (name, _, _, message) in enumerate(BAD_EITHER)],
)
def test_bad_options(
    backend: str,
    name: str,
    change: Callable[[Arguments], None],
    kind: type[Exception],
    message: str,
) -> None:
    arguments = good(name)
    change(arguments)
    check_refused(backend, name, arguments, kind, message)


@pytest.mark.parametrize("name", ops.NAMES)
def test_good_arguments_are_good(name: str) -> None:
    getattr(BACKENDS["native"], name)(**good(name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_stats_of_float64_need_no_state(backend: str) -> None:
    tensors = make_tensors([1000], (F64,))
    arguments = stats_arguments(tensors, decay=[2.0])
    BACKENDS[backend].grad_stats(**arguments)
    g = tensors.grads[0] + 2.0 * tensors.params[0]
    assert float(arguments["stats"][1]) == pytest.approx(float(g @ g), rel=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_float64_gradients_of_narrower_parameters(backend: str, dtype: torch.dtype) -> None:
    """They are rounded to the state's dtype: that loses no digit of the parameter."""
    tensors = make_tensors([100], (dtype,), (F64,))
    rounded = make_tensors([100], (dtype,), (F32,))
    rounded.params[0].copy_(tensors.params[0])
    rounded.grads[0].copy_(tensors.grads[0])
    arguments = adam_arguments(tensors)
    again = adam_arguments(rounded)
    again |= {k: arguments[k].clone() for k in ("exp_avg", "exp_avg_sq")}
    BACKENDS[backend].adam_step(**arguments)
    BACKENDS[backend].adam_step(**again)
    torch.testing.assert_close(tensors.params, rounded.params, rtol=0, atol=0)


@pytest.mark.parametrize("name", LISTS)
def test_tensors_on_several_devices(name: str) -> None:
    """The dispatcher sends such a call to the other device's kernels; plain PyTorch refuses it."""
    arguments = good(name)
    which = "grads" if name in WITH_GRADS else "params"
    entry(which, lambda t: t.to("meta"))(arguments)
    with pytest.raises(ValueError, match=rf"{which}\[1\] is on meta but params\[0\] is on cpu"):
        getattr(BACKENDS["reference"], name)(**arguments)
