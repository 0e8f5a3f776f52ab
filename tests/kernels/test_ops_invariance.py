"""Results depend neither on the number of threads, nor on how the vector is cut into tensors,
nor (beyond the order of summation) on the instruction set.

Run as a program, this file saves the results at the instruction-set level of the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_cases import (
    BF16,
    F16,
    F32,
    F64,
    NATIVE,
    Tensors,
    Watch,
    adam_arguments,
    assert_stored,
    clone_arguments,
    copy_arguments,
    direction_arguments,
    every_op,
    make_ring,
    make_tensors,
    point_arguments,
    same_bits,
    set_out_arguments,
    split,
    stats_arguments,
    unit_roundoff,
    update_arguments,
)
from torch import Tensor

import fuse_ext
from fuse_ext.kernels import ops

SCALARS_ALONE = ("lbfgs_two_loop", "lbfgs_decide")
NUMEL = 150_001  # several chunks, the last one odd, and work for three threads in every op
Results = dict[str, dict[str, Tensor]]


def cut(tensor: Tensor, sizes: list[int]) -> Tensors:
    """The tensor twice, as parameters and gradients of these sizes."""
    made = make_tensors(sizes, (tensor.dtype,))
    made.params = [t.clone() for t in tensor.split(sizes)]
    made.grads = [t.clone() for t in tensor.flip(0).split(sizes)]
    return made


def run_every_op(state: torch.dtype, row: torch.dtype, param: torch.dtype, pieces: int) -> Results:
    """Results of every op on the same numbers, whatever the number of pieces."""
    torch.manual_seed(7)
    values, flat = torch.randn(NUMEL, dtype=F64).to(param), torch.randn(NUMEL, dtype=F64).to(state)
    made = make_ring(NUMEL, 6, 2, 6, row, state)
    for name in ("coef_s", "coef_y", "coef_g"):
        made.array(name).copy_(torch.randn_like(made.array(name)))
    adam = adam_arguments(cut(values, [NUMEL]), state, amsgrad=True, weight_decay=0.1)
    torch.manual_seed(pieces)
    sizes = split(NUMEL, pieces)
    decay, lr_scale = [0.5] * len(sizes), [2.0] * len(sizes)
    results = {}

    def run(name: str, arguments: dict[str, object]) -> None:
        arguments = clone_arguments(arguments)
        getattr(NATIVE, name)(**arguments)
        results[name] = {
            key: torch.cat([t.view(-1) for t in value]) if isinstance(value, list) else value
            for key, value in arguments.items()
            if key in ("params", "grads") or isinstance(value, Tensor)
        }

    tensors = cut(values, sizes)
    adam |= {"params": tensors.params, "grads": tensors.grads, "offsets": tensors.offsets}
    point = point_arguments(tensors, made, flat)
    run("adam_step", adam)
    run("grad_stats", stats_arguments(tensors, made, decay))
    run("lbfgs_update", update_arguments(tensors, made, True, decay))
    run("lbfgs_direction", direction_arguments(tensors, made, decay, lr_scale))
    run("lbfgs_set_out", set_out_arguments(tensors, made, flat, decay, lr_scale))
    run("lbfgs_move", point | {"step": 0.5, "save": True})
    run("fuse_blend", point | {"theta": 0.25, "step": 0.5})
    run("grad_gather", copy_arguments(tensors, flat))
    run("grad_scatter", copy_arguments(tensors, flat))
    return results


KINDS = {
    "float32": (F32, F32, F32),
    "float64": (F64, F64, F64),
    "bfloat16 rows and parameters": (F32, BF16, BF16),
    "float16 rows and parameters": (F64, F16, F16),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def differences(a: Results, b: Results) -> set[str]:
    return {
        f"{name}.{key}"
        for name in a
        for key in a[name]
        if not same_bits(a[name][key], b[name][key])
    }


@each_kind
def test_threads(kind: str) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_every_op(*KINDS[kind], 30))
    assert differences(results[0], results[1]) == set()
    assert differences(results[0], results[2]) == set()


@each_kind
def test_cuts(kind: str) -> None:
    """One tensor or 300: blocks are put together first, so that even the sums are the same.

    Only sums that are taken tensor by tensor may differ in their last digits: Adam's sum of
    squares, the penalty and the square of the step taken.
    """
    state, _, param = KINDS[kind]
    whole, pieces = (run_every_op(*KINDS[kind], n) for n in (1, 300))
    expected = {"adam_step.stats", "grad_stats.stats", "fuse_blend.scalars"}
    assert differences(whole, pieces) <= expected
    for name in expected:
        op, key = name.split(".")
        u = roundoff_of_sums(op, state, param)
        torch.testing.assert_close(
            whole[op][key], pieces[op][key], rtol=32 * u, atol=0, equal_nan=True
        )
    a, b = (r["grad_stats"]["stats"] for r in (whole, pieces))
    penalty = torch.arange(5) == 3
    assert same_bits(a[~penalty], b[~penalty])


def roundoff_of_sums(op: str, state: torch.dtype, param: torch.dtype) -> float:
    """grad_stats knows no state: it adds in float32 unless a tensor has float64."""
    return unit_roundoff(param if param == F64 else F32 if op == "grad_stats" else state)


def run_at_level(level: str, *arguments: str) -> str:
    """What this file prints as a program under that level."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ
        | {
            "FUSE_EXT_CPU_LEVEL": level,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unknown_level() -> list[str]:
    """One line for each op that was called under a level that does not exist."""
    return run_at_level("avx1024", "--errors").splitlines()


def test_an_unknown_level_is_refused_before_anything_changes(unknown_level: list[str]) -> None:
    assert [line.partition(": ")[0] for line in unknown_level] == [
        name for name in ops.NAMES if name not in SCALARS_ALONE
    ]
    for line in unknown_level:
        assert "FUSE_EXT_CPU_LEVEL=avx1024 is not available here; this CPU runs: default" in line


def test_levels(unknown_level: list[str], tmp_path: Path) -> None:
    levels = unknown_level[0].partition("this CPU runs: ")[2].split(", ")
    here = fuse_ext.build_info()["cpu_level"]
    assert here == (os.environ.get("FUSE_EXT_CPU_LEVEL") or levels[-1])
    ours = {kind: run_every_op(*KINDS[kind], 30) for kind in KINDS}
    for level in levels:
        if level == here:
            continue
        path = tmp_path / level
        assert run_at_level(level, str(path)).strip() == level
        theirs = torch.load(path)
        for kind in KINDS:
            check_levels_agree(ours[kind], theirs[kind], *KINDS[kind])


def check_levels_agree(
    a: Results, b: Results, state: torch.dtype, row: torch.dtype, param: torch.dtype
) -> None:
    """Elementwise results have equal bits: nothing is contracted. Sums have their own order."""
    sums = {"adam_step.stats", "grad_stats.stats"}
    sum_ops = ("lbfgs_update", "lbfgs_direction", "lbfgs_set_out", "fuse_blend")
    sums |= {f"{name}.scalars" for name in sum_ops}
    different = differences(a, b) - sums
    # p is a sum over the rows; how they are grouped may depend on the registers.
    allowed = {"lbfgs_direction.history", "lbfgs_set_out.history", "lbfgs_set_out.params"}
    assert different <= allowed, different
    for name in ("lbfgs_direction", "lbfgs_set_out"):
        p, q = (r[name]["history"][0, 2] for r in (a, b))
        size = q.to(F64).abs()
        error = 64 * unit_roundoff(state) * size.max() + 2 * unit_roundoff(row) * size
        assert_stored(p, q.to(F64), error)
    x, y = (r["lbfgs_set_out"]["params"] for r in (a, b))
    assert_stored(x, y.to(F64), error + 2 * unit_roundoff(param) * y.to(F64).abs())
    for name in sums:
        op, key = name.split(".")
        u = 32 * roundoff_of_sums(op, state, param)
        torch.testing.assert_close(a[op][key], b[op][key], rtol=u, atol=u * NUMEL, equal_nan=True)


def main() -> None:
    if sys.argv[1] == "--errors":
        for name, arguments in every_op(True).items():
            if name in SCALARS_ALONE:
                continue  # the same code at every level
            watch = Watch(arguments)
            try:
                getattr(NATIVE, name)(**arguments)
            except RuntimeError as error:
                assert watch.changed() == watch.bumped() == set(), name
                print(f"{name}: {str(error).splitlines()[0]}")
        return
    torch.save({kind: run_every_op(*KINDS[kind], 30) for kind in KINDS}, sys.argv[1])
    print(fuse_ext.build_info()["cpu_level"])


if __name__ == "__main__":
    main()
