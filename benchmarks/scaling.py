"""What a step costs on several ranks: computed, sent, held; and a prediction for 1,024 GPUs.

Processes with gloo on this machine take steps on shards; benchmarks/harness/scaling_ranks.py says
how they are measured, scaling_model.py what is predicted from what. Every number of ranks and
parameters is stored as it is done (build/scaling-cells) and is not run again unless its code
changes.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.harness import cells, command, machine, saving, scaling_model
from benchmarks.harness.cells import Cell
from benchmarks.harness.pictures import style
from benchmarks.harness.rounds import Spread, show_time
from benchmarks.harness.scaling_model import Cluster, Prediction
from benchmarks.harness.scaling_ranks import OPTIMIZERS
from benchmarks.harness.tables import count, number, table

# Square matrices and their side. The first is so small that its step is all Python and dispatch.
TINY = (4, 16)
SIZES = {True: (TINY, (4, 160)), False: (TINY, (4, 160), (4, 512), (16, 512))}
RANKS = {True: (1, 2), False: (1, 2, 4)}
ADAMW, MUON, LBFGS = "torch.optim.AdamW(fused=True)", "torch.optim.Muon", "torch.optim.LBFGS"

Found = dict[tuple[int, int], dict[str, Any]]


def numel(matrices: int, side: int) -> int:
    """Parameters of so many square matrices."""
    return matrices * side**2


def cells_of(args: argparse.Namespace) -> dict[tuple[int, int], Cell]:
    """A cell for each number of parameters and ranks."""
    return {
        (numel(*size), ranks): Cell(
            f"{numel(*size)}-on-{ranks}-{args.rounds}",
            "benchmarks.harness.scaling_ranks:on_so_many",
            {"ranks": ranks, "matrices": size[0], "side": size[1], "rounds": args.rounds},
        )
        for size in SIZES[args.quick]
        if numel(*size) <= args.largest
        for ranks in RANKS[args.quick]
    }


def gather(all_ranks: list[dict[str, Any]], side: int) -> dict[str, Any]:
    """The figures of one cell: of the slowest rank in every round, and of what all share."""
    first = all_ranks[0]
    optimizers = {}
    for name, own in first["optimizers"].items():
        of_all = [rank["optimizers"][name] for rank in all_ranks]
        optimizers[name] = {
            **own,
            **{
                clock: Spread.of(max(of) for of in zip(*(r[clock] for r in of_all), strict=True))
                for clock in ("wall", "cpu")
            },
            "collective_seconds": max(rank["collective_seconds"] for rank in of_all),
            "state_bytes": max(rank["state_bytes"] for rank in of_all),
        }
    return {
        "numel": max(rank["numel"] for rank in all_ranks),
        "side": side,
        "optimizers": optimizers,
        "failed": first["failed"],
        "bandwidth": {
            kind: statistics.median(rank["bandwidth"][kind] for rank in all_ranks)
            for kind in first["bandwidth"]
        },
        "flops": statistics.median(rank["flops"] for rank in all_ranks),
        "all_reduce": {int(n): first["all_reduce"][n] for n in first["all_reduce"]},
    }


# --- the model beside what was measured -----------------------------------------------------


def modelled(found: Found, size: int, ranks: int, name: str) -> tuple[float, float] | None:
    """Seconds computed and sent by the model; None where it has no bytes for the optimizer."""
    here, tiny = found[size, ranks], found[numel(*TINY), ranks]
    known = scaling_model.BYTES.get(name)
    if known is None and name != "living metric":
        return None
    nbytes, kind = known or (scaling_model.living_bytes(), "update")
    own = here["optimizers"][name]
    kernels = scaling_model.kernel_seconds(
        nbytes,
        here["numel"],
        here["bandwidth"][kind],
        tiny["optimizers"][name]["cpu"].median,
        tiny["numel"],
    )
    if name == "living metric":
        kernels += scaling_model.basis_flops(here["side"], ranks) * here["numel"] / here["flops"]
    if ranks == 1:
        return kernels, 0.0
    alpha, beta = scaling_model.alpha_beta(here["all_reduce"])
    return kernels, scaling_model.send_seconds(own["calls"], own["bytes"], alpha, beta)


def measured_table(found: Found, size: int) -> str:
    """One number of parameters: a row for each optimizer and number of ranks."""
    lines = []
    for name in OPTIMIZERS:
        for ranks in sorted(r for s, r in found if s == size):
            here = found[size, ranks]
            if name not in here["optimizers"]:
                reason = here["failed"].get(name, "not measured")
                lines.append([name, str(ranks), f"failed: {reason}", *[""] * 7])
                continue
            own = here["optimizers"][name]
            model = modelled(found, size, ranks, name)
            kernels, sends = ("", "") if model is None else map(_short, model)
            if size == numel(*TINY):
                kernels = ""  # it is made of this
            lines.append(
                [
                    name,
                    str(ranks),
                    show_time(own["cpu"]),
                    kernels,
                    show_time(own["wall"]),
                    _short(own["collective_seconds"]) if ranks > 1 else "",
                    sends if ranks > 1 else "",
                    f"{own['calls']:g}",
                    f"{own['bytes']:,.0f}",
                    f"{own['state_bytes'] / here['numel']:.1f}",
                ]
            )
    headers = ["optimizer", "ranks", "computed", "model", "passed", "in collectives", "model"]
    headers += ["calls", "bytes sent", "state, bytes a parameter of the rank"]
    return table(headers, lines)


def _short(seconds: float) -> str:
    factor, unit = (1e6, "us") if seconds < 1e-3 else (1e3, "ms") if seconds < 1.0 else (1.0, "s")
    return f"{number(factor * seconds)} {unit}"


def off(found: Found) -> list[float]:
    """How many times as long as modelled ranks computed, in all rows but those of the tiny size."""
    ratios = []
    for size, ranks in found:
        if size == numel(*TINY):
            continue
        for name, own in found[size, ranks]["optimizers"].items():
            model = modelled(found, size, ranks, name)
            if model is not None:
                ratios.append(own["cpu"].median / model[0])
    return ratios


# --- the prediction -------------------------------------------------------------------------


def predictions(found: Found, cluster: Cluster) -> dict[str, Prediction]:
    """A step on Llama 3 70B's weights, from what was counted at the largest size measured."""
    size = max(size for size, _ in found)
    all_ranks = sorted(ranks for s, ranks in found if s == size and ranks > 1)
    whole = scaling_model.numel_of()
    made = {ADAMW: scaling_model.adamw(whole, cluster)}
    alone, few = found[size, 1]["optimizers"], found[size, all_ranks[0]]["optimizers"]
    for name in OPTIMIZERS:
        if name.startswith("torch.") or name not in few:
            continue
        own = {ranks: found[size, ranks]["optimizers"][name] for ranks in all_ranks}
        if len(all_ranks) > 1:
            pair = {ranks: own[ranks]["bytes"] for ranks in all_ranks[-2:]}
            nbytes = scaling_model.extrapolated(pair, cluster.ranks)
        else:
            # A bound: not all of the numbers are one for each rank.
            nbytes = own[all_ranks[0]]["bytes"] * cluster.ranks / all_ranks[0]
        # A basis of a shard is smaller the more ranks there are; with 1,024 it is nearly nothing.
        state = 8.0 if name.startswith("living metric") else few[name]["state_bytes"]
        state = state if state == 8.0 else state / found[size, all_ranks[0]]["numel"]
        made[name] = scaling_model.ours(
            name,
            whole,
            state,
            own[all_ranks[0]]["calls"],
            nbytes,
            # In the living metric one process has larger bases to see to.
            0.0 if name == "living metric" else max(0.0, few[name]["ops"] - alone[name]["ops"]),
            cluster,
        )
    ranks = all_ranks[0]
    matrices = next(m for m, side in SIZES[False] if numel(m, side) == size)
    if MUON in few:
        gathered = few[MUON]["bytes"] * ranks / size
        made[MUON] = scaling_model.muon(whole, gathered, few[MUON]["calls"] / matrices, cluster)
        made["Muon, each matrix on one rank"] = scaling_model.muon_at_best(whole, cluster)
    if LBFGS in few:
        own = few[LBFGS]
        gathered, calls = own["bytes"] * ranks / size, own["calls"] / matrices
        held = own["state_bytes"] / size
        made[LBFGS] = scaling_model.torch_lbfgs(whole, held, gathered, calls, cluster)
    return made


