"""How long a step takes on W ranks: a model, checked where it can be, predictions where not.

- What a rank computes: what a step costs however small the problem is, and its bytes over a
  bandwidth. In the living metric also products of matrices, at the rate of such a product.
- What ranks send: alpha + beta n for each call of n bytes. Here both are measured with all-reduces
  of two sizes. On GPUs they are NCCL's own model of a double binary tree (Sanders, Speck and Traeff
  2009), LL protocol, in src/graph/tuning.cc of NCCL 2.20.3:

      base + 2 ((g - 1) nvlink + log2(W / g) net) + n / (b / 2),

  g being the GPUs of a node: up the tree and down again, through the chain in a node and a tree of
  nodes. A ring all-gather of n bytes in all takes (W - 1)/W n / B (Thakur, Rabenseifner and Gropp,
  IJHPCA 2005), B being NCCL's "bus bandwidth".

The model sees no jitter: on many ranks every call waits for the slowest of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2
from typing import Any

import torch

from benchmarks import cuda_model
from benchmarks.harness.gpu_model import H100, LAUNCH, WAIT
from benchmarks.harness.scaling_ranks import PAIRS
from fuse_ext.phase.living.metric.kronecker import FACTOR_EVERY, REFRESH
from fuse_ext.phase.living.metric.sides import form_of

# Bytes a parameter and which bandwidth a step goes by; what docs/cuda.md counts on a device holds
# here too, the passes being the same.
BYTES: dict[str, tuple[float, str]] = {
    "torch.optim.AdamW(fused=True)": (28, "update"),
    "FusePV, Adam phase": (32, "update"),
    "living metric, diagonal": (32, "update"),
    "L-BFGS, float32 rows": (4 + cuda_model.iteration_bytes(PAIRS), "read"),
    "L-BFGS, bfloat16 rows": (4 + cuda_model.iteration_bytes(PAIRS, "bfloat16"), "read"),
    "L-BFGS, int8 rows": (4 + cuda_model.iteration_bytes(PAIRS, "int8"), "read"),
}
# The row of docs/cuda.md for each, where there is one.
COUNTED = {
    "FusePV, Adam phase": "FusePV, Adam phase",
    "living metric, diagonal": "living metric, diagonal",
    "living metric": "living metric",
    "L-BFGS, float32 rows": "fixed step",
}


# --- here -----------------------------------------------------------------------------------


def kernel_seconds(
    nbytes: float, numel: int, bandwidth: float, fixed: float, fixed_numel: int = 0
) -> float:
    """What a rank computes.

    Args:
        nbytes: Moved for a parameter.
        numel: Parameters of the rank.
        bandwidth: Bytes a second.
        fixed: Seconds of a step on ``fixed_numel`` parameters.
        fixed_numel: So few that their bytes do not count.
    """
    return fixed + nbytes * (numel - fixed_numel) / bandwidth


def basis_flops(side: int, ranks: int) -> float:
    """Of a step in the living metric, for each element of a square matrix spread over ranks.

    To the basis and back, 4 a flops a side of length a, and covariances in every second step, 2 a;
    renewals are left out. A shard has a basis of its shorter side alone.
    """
    each = 4.0 + 2.0 / FACTOR_EVERY
    return 2 * each * side if ranks == 1 else each * (side // ranks)


def send_seconds(calls: float, nbytes: float, alpha: float, beta: float) -> float:
    """What calls of so many bytes together take."""
    return calls * alpha + nbytes * beta


def alpha_beta(measured: dict[int, float]) -> tuple[float, float]:
    """Latency, and seconds a byte, of two sizes and their seconds."""
    (small, first), (large, last) = sorted(measured.items())
    beta = max(0.0, (last - first) / (large - small))
    return first - beta * small, beta


def extrapolated(at: dict[int, float], ranks: int) -> float:
    """What is linear in the number of ranks, from two of them: sums and a place for each rank."""
    (few, first), (more, last) = sorted(at.items())
    return first + (last - first) / (more - few) * (ranks - few)


# --- a cluster ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes, as NCCL's model sees them; times in seconds, rates in bytes a second.

    Attributes:
        ranks: GPUs.
        a_node: Of them in one node.
        base, nvlink, net: Latency of a tree of protocol LL: of a call, of a hop in a node, and of
            one between nodes (baseLat and hwLat of tuning.cc).
        tree: Bandwidth of that tree between more than two nodes (llMaxBws, AMD host), before the
            half that goes up and down.
        bus: Bus bandwidth of a ring: 8 adapters of 400 Gb/s a node (DGX H100 data sheet), of which
            0.9 is assumed to be reached.
        flops: Of bfloat16 products: 989e12 by the data sheet of the H100 SXM, of which 0.6 is
            assumed.
        memory: Of a GPU, in bytes.
    """

    ranks: int = 1024
    a_node: int = 8
    base: float = 6.8e-6
    nvlink: float = 0.6e-6
    net: float = 5.0e-6
    tree: float = 19e9
    bus: float = 0.9 * 8 * 50e9
    flops: float = 0.6 * 989e12
    memory: float = 80e9

    def all_reduce(self, nbytes: float) -> float:
        """Seconds of an all-reduce that is small."""
        inside = min(self.a_node, self.ranks)
        hops = (inside - 1) * self.nvlink + log2(self.ranks / inside) * self.net
        return self.base + 2 * hops + nbytes / (self.tree / 2)

    def all_gather(self, nbytes: float) -> float:
        """Seconds in which everyone gets all of so many bytes; for large ones, latency left out."""
        return (self.ranks - 1) / self.ranks * nbytes / self.bus


