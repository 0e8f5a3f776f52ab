"""In a saved state what belongs to frozen parameters lies with the first one that is trained.

torch's ``set_optimizer_state_dict`` leaves out the state of parameters that require no gradient.
One of them may be the first, whose entry holds what belongs to all (curvature, counters, the
phase), and others may be thawed later. So their values are saved under names such as ``0:history``,
the place of the parameter before the name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_ENTRUSTED = re.compile(r"(\d+):(.+)")


def entrust(state: dict[Any, Any], keys: list[Any], params: Sequence[Tensor]) -> dict[Any, Any]:
    """A saved state in that form; as it is where all parameters are trained, or none.

    Args:
        state: Keyed by ``keys``; it is not changed.
        keys: Of all parameters, in order.
        params: Those.
    """
    trained = [i for i, param in enumerate(params) if param.requires_grad]
    if not trained or len(trained) == len(params):
        return state
    found = dict(state)
    keeper = dict(found.get(keys[trained[0]], {}))
    for i in sorted(set(range(len(keys))) - set(trained)):
        entry = found.get(keys[i], {})
        keeper |= {f"{i}:{name}": value for name, value in entry.items() if isinstance(name, str)}
        found[keys[i]] = {k: value for k, value in entry.items() if not isinstance(k, str)}
    found[keys[trained[0]]] = keeper
    return found


def owner(name: Any, count: int) -> tuple[int | None, Any]:
    """Whose value a name in a saved state is, None for the entry's own parameter; and its name.

    Raises:
        ValueError: There are only ``count`` parameters.
    """
    found = _ENTRUSTED.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        return None, name
    if int(found[1]) >= count:
        raise ValueError(
            f"state_dict does not fit: {name!r} is of parameter {found[1]}, but there are {count}"
        )
    return int(found[1]), found[2]


def reclaim(state: dict[Any, Any], keys: list[Any]) -> dict[Any, Any]:
    """The state that :func:`entrust` was given.

    Raises:
        ValueError: It holds values of more parameters than there are.
    """
    found = dict(state)
    for key in keys:
        entry = state.get(key)
        if not isinstance(entry, dict):
            continue
        for name in entry:
            i, own = owner(name, len(keys))
            if i is not None:
                found[keys[i]] = {**found.get(keys[i], {}), own: entry[name]}
                found[key] = {k: value for k, value in found[key].items() if k != name}
    return found