def prediction_table(made: dict[str, Prediction]) -> str:
    """The predictions."""
    lines = [
        [
            name,
            _short(of.kernels),
            _short(of.collectives) if of.collectives else "0",
            _short(of.seconds),
            number(of.seconds / made[ADAMW].seconds),
            f"{of.state / 1e9:.2f} GB" if of.state < 1e12 else f"{of.state / 1e12:.1f} TB",
            f"{of.calls:,.0f}",
            f"{of.sent:,.0f}" if of.sent < 1e6 else f"{of.sent / 1e9:,.3g} GB",
            of.note,
        ]
        for name, of in made.items()
    ]
    headers = ["optimizer", "computed", "in collectives", "a step", "times AdamW's", "state a GPU"]
    return table([*headers, "calls", "bytes sent", "bound, notes"], lines)


# --- the page -------------------------------------------------------------------------------


def slower(found: Found, made: dict[str, Prediction]) -> list[str]:
    """Where ours is slower than torch's, in words; where it is not, that too."""
    size = max(size for size, _ in found)
    lines = []
    for ranks in sorted(r for s, r in found if s == size):
        own = found[size, ranks]["optimizers"]
        if ADAMW not in own:
            continue
        told = []
        for name in own:
            if not name.startswith("torch."):
                ratio = own[name]["cpu"].over(own[ADAMW]["cpu"])
                passed = own[name]["wall"].over(own[ADAMW]["wall"])
                told.append(f"{name} {number(ratio.median)} ({number(passed.median)})")
        lines.append(
            f"- {count(size)} parameters, {ranks} rank{'s' * (ranks > 1)}: times AdamW's, computed "
            f"(passed): {'; '.join(told)}."
        )
        if LBFGS in own:
            told = [
                f"{name} {number(own[name]['cpu'].over(own[LBFGS]['cpu']).median)}"
                for name in own
                if name.startswith("L-BFGS")
            ]
            lines.append(f"  Times torch.optim.LBFGS's, computed: {'; '.join(told)}.")
    worse = [
        f"{name} {of.seconds / made[ADAMW].seconds:.1f}"
        for name, of in made.items()
        if not name.startswith("torch.") and of.seconds > made[ADAMW].seconds and "Muon" not in name
    ]
    lines.append(f"- Predicted, times AdamW's step on the cluster: {'; '.join(worse) or 'none'}.")
    return lines


