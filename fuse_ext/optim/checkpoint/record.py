"""All that a saved state holds beside tensors, written into one tensor.

torch.distributed.checkpoint flattens a state_dict only where its state consists of tensors and
numbers, and loads by the names that a new optimizer's state has: what a state holds at times and at
times not, such as a list of frozen layers, would be left out without a word. So counts, words and
lists of the entry that belongs to all parameters are saved as JSON in one tensor of bytes, together
with the names of all that the state consists of. What else arrives is of the optimizer that the
state was loaded into, and is left out.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

RECORD = "record"
# The text is filled up with spaces to a power of two of at least so many bytes: a tensor that is
# loaded must be as long as the one that was saved, be the optimizer new or not.
LEAST_BYTES = 16 * 2**10
_VALUES, _KINDS, _KIND_OF, _LENGTHS = "values", "kinds", "kind_of", "lengths"


def empty_record() -> Tensor:
    """What stands in a live state in its place."""
    return torch.empty(0, dtype=torch.uint8, device="cpu")


def pack(state: dict[Any, Any], keys: list[Any], device: torch.device) -> dict[Any, Any]:
    """A saved state, keyed as it is, with a record in the entry of the first key.

    Args:
        state: As ``Optimizer.state_dict`` has made it; it is not changed.
        keys: Of all parameters, in order. Those without state get an empty entry: torch's
            ``set_optimizer_state_dict`` wants one.
        device: Where the record is to lie.
    """
    values: dict[str, dict[str, Any]] = {}
    packed = dict(state)  # a user may keep things there under other keys
    kinds: dict[tuple[str, ...], int] = {}
    kind_of = []
    for i, key in enumerate(keys):
        entry = {name: value for name, value in state.get(key, {}).items() if name != RECORD}
        if plain := {k: v for k, v in entry.items() if isinstance(k, str) and _is_plain(v)}:
            values[str(i)] = plain
        packed[key] = {name: value for name, value in entry.items() if name not in plain}
        kind = tuple(name for name in packed[key] if isinstance(name, str))
        kind_of.append(kinds.setdefault(kind, len(kinds)))
    lengths = {}
    for name, tensor in packed[keys[0]].items():
        if (padded := _padded(tensor)) is not None:
            lengths[name], packed[keys[0]][name] = tensor.shape[-1], padded
    said = {_VALUES: values, _KINDS: [*kinds], _KIND_OF: kind_of, _LENGTHS: lengths}
    text = json.dumps(said, sort_keys=True)
    length = LEAST_BYTES
    while length < len(text):
        length *= 2
    written = bytearray(text.ljust(length), "ascii")  # json writes nothing else
    packed[keys[0]][RECORD] = torch.frombuffer(written, dtype=torch.uint8).to(device)
    return packed


def opened(state: dict[Any, Any], keys: list[Any]) -> dict[Any, Any]:
    """The state that :func:`pack` was given; older ones, without a record, as they are.

    Raises:
        ValueError: The record is none, or the state lacks what it names.
    """
    first = state.get(keys[0])
    if not isinstance(first, dict) or RECORD not in first:
        return state
    if isinstance(first[RECORD], Tensor) and not first[RECORD].numel():
        return {**state, keys[0]: {k: v for k, v in first.items() if k != RECORD}}
    values, kinds, lengths = _read(first[RECORD], len(keys))
    own = set(keys)
    found = {key: entry for key, entry in state.items() if key not in own}
    for i, (key, kind) in enumerate(zip(keys, kinds, strict=True)):
        entry, plain = state.get(key) or {}, values.get(str(i), {})
        if lacking := [name for name in kind if name not in entry or _is_void(entry[name])]:
            raise ValueError(
                f"state_dict lacks {lacking} of params[{i}], which were saved: an optimizer that "
                "torch.distributed.checkpoint loads into must have them before; see "
                "fuse_ext.prepare_to_load"
            )
        # A value that stands beside the record under its own name was put there by hand.
        plain = {**plain, **{k: entry[k] for k in plain if not _is_void(entry.get(k, {}))}}
        others = {name: value for name, value in entry.items() if not isinstance(name, str)}
        if whole := {**{name: entry[name] for name in kind}, **others, **plain}:
            found[key] = whole
    for name, length in lengths.items():
        if isinstance(tensor := found[keys[0]][name], Tensor):
            found[keys[0]][name] = tensor[..., :length]
    return found


def _padded(tensor: Any) -> Tensor | None:
    """The contiguous tensor of whose last dimension this one shows the beginning, if it does.

    torch sends the memory of a tensor from rank to rank as it lies there, or first copies it.
    """
    if not isinstance(tensor, Tensor) or tensor.is_contiguous():
        return None
    base = tensor._base
    if base is None or not base.is_contiguous() or base.shape[:-1] != tensor.shape[:-1]:
        return None
    same = base.stride() == tensor.stride() and base.data_ptr() == tensor.data_ptr()
    return base if same else None


def _is_void(value: Any) -> bool:
    """Whether torch's unflattening has put it in the place of what it did not find."""
    return isinstance(value, dict) and not value


def _read(
    tensor: Any, count: int
) -> tuple[dict[str, dict[str, Any]], list[list[str]], dict[str, int]]:
    """Values by the places of their parameters, the other names of each, lengths of padded rows."""
    try:
        said = json.loads(bytes(tensor.cpu().tolist()))
        kinds = [said[_KINDS][kind] for kind in said[_KIND_OF]]
        values = {place: dict(entry) for place, entry in said[_VALUES].items()}
        lengths = {name: int(length) for name, length in said[_LENGTHS].items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"state_dict does not fit: {RECORD} is no record, but {tensor!r}"
        ) from error
    if len(kinds) != count:
        raise ValueError(
            f"state_dict does not fit: {RECORD} is of {len(kinds)} parameters, not {count}"
        )
    return values, kinds, lengths


def _is_plain(value: Any) -> bool:
    """Whether JSON gives it back as it is."""
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
