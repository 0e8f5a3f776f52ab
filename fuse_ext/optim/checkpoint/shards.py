"""The state of parameters that lie in shards, saved as tensors that can lie in others.

At work, what belongs to all parameters is flat, and each rank has its own part. In a checkpoint it
is divided by parameters: the pairs of one are a DTensor of [2, m + 1, *shape] with the parameter's
mesh and placements, which torch.distributed.checkpoint, or a load of whole tensors, cuts anew for
any number of ranks. What is made of a shard as such, and means nothing for others, is saved rank by
rank under a name that ends in the number of ranks: int8 rows' scales, and the bases of a living
metric with the second moments in them. On another number of ranks these begin anew: the ring is
empty then, and matrices step with Adam's own second moment, which is saved beside, until they have
bases again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.kernels.reference.memory import SCALE_BLOCK
from fuse_ext.kernels.scalars import new_scalars
from fuse_ext.phase.living.metric.bases import BASES, adams_moments
from fuse_ext.phase.living.metric.kronecker import MEASURE
from fuse_ext.phase.living.metric.sides import FACTORS, form_of_state, matrix_shape
from fuse_ext.phase.living.metric.state import KRONECKER_NAMES, MEASURED, STRETCH
from fuse_ext.phase.living.metric.worth import OWN, longest_sample, sample_length
from fuse_ext.phase.succession import drop_ring
from fuse_ext.vector.flat import FlatParams, ParamGroup
from fuse_ext.vector.shards import is_dtensor, largest_here, like, local, placed

# Flat vectors, perhaps with dimensions before.
FLAT = ("history", "grad_prev")
SCALES = "history_scale"
# Adam's moments in the bases, as they are while those are used.
IN_BASES = {"exp_avg": "basis_avg", "exp_avg_sq": "basis_sq"}
# Says in the first entry that the flat ones are divided.
DIVIDED = "divided"


def _own(flat: FlatParams, name: str) -> str:
    """What a rank's own tensor is called in a checkpoint of so many ranks."""
    return f"{name}_of_{flat.measures.ranks}"


def divide(
    state: dict[Any, Any], keys: list[Any], flat: FlatParams, groups: list[ParamGroup]
) -> dict[Any, Any]:
    """A state as ``Optimizer.state_dict`` has made it, in the form in which shards are saved.

    Shares memory with it; nothing is sent, so that ranks need not call it together.
    """
    divided = {**state, **{key: dict(state[key]) for key in keys if key in state}}
    betas = flat.per_segment([group.get("betas") for group in groups], None)
    for i, key in enumerate(keys):
        if key in divided:
            _divide_matrices(divided[key], flat, i, betas[i] if betas else None)
    first = divided.get(keys[0])
    if first is None:
        return divided
    for name in FLAT:
        if name in first:
            whole = first.pop(name)
            for i, key in enumerate(keys):
                rows = _rows(flat, whole, i)
                leading = tuple(whole.shape[:-1])
                divided.setdefault(key, {})[name] = like(rows, flat.stand_ins[i], leading)
            first[DIVIDED] = True
    if SCALES in first:
        scales = first.pop(SCALES)
        most = (*scales.shape[:-1], _blocks(flat))
        first[_own(flat, SCALES)] = _rank_by_rank(flat, scales, most)
    return divided