def page(found: Found, made: dict[str, Prediction], cluster: Cluster) -> str:
    """All tables with what must be said of them."""
    sizes = sorted({size for size, _ in found})
    ratios = off(found)
    cores, most = machine.cores(), max(ranks for _, ranks in found)
    text = [
        "One thread a rank, gloo. Computed: CPU time of the rank's thread for a step outside the "
        "closure, Python included, which is all of the step but the waiting; passed: by the clock. "
        "Of both the slowest rank's, median and quartiles over the rounds. In collectives: by the "
        "clock, in other steps that are watched (each call waited for at once); bytes are those "
        "that a rank puts in. All are a step's (the mean of ten, over which the living metric "
        "renews its bases once).",
    ]
    if most > cores:
        text.append(
            f"**{most} ranks share {cores} cores**: what passes by the clock, and the time in "
            "collectives, is then the scheduler's as much as ours; what is computed is not."
        )
    if ratios:
        low, high = min(ratios), max(ratios)
        text.append(
            "Model, computed: the step at the tiny size (Python and dispatch), and bytes over the "
            "bandwidth that this number of ranks measured on as many bytes at once, in the best "
            "round. What was "
            f"computed is {low:.2f} to {high:.2f} times that, {statistics.median(ratios):.2f} in "
            "the median. Model, in collectives: alpha and beta from all-reduces of 8 bytes and 1 "
            "MiB between ranks that have nothing else to do, in the best round."
        )
    for size in sizes:
        text += [f"## {count(size)} parameters", measured_table(found, size)]
    rates = []
    for (size, ranks), here in sorted(found.items()):
        alpha, beta = scaling_model.alpha_beta(here["all_reduce"])
        rates.append(
            [
                f"{count(size)} on {ranks}",
                f"{here['bandwidth']['read'] / 1e9:.1f}",
                f"{here['bandwidth']['update'] / 1e9:.1f}",
                f"{here['flops'] / 1e9:.1f}",
                f"{1e6 * alpha:.0f}" if ranks > 1 else "",
                f"{1e-9 / beta:.2f}" if ranks > 1 and beta else "",
            ]
        )
    headers = ["what the model is made of", "read, GB/s a rank", "update, GB/s a rank"]
    headers += ["product, GFLOP/s a rank", "alpha, us", "1 / beta, GB/s"]
    text += ["## Measured limits", table(headers, rates), "## Where ours is slower"]
    text.append("\n".join(slower(found, made)))
    text += [
        f"## Prediction: Llama 3 70B on {cluster.ranks:,} GPUs",
        "**Predicted, not measured: nothing of this size has been run.** H100 SXM, "
        f"{cluster.a_node} a node, weights and state in float32 in shards; gathers of weights and "
        "reductions of gradients, which all of these need alike, are left out. Computed: the model "
        "of docs/cuda.md (benchmarks/harness/gpu_model.py: 3.0 TB/s of the data sheet's 3.35, "
        "launches and waits of the host), and on ranks torch's ops on scalars as they were "
        "counted. Sent: calls and bytes as they were counted here, bytes extended linearly in the "
        f"number of ranks; an all-reduce takes {1e6 * cluster.all_reduce(0.0):.0f} us and its "
        f"bytes over {cluster.tree / 2e9:.1f} GB/s, a gather goes at {cluster.bus / 1e9:.0f} GB/s "
        "of bus bandwidth (sources and assumptions: benchmarks/harness/scaling_model.py).",
        prediction_table(made),
        "No jitter is in it: a synchronous call waits for the slowest of all ranks, and four calls "
        "an iteration wait four times. torch.optim.LBFGS does run on DTensors of this torch, but "
        "its vectors are whole on every rank: the prediction says what they would need. "
        "torch.optim.Muon gathers an operand of each product, as counted; the row below it is a "
        "bound for code that does not exist here.",
    ]
    return "\n\n".join(text)


