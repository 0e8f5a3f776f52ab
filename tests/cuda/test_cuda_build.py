"""The compiled CUDA kernels: all there, registered, and made of the instructions they should be."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import cuda_static
import pytest
import torch

from fuse_ext import _C
from fuse_ext.kernels import ops

gpu_model = pytest.importorskip("benchmarks.harness.gpu_model")

CUDA_BUILD = bool(_C.build_info()["cuda"])
needs_cuda_build = pytest.mark.skipif(
    not CUDA_BUILD,
    reason="this extension has no CUDA kernels; build it with FUSE_EXT_CUDA=1 and a CUDA torch",
)
needs_cuobjdump = pytest.mark.skipif(
    bool(cuda_static.why_not()), reason=cuda_static.why_not() or "can be checked"
)


@cache
def kernels(architecture: str) -> dict[str, cuda_static.Kernel]:
    return cuda_static.kernels(architecture)


@needs_cuda_build
@pytest.mark.parametrize("name", ops.NAMES)
def test_every_op_has_a_cuda_kernel(name: str) -> None:
    lines = torch._C._dispatch_dump(f"fuse_ext::{name}").splitlines()
    registered = {line.partition(":")[0] for line in lines if "registered at" in line}
    assert {"CPU", "CUDA", "SparseCUDA", "SparseCsrCUDA"} <= registered


@needs_cuda_build
def test_has_kernels_says_so() -> None:
    assert ops.has_kernels("cuda")


@needs_cuobjdump
def test_every_architecture_asked_for_is_in_the_extension() -> None:
    asked = re.findall(r"(\d+)\.(\d+[af]?)", _C.build_info()["cuda_archs"])
    assert {f"sm_{major}{minor}" for major, minor in asked} <= set(cuda_static.architectures())


@needs_cuobjdump
def test_no_kernel_spills_or_keeps_arrays_in_memory() -> None:
    for architecture in cuda_static.architectures():
        for kernel in kernels(architecture).values():
            where = f"{kernel.name} on {architecture}"
            assert kernel.registers > 0, where
            assert (kernel.stack, kernel.local, kernel.local_accesses) == (0, 0, 0), where


@needs_cuobjdump
def test_streaming_kernels_know_that_memory_is_global() -> None:
    for architecture in cuda_static.architectures():
        for kernel in kernels(architecture).values():
            assert kernel.generic == 0, f"{kernel.name} on {architecture}: {kernel.instructions}"


# 128-bit accesses that the main loop of a kernel on float32 (or narrower rows) must have.
WIDE = {
    "adam<float, f32, no>": (4, 3),  # grad, param, two moments; all but grad
    "adam<float, f32, yes>": (5, 4),
    "adam<float, bf16, no>": (2, 1),  # grad, param; the moments move as 64 bits
    "adam<float, bf16, yes>": (2, 1),
    # Per 16 elements: 4 loads each of grad, previous gradient, p, S and Y; y.
    "update<float, f32>": (20, 4),
    "update<float, bf16>": (18, 2),  # and two pairs' S and Y
    "direction<float, f32>": (12, 8),  # grad, S and Y; p and previous gradient
    "direction<float, bf16>": (12, 6),
    # Per 16 elements: four packs of each vector at once.
    "stats<float>": (8, 0),  # grad, direction
    "move<float>": (8, 4),  # origin, direction; param
    "blend<float>": (12, 4),  # param, origin, direction; param
    "copy<float, yes>": (4, 4),
    "copy<float, no>": (4, 4),
    # Eight tiles at a time; the terms' vectors s and w, and the tiles.
    "dense_product<float>": (8, 0),
    "dense_take_in<float>": (24, 8),
}


@needs_cuobjdump
@pytest.mark.parametrize("name", WIDE)
def test_whole_packs_move_as_128_bits(name: str) -> None:
    loads, stores = WIDE[name]
    for architecture in cuda_static.architectures():
        kernel = kernels(architecture)[name]
        assert kernel.wide_loads >= loads, f"{architecture}: {kernel.instructions}"
        assert kernel.wide_stores >= stores, f"{architecture}: {kernel.instructions}"


@needs_cuobjdump
def test_8_bit_rows_move_as_64_bits() -> None:
    for architecture in cuda_static.architectures():
        for name in ("update<float, i8>", "direction<float, i8>"):
            # Two pairs at once, two packs of each row.
            assert kernels(architecture)[name].count(r"LDG\.E\.64(\..*)?") >= 8, architecture


@needs_cuobjdump
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_model_knows_the_machine_code(architecture: str) -> None:
    """Registers and instructions, within a tenth: compilers differ."""
    if architecture not in cuda_static.architectures():
        pytest.skip(f"the extension has no code for {architecture}")
    for name, modelled in gpu_model.KERNELS.items():
        kernel = kernels(architecture)[name]
        found = cuda_static.slots_of_round(kernel, gpu_model.ACCESSES[name])
        assert kernel.registers == pytest.approx(modelled.registers[architecture], rel=0.1), name
        assert found == pytest.approx(modelled.slots[architecture], rel=0.1), name


@needs_cuobjdump
def test_no_kernel_on_vectors_divides_by_a_number_that_it_is_told() -> None:
    """A remainder of 64 bits is a subroutine, or some sixty instructions with a reciprocal."""
    for architecture in cuda_static.architectures():
        for name in ("copy<float, yes>", "copy<float, no>", "move<float>"):
            assert kernels(architecture)[name].count(r"MUFU\.RCP.*|I2F\.U64.*") == 0, name


# Accesses of 32 bits for an element of float32, where a tensor's place and address disagree.
ONE_BY_ONE = {
    "adam<float, f32, no>": 7,
    "stats<float>": 1,  # of the gradient; 2 with a direction
    "move<float>": 3,
    "copy<float, yes>": 2,
    "copy<float, no>": 2,
}


@needs_cuobjdump
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_light_kernels_go_from_element_to_element_without_the_table(name: str) -> None:
    """There is a loop over elements that reads and writes these and nothing else."""
    for architecture in cuda_static.architectures():
        kernel = kernels(architecture)[name]
        assert cuda_static.slots_of_round(kernel, (0, 0, ONE_BY_ONE[name], 0)) < 250, architecture


@needs_cuobjdump
@pytest.mark.parametrize("name", [*WIDE, "update<float, i8>", "direction<float, i8>"])
def test_no_loop_divides_integers_of_64_bits_by_a_number_that_it_is_told(name: str) -> None:
    """Adam and Fuse divide numbers, and a block its share of the pairs, once."""
    if name.startswith("dense"):
        pytest.skip("a square of tiles is found by one")
    for architecture in cuda_static.architectures():
        kernel = kernels(architecture)[name]
        assert cuda_static.in_loops(kernel, r"I2F\.U64.*") == [], architecture


def test_what_is_in_a_loop_is_told() -> None:
    """Before a loop, in it, behind it, and in a subroutine that it calls; and in one that it does
    not."""
    code = [
        (0x00, False, "I2F.U64.RP", " R0, R2"),
        (0x10, False, "I2F.U64", " R0, R2"),
        (0x20, False, "CALL.REL.NOINC", " 0x70"),
        (0x30, True, "BRA", " 0x10"),
        (0x40, False, "I2F.U64.RZ", " R0, R2"),
        (0x50, False, "CALL.REL.NOINC", " 0x90"),
        (0x60, False, "EXIT", " "),
        (0x70, False, "I2F.U64.RM", " R0, R2"),
        (0x80, False, "RET.REL.NODEC", " R2 0x0"),
        (0x90, False, "I2F.U64.RN", " R0, R2"),
        (0xA0, False, "RET.REL.NODEC", " R2 0x0"),
    ]
    kernel = cuda_static.Kernel("made up", code=code)
    assert cuda_static.in_loops(kernel, r"I2F.*") == ["I2F.U64", "I2F.U64.RM"]


@needs_cuobjdump
def test_the_documented_registers_are_those_of_the_machine_code() -> None:
    """Within a tenth, and accesses by two: compilers differ."""
    text = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| (\d+, \d+, \d+ \|.*) \|$", text, re.MULTILINE))
    head = re.search(r"^\| kernel \| (sm_\d+: registers.*) \|$", text, re.MULTILINE)
    assert head is not None
    for i, named in enumerate(re.findall(r"sm_\d+", head[1])):
        if named not in cuda_static.architectures():
            continue
        found = {n: k for n, k in kernels(named).items() if "<double" not in n}
        assert set(rows) == set(found), named
        for name, kernel in found.items():
            registers, loads, stores = map(int, rows[name].split(" | ")[i].split(", "))
            where = f"{name} on {named}: write python tests/cuda/cuda_static.py into docs/cuda.md"
            assert kernel.registers == pytest.approx(registers, rel=0.1), where
            assert kernel.wide_loads == pytest.approx(loads, abs=2), where
            assert kernel.wide_stores == pytest.approx(stores, abs=2), where
        most = max(k.registers for n, k in kernels(named).items() if "<double" in n)
        told = re.search(r"on float64 arithmetic take up to (\d+) registers", text)
        assert told is not None and most <= 1.1 * int(told[1]), named
