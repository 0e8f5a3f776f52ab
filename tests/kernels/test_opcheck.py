"""The ops as they are registered: true schemas, fakes, version counters, and the choice of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import BACKENDS, Watch, clone_arguments, every_op, same_bits, tensors_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fuse_ext.kernels import ops

OPS = {name: getattr(torch.ops.fuse_ext, name).default for name in ops.NAMES}
KINDS = {
    "plain": (False, False, False),
    "awkward": (True, False, False),
    "int8": (True, True, False),
    "decided": (True, False, True),
    "narrow": (True, False, True, True),
}
WITH_CONTROL = ("adam_step", "lbfgs_update", "lbfgs_direction", "lbfgs_move")
WITH_HISTORY = ("grad_stats", "lbfgs_update", "lbfgs_direction", "lbfgs_move", "fuse_blend")
ONLY = {"int8": WITH_HISTORY, "decided": WITH_CONTROL, "narrow": ("adam_step",)}
CASES = [(name, kind) for name in ops.NAMES for kind in KINDS if name in ONLY.get(kind, ops.NAMES)]
each_case = pytest.mark.parametrize(("name", "kind"), CASES)


def arguments_of(name: str, kind: str) -> dict[str, Any]:
    return every_op(*KINDS[kind])[name]


def as_called(name: str, arguments: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments split as the schema has them: positional and keyword-only."""
    schema = OPS[name]._schema.arguments
    assert {argument.name for argument in schema} == set(arguments)
    args = [arguments[argument.name] for argument in schema if not argument.kwarg_only]
    kwargs = {a.name: arguments[a.name] for a in schema if a.kwarg_only}
    return args, kwargs


def declared_mutated(name: str, arguments: dict[str, Any]) -> set[str]:
    """Names of the tensors that the schema marks as written."""
    written = {
        argument.name
        for argument in OPS[name]._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    return {key for key in tensors_of(arguments) if key.split("[")[0] in written}


def test_every_registered_op_is_named() -> None:
    registered = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fuse_ext::")
    }
    assert registered == set(ops.NAMES)
    assert ops.has_kernels("cpu")


@each_case
def test_opcheck(name: str, kind: str) -> None:
    args, kwargs = as_called(name, arguments_of(name, kind))
    results = torch.library.opcheck(OPS[name], args, kwargs)
    assert set(results.values()) == {"SUCCESS"}, results


@each_case
def test_fake_is_registered(name: str, kind: str) -> None:
    arguments = arguments_of(name, kind)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        assert OPS[name](**fakes) is None


@pytest.mark.parametrize("backend", BACKENDS)
@each_case
def test_only_what_the_schema_says_changes(name: str, kind: str, backend: str) -> None:
    arguments = arguments_of(name, kind)
    watch = Watch(arguments)
    assert getattr(BACKENDS[backend], name)(**arguments) is None
    declared = declared_mutated(name, arguments)
    # A zero-element tensor has nothing to change, and some arguments change in some cases only.
    optional = {"grad_prev", "history_scale"} | {
        k for k, t in tensors_of(arguments).items() if t.numel() == 0
    }
    if name == "lbfgs_move" and kind == "plain":
        optional.add("origin")  # save=False
    assert declared - optional <= watch.changed() <= declared
    # deterministic=True recognises by the counters that nobody else moved the parameters.
    assert watch.changed() <= watch.bumped() <= declared


@pytest.mark.parametrize("backend", BACKENDS)
def test_saving_the_origin_leaves_parameters_and_counters(backend: str) -> None:
    arguments = every_op(True)["lbfgs_move"] | {"step": 0.0, "save": True}
    watch = Watch(arguments)
    BACKENDS[backend].lbfgs_move(**arguments)
    assert watch.changed() == watch.bumped() == {"origin"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_adam_step_changes_nothing(backend: str) -> None:
    arguments = every_op(True)["adam_step"] | {"found_inf": torch.tensor(1.0)}
    watch = Watch(arguments)
    BACKENDS[backend].adam_step(**arguments)
    assert watch.changed() == watch.bumped() == set()


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] != "int8"])
def test_backends_agree(name: str, kind: str) -> None:
    """A smoke test; test_ops_*.py compare within bounds on the rounding errors."""
    inputs, results = arguments_of(name, kind), []
    for backend in BACKENDS.values():
        arguments = clone_arguments(inputs)
        getattr(backend, name)(**arguments)
        results.append(tensors_of(arguments))
    for key, ours in results[0].items():
        tolerance = torch.finfo(ours.dtype).eps if ours.element_size() < 8 else 1e-6
        torch.testing.assert_close(ours, results[1][key], rtol=2 * tolerance, atol=4e-6, msg=key)


@each_case
def test_calls_repeat_bit_for_bit(name: str, kind: str) -> None:
    arguments = arguments_of(name, kind)
    again = clone_arguments(arguments)
    OPS[name](**arguments)
    OPS[name](**again)
    for key, tensor in tensors_of(arguments).items():
        assert same_bits(tensor, tensors_of(again)[key]), key


def test_select() -> None:
    assert ops.select("auto", torch.device("cpu")) is BACKENDS["native"]
    assert ops.select("auto", torch.device("meta")) is BACKENDS["reference"]
    assert ops.select("reference", torch.device("cpu")) is BACKENDS["reference"]
    with pytest.raises(ValueError, match="backend must be one of auto, native, reference, got 'c'"):
        ops.select("c", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="backend='native' has no kernels for device meta"):
        ops.select("native", torch.device("meta"))


def test_scalars_live_beside_what_reads_them() -> None:
    meta = torch.device("meta")
    assert ops.scalars_device(BACKENDS["native"], meta) == meta
    assert ops.scalars_device(BACKENDS["reference"], meta) == torch.device("cpu")


@pytest.mark.parametrize("numel", [0, 1, 3 * 2**20])
def test_large_pages_are_advice_only(numel: int) -> None:
    tensor = torch.arange(numel, dtype=torch.float32)
    expected = tensor.clone()
    ops.advise_large_pages(tensor)
    ops.advise_large_pages(torch.empty(numel, device="meta"))
    assert torch.equal(tensor, expected)