def draw(found: Found) -> Figure:
    """Time computed a step over ranks, at the largest size, beside the ideal share of one rank."""
    size = max(size for size, _ in found)
    with style():
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for name in OPTIMIZERS:
            at = [r for s, r in sorted(found) if s == size and name in found[s, r]["optimizers"]]
            if not at:
                continue
            cpu = [1e3 * found[size, r]["optimizers"][name]["cpu"].median for r in at]
            dashed = "--" if name.startswith("torch.") else "-"
            axes.loglog(at, cpu, dashed, marker="o", label=name)
        axes.set_xticks(at, [str(r) for r in at])
        axes.minorticks_off()
        axes.set_xlabel("ranks")
        axes.set_ylabel("computed by a rank, ms a step")
        axes.set_title(f"{count(size)} parameters over several ranks")
        figure.legend(fontsize=7, loc="outside right center")
    return figure


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--largest", type=float, default=math.inf, help="most parameters")
    parser.add_argument("--cells", type=Path, help="folder of the stored runs (in build)")
    parser.add_argument("--fresh", action="store_true", help="run again what is stored")


def main() -> None:
    """Runs the module."""
    args = command.arguments("scaling", __doc__.splitlines()[0], (5, 3), threads=1, add=_add)
    facts = machine.facts(args)
    folder = args.cells or cells.ROOT / "build" / f"scaling-cells{'-quick' * args.quick}"
    wanted = cells_of(args)
    results = cells.run(wanted.values(), folder, "scaling", 0, args.fresh)
    found = {at: gather(results[cell.key], cell.options["side"]) for at, cell in wanted.items()}
    cluster = Cluster()
    made = predictions(found, cluster)
    document = {
        "measured": [
            {"parameters": size, "ranks": ranks, **here} for (size, ranks), here in found.items()
        ],
        "off": off(found),
        "cluster": vars(cluster),
        "predicted": {name: scaling_model.as_json(of) for name, of in made.items()},
    }
    short = "\n\n".join(
        ["Where ours is slower:", "\n".join(slower(found, made)), prediction_head(cluster)]
    )
    short = (
        f"{short}\n\n{prediction_table(made)}\n\nTables and sources: [scaling](results/scaling.md)."
    )
    saving.save(args, "scaling", facts, document, page(found, made, cluster), draw(found), short)


def prediction_head(cluster: Cluster) -> str:
    """What stands above the predictions."""
    return f"**Predicted, not measured**: Llama 3 70B in shards over {cluster.ranks:,} H100."


if __name__ == "__main__":
    main()
