"""The model of benchmarks.scaling: its arithmetic against figures worked out by hand."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import scaling
from benchmarks.harness import scaling_model as model
from benchmarks.harness.rounds import Spread
from benchmarks.harness.scaling_model import Cluster


def test_kernels_take_their_bytes_over_the_bandwidth_and_what_is_fixed():
    assert model.kernel_seconds(28, 1_100, 1e6, 2.0, 100) == pytest.approx(2.0 + 0.028)
    # Two sides of 8: to the basis, back, and covariances every other time; a shard has one side.
    assert model.basis_flops(8, 1) == 2 * (2 + 2 + 1) * 8
    assert model.basis_flops(8, 2) == (2 + 2 + 1) * 4


def test_latency_and_bandwidth_are_those_of_the_two_calls():
    alpha, beta = model.alpha_beta({8: 10e-6 + 8e-9, 1_000_008: 10e-6 + 1e-9 * 1_000_008})
    assert alpha == pytest.approx(10e-6) and beta == pytest.approx(1e-9)
    assert model.send_seconds(4, 1_000, alpha, beta) == pytest.approx(41e-6)
    # A larger call that was no slower is no negative time.
    assert model.alpha_beta({8: 2e-6, 1_000: 1e-6}) == (2e-6, 0.0)


def test_bytes_grow_with_a_place_for_each_rank():
    def numbers(ranks):
        return 8.0 * (6 + 3 * ranks)

    at = {ranks: numbers(ranks) for ranks in (2, 4)}
    assert model.extrapolated(at, 1024) == numbers(1024)


def test_a_tree_goes_up_and_down_through_nodes():
    cluster = Cluster(64, 8, base=1.0, nvlink=0.5, net=2.0, tree=20.0, bus=16.0)
    # 7 hops in the node and 3 levels of 8 nodes, each twice.
    assert cluster.all_reduce(0.0) == 1.0 + 2 * (7 * 0.5 + 3 * 2.0)
    assert cluster.all_reduce(30.0) == cluster.all_reduce(0.0) + 3.0
    assert Cluster(4, 8, base=1.0, nvlink=0.5, net=2.0).all_reduce(0.0) == 1.0 + 2 * 1.5
    assert cluster.all_gather(64.0) == 63 / 64 * 4.0


def test_the_large_model_is_llama():
    assert model.numel_of() == pytest.approx(70.55e9, rel=1e-3)
    # A shard of one row has no basis, nor has a matrix with a side of 28,672.
    assert model.with_bases(1024) == 160 + 160 + 2
    assert model.with_bases(1024, ((8192, 28672, 1), (1024, 8192, 1))) == 0
    # 5 times X X', A A and B X of a 2 x 3 matrix.
    assert model.newton_schulz_flops(3, 2) == 5 * (2 * 12 + 2 * 8 + 2 * 12)


def test_what_is_left_to_each_gpu():
    cluster = Cluster()
    numel = model.numel_of()
    share = -(-numel // 1024)
    adamw = model.adamw(numel, cluster)
    assert adamw.state == 8 * share and adamw.collectives == 0.0
    # Its vectors cannot pass through the memory faster.
    assert adamw.kernels >= 28 * share / 3.0e12
    ours = model.ours("L-BFGS, float32 rows", numel, 88.0, 4.0, 32_000.0, 0.0, cluster)
    assert ours.collectives == pytest.approx(4 * cluster.all_reduce(8_000.0))
    assert ours.state == 88.0 * share and ours.kernels >= 208 * share / 3.0e12
    more = model.ours("L-BFGS, float32 rows", numel, 88.0, 4.0, 32_000.0, 100.0, cluster)
    assert more.kernels > ours.kernels
    whole = model.torch_lbfgs(numel, 88.0, 4.0, 4.0, cluster)
    assert whole.state == 88.0 * numel and "cannot run: 78 times" in whole.note
    assert model.muon(numel, 30.0, 16.0, cluster).collectives > 5.0
    least = model.muon_at_best(numel, cluster)
    assert least.collectives == pytest.approx(4.0 * numel / 1024 / 45e9)


def cell(name, cpu, wall, calls):
    own = {"cpu": [cpu, 2 * cpu], "wall": [wall, wall], "calls": calls, "bytes": 96.0}
    own |= {"collective_seconds": 1.0, "ops": 4.0, "state_bytes": 8}
    return {
        "numel": 512,
        "optimizers": {name: own},
        "failed": {},
        "bandwidth": {"read": 2.0, "update": 3.0},
        "flops": 1.0,
        "all_reduce": {"8": 1.0, "1048576": 2.0},
    }


def test_the_slowest_rank_counts_in_every_round():
    ranks = [cell("x", 1.0, 5.0, 1.0), cell("x", 3.0, 4.0, 1.0)]
    found = scaling.gather(ranks, 16)["optimizers"]["x"]
    assert found["cpu"].values == (3.0, 6.0) and found["wall"].values == (5.0, 5.0)
    assert isinstance(found["cpu"], Spread)


def test_a_peer_that_is_faster_is_named():
    name = "FusePV, Adam phase"
    of = cell(name, 3.0, 6.0, 1.0)
    of["optimizers"][scaling.ADAMW] = cell(name, 1.0, 2.0, 0.0)["optimizers"][name]
    found = {(1024, 1): scaling.gather([of], 16)}
    (line, *_) = scaling.slower(found, {scaling.ADAMW: model.adamw(10**9, Cluster())})
    assert f"{name} 3.00 (3.00)" in line
