"""What an optimizer will hold, before it is made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fuse_ext.checks import check_integer
from fuse_ext.curvature.dense import DenseMatrix
from fuse_ext.curvature.moments import Moments
from fuse_ext.curvature.protocol import InverseHessian
from fuse_ext.curvature.ring import History
from fuse_ext.kernels import ops as kernels
from fuse_ext.optim.adam import Adam
from fuse_ext.optim.flat_optimizer import FlatOptimizer, own_group
from fuse_ext.optim.fuse import Fuse
from fuse_ext.optim.fuse_pv import FusePV
from fuse_ext.optim.lbfgs import LBFGS
from fuse_ext.phase.living.metric.state import kronecker_nbytes
from fuse_ext.phase.modes import (
    AUTO,
    IN_PAIRS,
    living,
    self_scales,
    takes_matrix,
    updates_as_broyden,
)
from fuse_ext.switch.steps import Never
from fuse_ext.tell.memory import MemoryEstimate, PhaseMemory
from fuse_ext.vector.checks import check_params
from fuse_ext.vector.ranks import ALONE
from fuse_ext.vector.rows.rows import check_shareable, share_of
from fuse_ext.vector.shards import check_spread, is_dtensor, lay_out, local, way_of

OPTIMIZERS = ("FusePV", "Adam", "LBFGS", "Fuse")
# Line searches that may go on past a good trial, whose gradient they then keep.
SAVING_SEARCHES = ("strong_wolfe", "approximate_wolfe")


def estimate_memory(
    params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | int,
    optimizer: str = "FusePV",
    *,
    history_size: int | None = None,
    history_dtype: torch.dtype | None = None,
    history_device: str | None = None,
    amsgrad: bool = False,
    moment_dtype: torch.dtype | None = None,
    master_weights: bool = False,
    line_search: str | None = "auto",
    deterministic: bool | None = None,
    curvature: str = AUTO,
    pairs: str = AUTO,
    metric: str = AUTO,
    average_weights: bool = True,
    max_iter: int = 1,
    capturable: bool = False,
    shard_over: int = 1,
) -> MemoryEstimate:
    """The memory that an optimizer will hold; allocates none of it.

    The optimizer is really made, on torch's meta device, so that this counts what it allocates
    and not what a formula says. ``opt.report()`` gives the same figures for one at work.

    ::

        >>> print(fuse_ext.estimate_memory(10**6))
        FusePV, 1,000,000 parameters
        phase             state  workspace  bytes a parameter
        adam           7.63 MiB        0 B        8.00 + 0.00
        lbfgs         11.44 MiB        0 B       12.00 + 0.00
        one function  83.93 MiB   7.63 MiB       88.01 + 8.00
        at most 11.44 MiB at once, 95.37 MiB if the closure is one function

    Args:
        params: A module, its parameters or parameter groups (on any device, of any supported
            dtype), or just a number of float32 parameters. Of DTensors what lies on this rank
            counts.
        optimizer: "FusePV", "Adam", "LBFGS" or "Fuse".
        history_size: This and the rest: as the optimizer will be given; what it does not have is
            ignored. None is the optimizer's default.
        history_dtype: Storage of the pairs.
        history_device: Where they are to lie; "cpu" means beside parameters on a device here,
            wherever these are, and their bytes are ``host_bytes``.
        amsgrad: Adam's third moment.
        moment_dtype: Storage of Adam's moments.
        master_weights: Whether steps are taken on weights in float32.
        line_search: Its name; None for a fixed step; "auto" for FusePV on minibatches, and for
            strong Wolfe elsewhere.
        deterministic: What FusePV is told of the closure: with True "auto" is a line search, and
            the default is a matrix, or a larger history. Where nothing is said these are estimated
            too, as ``one_function``, since FusePV may find out.
        curvature: "auto", "dense" or "pairs", of FusePV.
        pairs: "auto" for none on minibatches, else where FusePV's come from.
        metric: "auto", "diagonal" or "kronecker" there; a weight's bases go by its shape, so that a
            number of parameters has none. Those that turn out not to be worth having are counted.
        average_weights: Whether the mean of the weights is kept there.
        max_iter: With more than one "auto" is a line search on minibatches too.
        capturable: Steps for CUDA graphs, which keep one vector more.
        shard_over: With ``shard_state=True``, the number of ranks. The first one's share counts,
            which is the largest.

    Returns:
        Bytes of state and workspace for each phase.

    Raises:
        ValueError, TypeError: No such optimizer, no parameters, or an option out of range.
    """
    asked = dict(locals())
    if isinstance(params, Iterator):  # to be asked for twice
        asked["params"] = params = [*params]
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    check_integer("shard_over", shard_over, 1)
    groups, spread = _on_meta(params, shard_over)
    own = optimizer == "FusePV"
    if own and spread.kept_apart and curvature == AUTO:
        curvature = IN_PAIRS
    batches = line_search == AUTO and own and not deterministic and max_iter == 1
    if line_search == AUTO and not batches:
        line_search = "strong_wolfe"
    lbfgs_options: dict[str, Any] = {
        "history_dtype": history_dtype,
        "history_device": history_device,
        "process_group": ALONE,
    }
    if history_size is not None:
        lbfgs_options["history_size"] = history_size
    opt: FlatOptimizer  # made for the checks in its constructor, and for its flat layout
    if optimizer == "Adam":
        opt = Adam(
            groups,
            amsgrad=amsgrad,
            moment_dtype=moment_dtype,
            master_weights=master_weights,
            capturable=capturable,
            process_group=ALONE,
        )
    elif optimizer == "LBFGS":
        told: dict[str, Any] = {"max_iter": max_iter, "capturable": capturable}
        opt = LBFGS(groups, line_search_fn=line_search, **told, **lbfgs_options)
    elif optimizer == "FusePV":
        options = {
            **lbfgs_options,
            "curvature": curvature,
            "moment_dtype": moment_dtype,
            "master_weights": master_weights,
            "deterministic": deterministic,
            "pairs": pairs,
            "metric": metric,
            "average_weights": average_weights,
            "max_iter": max_iter,
            "capturable": capturable,
        }
        if capturable:  # the default looks at the loss
            options["switch"] = Never()
        opt = pv = FusePV(groups, amsgrad=amsgrad, line_search=line_search, **options)
        # As many pairs by default as all ranks come to.
        pv.flat.total, pv.flat.usual = spread.total, spread.usual
        pv._fill_in()
    else:
        opt = Fuse(groups, amsgrad=amsgrad, line_search=line_search, **lbfgs_options)
    flat, ops = opt.flat, kernels.select("reference", opt.flat.device)
    numel, flat.numel = flat.numel, spread.numel
    adam = lbfgs = scratch = inherited = host = 0
    size = opt.param_groups[0].get("history_size", 0)
    if optimizer != "LBFGS":
        dtype, keeps = (opt.param_groups[0].get(n) for n in ("moment_dtype", "master_weights"))
        state: Any = defaultdict(dict)
        made = Moments(flat, ops, state, opt.param_groups, dtype, keeps_masters=bool(keeps))
        adam = made.nbytes
    if batches and living(opt.param_groups[0]):
        bases, scratch = kronecker_nbytes(flat, opt.param_groups, spread.pieces)
        average = numel * flat.dtype.itemsize if average_weights else 0
        lbfgs, inherited = adam + bases + average, adam
    elif optimizer != "Adam":
        held: InverseHessian
        if optimizer == "FusePV" and takes_matrix(opt.param_groups[0], flat):
            held = DenseMatrix(flat, ops, {})
        else:
            apart = history_device is not None
            graph = capturable and optimizer != "Fuse"
            held = ring = History(
                flat, ops, {}, size, history_dtype, grad_prev_apart=graph, apart=apart
            )
            group = opt.param_groups[0]
            if own and self_scales(group) and updates_as_broyden(group, flat):
                ring.update_as_broyden()
            host = held.host_nbytes
        vectors = 1 + (line_search in SAVING_SEARCHES)
        vectors += optimizer == "Fuse" and line_search is not None  # g at x, for Adam's half
        lbfgs = 0 if host else held.nbytes
        scratch = vectors * flat.numel * flat.dtype.itemsize + held.workspace_nbytes
    phases = {
        "Adam": (PhaseMemory("adam", adam, 0),),
        "LBFGS": (PhaseMemory("lbfgs", lbfgs, scratch, host_bytes=host),),
        "FusePV": (
            PhaseMemory("adam", adam, 0),
            PhaseMemory("lbfgs", lbfgs, scratch, inherited, host),
        ),
        "Fuse": (PhaseMemory("fuse", adam + lbfgs, scratch, host_bytes=host),),
    }
    found = MemoryEstimate(optimizer, numel, phases[optimizer])
    searches = living(opt.param_groups[0]) if batches else line_search is not None
    if own and deterministic is None and searches and max_iter == 1:
        known = estimate_memory(**{**asked, "deterministic": True}).phases[-1]
        if known.total_bytes != found.phases[-1].total_bytes:
            found = replace(found, one_function=replace(known, phase="one function"))
    return found


class Spread(NamedTuple):
    """How the parameters lie on several ranks.

    Attributes:
        pieces: In how many each lies.
        numel: Of the flat vector of what lies here, padding included.
        total, usual: Real numbers of all, and of those that lie on a rank on average.
        kept_apart: Whether no rank has all of a vector.
    """

    pieces: list[int]
    numel: int
    total: int
    usual: int
    kept_apart: bool


def _on_meta(params: Any, ranks: int) -> tuple[list[dict[str, Any]], Spread]:
    """Parameter groups of tensors without memory that look like what lies here of these.

    And how they lie on ranks, by which those that are plain are shared.
    """
    if isinstance(params, int):
        check_integer("params", params, 1)
        usual = -(-params // ranks)
        held = torch.empty(usual, dtype=torch.float32, device="meta")
        return [{"params": [held]}], Spread([ranks], usual, params, usual, ranks > 1)
    if isinstance(params, nn.Module):
        params = params.parameters()
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "params must be a module, an iterable of tensors or groups, or a number of "
            f"parameters, got {type(params).__name__}"
        )
    groups = list(params)
    if not (groups and isinstance(groups[0], dict)):
        groups = [{"params": groups}]
    groups = [own_group(group) for group in groups]
    # Each tensor of a group counts once, as in the optimizers.
    groups = [{**group, "params": [*dict.fromkeys(_tensors(group["params"]))]} for group in groups]
    owners = [tensor for group in groups for tensor in group["params"]]
    check_spread(owners)
    check_params([local(tensor) for tensor in owners], owners)
    if ranks > 1:
        check_shareable(owners)
    here = {t: torch.empty_like(share_of(local(t), ranks), device="meta") for t in owners}
    on_meta = [{**group, "params": [here[t] for t in group["params"]]} for group in groups]
    apart = [t for t in owners if is_dtensor(t)]
    ways = [(ranks, ("rows",)) if ranks > 1 and t.dim() else way_of(t) for t in owners]
    sizes = [here[t].numel() * (2 if t.is_complex() else 1) for t in owners]
    together = max([ranks, *(t.device_mesh.size() for t in apart)])
    places = lay_out(owners, sizes, together, ways)
    # With ``shard_state`` what has no rows lies behind, at the next block: that is left out.
    numel = sum(sizes) if ranks > 1 else places.numel
    found = numel, places.total, places.usual, bool(apart) or ranks > 1
    return on_meta, Spread([n for n, _ in ways], *found)


def _tensors(entries: Any) -> list[Tensor]:
    """The tensors of one group, given as torch allows: one, several, or (name, tensor) pairs."""
    if isinstance(entries, Tensor):
        return [entries]
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params[{i}] must be a tensor, got {type(tensor).__name__}")
    return tensors