def _blocks(flat: FlatParams) -> int:
    """Blocks of int8 rows on the rank that has most, and room for stretches to begin anew."""
    most = sum(largest_here(param).numel() for param in flat.stand_ins)
    return -(-most // SCALE_BLOCK) + len(flat.stretches)


def _divide_matrices(entry: dict[str, Any], flat: FlatParams, i: int, betas: Any) -> None:
    """A living metric's matrices, which are of this rank's rows and columns."""
    if not any(name in entry for name in FACTORS):
        return
    side = matrix_shape(largest_here(flat.stand_ins[i]))
    held = dict(entry)
    for name, most in zip((*FACTORS, *BASES), side * 2, strict=True):
        if name in entry:
            entry[_own(flat, name)] = _rank_by_rank(flat, entry.pop(name), (most, most))
    if MEASURED in entry:
        entry[_own(flat, MEASURED)] = _rank_by_rank(flat, entry.pop(MEASURED), side)
    if STRETCH in entry:
        entry[_own(flat, STRETCH)] = _rank_by_rank(flat, entry.pop(STRETCH), (1,))
    if OWN in entry:
        most = longest_sample(largest_here(flat.stand_ins[i]).numel())
        entry[_own(flat, OWN)] = _rank_by_rank(flat, entry.pop(OWN), (most,))
    if held.get("basis_steps", 0) < MEASURE:
        return
    shape = flat.tensors[i].shape
    average, second = (local(held[name]) for name in IN_BASES)
    average, second = (of.reshape(matrix_shape(of)) for of in (average, second))
    for name, turned in zip(IN_BASES.values(), (average, second), strict=True):
        entry[_own(flat, name)] = _rank_by_rank(flat, turned, side)
    beta1, beta2 = map(float, betas)
    moments = adams_moments(held, average, second, float(held["step"]), (beta1, beta2))
    for name, own in zip(IN_BASES, moments, strict=True):
        entry[name] = like(own.contiguous().view(shape), flat.stand_ins[i])


def _rank_by_rank(flat: FlatParams, mine: Tensor, most: tuple[int, ...]) -> Tensor:
    """Each rank's own tensor, as one that is divided by ranks; filled up to equal shapes."""
    padded = mine.new_zeros(1, *most)
    place = padded[0]
    for dim, size in enumerate(mine.shape):
        place = place.narrow(dim, 0, size)
    place.copy_(mine)
    if flat.together is None:
        return padded
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(padded, flat.together.mesh(flat.device), [Shard(0)], run_check=False)


def _rows(flat: FlatParams, whole: Tensor, i: int) -> Tensor:
    """What of a flat tensor's last dimension belongs to ``params[i]``, in its shape; a view."""
    part, param = flat.stretch(whole.movedim(-1, 0), i).movedim(0, -1), flat.tensors[i]
    if torch.ops.aten.is_non_overlapping_and_dense(param) and param.numel():
        strides = [*part.stride()[:-1], *param.stride()]
        return part.as_strided([*part.shape[:-1], *param.shape], strides, part.storage_offset())
    return part.reshape(*part.shape[:-1], *param.shape)


def join(
    state: dict[Any, Any], keys: list[Any], flat: FlatParams, groups: list[ParamGroup]
) -> dict[Any, Any]:
    """The state that :func:`divide` was given, on this rank, for however many ranks there are now.

    One that was never divided, of an optimizer that had all of its parameters, is divided first.

    Raises:
        ValueError: A tensor has not the shape of its parameter.
    """
    found = {**state, **{key: dict(state[key]) for key in keys if key in state}}
    betas = [group.get("betas") for group in groups for _ in group["params"]]
    for i, key in enumerate(keys):
        if key in found:
            _join_matrices(found[key], flat, i, betas[i])
    first = found.get(keys[0], {})
    if flat.spread and DIVIDED not in first:
        _divide_whole(found, keys, flat)
    if not first.pop(DIVIDED, False):
        return found
    for name in FLAT:
        if name not in first:
            continue
        pieces = [found.get(key, {}).pop(name, None) for key in keys]
        leading = _leading(pieces, flat, name)
        whole = torch.zeros(*leading, flat.numel, dtype=pieces[0].dtype, device=flat.device)
        for i, piece in enumerate(pieces):
            mine = local(placed(piece, flat.stand_ins[i], len(leading)))
            _rows(flat, whole, i).copy_(mine)
        first[name] = whole
    scales = _of_this_rank(first, flat, SCALES)
    if scales is not None:
        first[SCALES] = scales[..., : -(-flat.numel // SCALE_BLOCK)].contiguous()
    elif first.get("history") is not None and first["history"].dtype == torch.int8:
        _empty_ring(first)
    return found


def _leading(pieces: list[Any], flat: FlatParams, name: str) -> tuple[int, ...]:
    for i, (piece, param) in enumerate(zip(pieces, flat.params, strict=True)):
        own, first = tuple(param.shape), pieces[0]
        shape = tuple(piece.shape) if isinstance(piece, Tensor) else None
        before = first.dim() - flat.params[0].dim()
        if shape is None or shape != (*first.shape[:before], *own):
            raise ValueError(
                f"state_dict does not fit: {name} of params[{i}] has shape {shape}, the parameter "
                f"{own}"
            )
    return tuple(pieces[0].shape[: pieces[0].dim() - flat.params[0].dim()])


def _of_this_rank(entry: dict[str, Any], flat: FlatParams, name: str) -> Tensor | None:
    """This rank's own tensor, None where it was saved on another number of ranks, or never."""
    mine = entry.pop(_own(flat, name), None)
    for other in [key for key in entry if isinstance(key, str) and key.startswith(f"{name}_of_")]:
        del entry[other]
    if mine is None:
        return None
    # A whole one holds those of all ranks.
    return local(mine)[0] if is_dtensor(mine) else mine[flat.together.rank if flat.together else 0]


def _divide_whole(state: dict[Any, Any], keys: list[Any], flat: FlatParams) -> None:
    """Divides flat tensors of all parameters by these; scales of int8 rows go."""
    first = state.get(keys[0], {})
    wholes = {name: first[name] for name in FLAT if name in first}
    if not wholes or any(whole.shape[-1] != flat.total for whole in wholes.values()):
        return  # for others to refuse
    begin = 0
    for param, key in zip(flat.params, keys, strict=True):
        end, strides = begin + param.numel(), param.stride()
        like_it = torch.empty_strided(param.shape, strides, device="meta")
        if not torch.ops.aten.is_non_overlapping_and_dense(like_it):
            strides = torch.empty(param.shape, device="meta").stride()
        for name, whole in wholes.items():
            part = whole[..., begin:end]
            leading = part.shape[:-1], part.stride()[:-1]
            state.setdefault(key, {})[name] = part.as_strided(
                (*leading[0], *param.shape), (*leading[1], *strides), part.storage_offset()
            )
        begin = end
    first.pop(SCALES, None)
    first[DIVIDED] = True


def _leave_whole_bases(entry: dict[str, Any], betas: Any) -> None:
    """Adam's moments of a parameter whose metric is not one of shards, and no metric."""
    average, second = entry["exp_avg"], entry["exp_avg_sq"]
    form, steps = form_of_state(entry, average), float(entry["step"])
    if form is not None and entry.get("basis_steps", 0) >= MEASURE:
        beta1, beta2 = map(float, betas)
        held = form.matrices(average), form.matrices(second)
        moments = adams_moments(entry, *held, steps, (beta1, beta2))
        average, second = (form.back(moment, average) for moment in moments)
    entry["exp_avg"], entry["exp_avg_sq"] = average, second
    for name in KRONECKER_NAMES:
        entry.pop(name, None)


def _join_matrices(entry: dict[str, Any], flat: FlatParams, i: int, betas: Any) -> None:
    # Beside shards no weight has its bases in blocks.
    factors = [entry[name] for name in FACTORS if name in entry]
    blocks = flat.spread and any(getattr(factor, "ndim", 0) == 3 for factor in factors)
    if factors and (blocks or is_dtensor(flat.stand_ins[i])):
        _leave_whole_bases(entry, betas)
        return
    names = (*FACTORS, *BASES, MEASURED, STRETCH, OWN, *IN_BASES.values())
    if not any(isinstance(k, str) and k.startswith(f"{n}_of_") for k in entry for n in names):
        return
    rows, columns = matrix_shape(flat.tensors[i])
    shapes = dict(zip((*FACTORS, *BASES), ((rows, rows), (columns, columns)) * 2, strict=True))
    shapes |= dict.fromkeys((MEASURED, *IN_BASES.values()), (rows, columns))
    kept = {name: _of_this_rank(entry, flat, name) for name in names}
    if all(value is None for value in kept.values()):  # of other shards
        for name in KRONECKER_NAMES:
            entry.pop(name, None)
        return
    for name, size in ((STRETCH, 1), (OWN, sample_length(flat.tensors[i].numel()))):
        if (of_elements := kept.pop(name)) is not None:
            entry[name] = of_elements[:size].clone()
    for name, value in kept.items():
        if value is not None:
            entry[name] = value[: shapes[name][0], : shapes[name][1]].contiguous()
    for name, turned in IN_BASES.items():
        if turned in entry:
            mine = entry.pop(turned).view(flat.tensors[i].shape)
            entry[name] = like(mine, flat.stand_ins[i])


def _empty_ring(entry: dict[str, Any]) -> None:
    """Takes rows out whose scales are of other shards."""
    slots = entry["history"].shape[1]
    history, before = torch.zeros_like(entry["history"]), entry.get("grad_prev")
    drop_ring(entry)
    entry["history"] = history
    entry["scalars"] = new_scalars(slots, history.device)
    entry[SCALES] = torch.zeros(
        2, slots, -(-history.shape[2] // SCALE_BLOCK), device=history.device
    )
    if before is not None:
        entry["grad_prev"] = torch.zeros_like(before)
    entry["pair_step"] = None