# Llama 3 70B (Llama Team, arXiv:2407.21783, table 3), by its weights: (rows, columns, how many).
LLAMA_70B = (
    (8192, 8192, 160),  # queries, outputs
    (1024, 8192, 160),  # keys, values
    (28672, 8192, 160),  # gate, up
    (8192, 28672, 80),  # down
    (128256, 8192, 2),  # embedding, head
)


def numel_of(weights: tuple[tuple[int, int, int], ...] = LLAMA_70B) -> int:
    """Parameters."""
    return sum(rows * columns * count for rows, columns, count in weights)


def with_bases(ranks: int, weights: tuple[tuple[int, int, int], ...] = LLAMA_70B) -> int:
    """Matrices whose shards have a basis, by the rule of the living metric on a GPU."""
    cuda = torch.device("cuda")
    found = 0
    for rows, columns, count in weights:
        here = -(-rows // ranks)
        shard = torch.empty(here, columns, device="meta")
        sides = form_of(shard, False, False, True, cuda, divides=False).sides
        shorter = (here <= columns, columns <= here)
        found += count * any(a and b for a, b in zip(sides, shorter, strict=True))
    return found


def newton_schulz_flops(rows: int, columns: int, steps: int = 5) -> float:
    """Of Muon's iteration: A = X X', B = b A + c A A, X = a X + B X, on the shorter side."""
    short, long = sorted((rows, columns))
    return steps * (4.0 * short * short * long + 2.0 * short**3)


@dataclass(frozen=True)
class Prediction:
    """Of one step.

    Attributes:
        kernels, collectives: Seconds.
        state: Bytes on a rank.
        calls, sent: Collective calls, and the bytes of the vectors that they add up or gather.
        note: What else there is to say.
    """

    kernels: float
    collectives: float
    state: float
    calls: float
    sent: float
    note: str = ""

    @property
    def seconds(self) -> float:
        """Both."""
        return self.kernels + self.collectives


def living_bytes() -> float:
    """Bytes a parameter of a step in the living metric, the mean of ten."""
    return _living_cost(0).bytes


def _living_cost(matrices: int) -> cuda_model.Cost:
    """Of a step in the living metric: the mean of ten, with so many matrices that have bases.

    docs/cuda.md counts two matrices with bases on both sides, which is more than shards have.
    """
    rows = cuda_model.counted()
    plain, diagonal = rows["living metric"], rows["living metric, diagonal"]
    taking, renewed = (
        rows["living metric, taking covariances"],
        rows["living metric, bases renewed"],
    )
    takes = REFRESH // FACTOR_EVERY
    shares = ((plain, REFRESH - takes - 1), (taking, takes), (renewed, 1))
    nbytes = sum(cost.bytes * times for cost, times in shares) / REFRESH
    launches = sum(cost.launches * times for cost, times in shares) / REFRESH
    each = (launches - diagonal.launches) / 2
    return replace(plain, bytes=nbytes, launches=round(diagonal.launches + each * matrices))


def ours(
    name: str,
    numel: int,
    state: float,
    calls: float,
    nbytes: float,
    more_ops: float,
    cluster: Cluster,
) -> Prediction:
    """A step of ours on a cluster.

    Args:
        name: Of OPTIMIZERS.
        numel: Parameters in all.
        state: Bytes of it a parameter, as measured.
        calls: All-reduces, as counted.
        nbytes: In them, for so many ranks.
        more_ops: torch's small ops on scalars that one process does without, as counted: each a
            launch.
        cluster: Where.
    """
    share, note = -(-numel // cluster.ranks), ""
    if name == "living metric":
        matrices = with_bases(cluster.ranks)
        cost = _living_cost(matrices)
        note = f"{matrices} matrices with bases, {cost.launches:,} launches"
    else:
        step = COUNTED.get(name, "fixed step")
        cost = cuda_model.counted()[step]
        if name in BYTES:
            cost = replace(cost, bytes=BYTES[name][0])
    cost = replace(cost, launches=cost.launches + round(more_ops))
    step = {
        "L-BFGS, bfloat16 rows": "fixed step, bfloat16",
        "L-BFGS, int8 rows": "fixed step, int8",
    }
    modelled = step.get(name, COUNTED.get(name, name))
    time = cuda_model.predicted(H100, modelled, cost, share, PAIRS)
    sends = calls * cluster.all_reduce(nbytes / calls) if calls else 0.0
    return Prediction(time.seconds, sends, state * share, calls, nbytes, note or time.bound)


def adamw(numel: int, cluster: Cluster) -> Prediction:
    """torch.optim.AdamW(fused=True), which sends nothing."""
    share = -(-numel // cluster.ranks)
    time = cuda_model.torch_fused_adam(H100, share).seconds + LAUNCH
    return Prediction(time, 0.0, 8.0 * share, 0, 0, "bandwidth")


def muon(numel: int, gathered: float, calls: float, cluster: Cluster) -> Prediction:
    """torch.optim.Muon on DTensors, which gathers operands of its products.

    Args:
        numel: Parameters in all.
        gathered: Bytes that a rank gets, for each parameter of the whole, as counted.
        calls: For each matrix, as counted.
        cluster: Where.
    """
    share, matrices = numel / cluster.ranks, sum(count for *_, count in LLAMA_70B)
    flops = sum(newton_schulz_flops(r, c) * count for r, c, count in LLAMA_70B)
    kernels = flops / cluster.ranks / cluster.flops + 24 * share / H100.bandwidth
    sends = cluster.all_gather(gathered * numel)
    note = "products shared by all ranks"
    return Prediction(kernels, sends, 4.0 * share, calls * matrices, gathered * numel, note)


def muon_at_best(numel: int, cluster: Cluster) -> Prediction:
    """Muon with each matrix on one rank: bfloat16 there and back, which no code here does."""
    found = muon(numel, 0.0, 0.0, cluster)
    sent = 2 * 2.0 * numel / cluster.ranks
    nic = cluster.bus / cluster.a_node
    note = "a bound: all ranks equally busy"
    return replace(found, collectives=sent / nic, calls=2, sent=sent, note=note)


def torch_lbfgs(
    numel: int, state: float, gathered: float, calls: float, cluster: Cluster
) -> Prediction:
    """torch.optim.LBFGS, whose vectors are whole on every rank.

    Args:
        numel: Parameters in all.
        state: Bytes of it on a rank, for each parameter of the whole, as measured.
        gathered: Bytes that a rank gets, for each parameter of the whole, as counted.
        calls: For each matrix, as counted.
        cluster: Where.
    """
    cost = cuda_model.torch_lbfgs(PAIRS)
    kernels = cost.bytes * numel / H100.bandwidth + cost.syncs * WAIT
    held, sent = state * numel, gathered * numel
    note = f"cannot run: {held / cluster.memory:,.0f} times a GPU's memory"
    calls *= sum(count for *_, count in LLAMA_70B)
    return Prediction(kernels, cluster.all_gather(sent), held, calls, sent, note)


def as_json(prediction: Prediction) -> dict[str, Any]:
    """For a file."""
    return {**vars(prediction), "seconds": prediction.seconds}
