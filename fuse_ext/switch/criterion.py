"""What a switchover criterion is: its observation, its state, and composition with & and |."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard, cast

import torch

AT_ONCE = "at once, before the first Adam step"
LARGEST = 1e290  # sums of up to 1e18 values of this size stay finite


@dataclass(frozen=True, slots=True)
class Observation:
    """What a criterion sees after one Adam step.

    Attributes:
        step: Adam steps since Adam began or was last returned to, this one included (1 after the
            first).
        epoch: Epochs finished in that time.
        loss: The loss the step began with; None where it was not computed.
        grad_norm_sq: Squared Euclidean norm of the loss's gradient, without ``weight_decay``'s
            L2 term and, under GradScaler, without the scaler's factor; None where it was not
            computed.
        params: The parameters after the step.
    """

    step: int
    epoch: int
    loss: float | None
    grad_norm_sq: float | None
    params: Sequence[torch.Tensor]


class Switchover(ABC):
    """A criterion for the switch from Adam to L-BFGS.

    The optimizer calls ``observe`` once after each Adam step and switches when it returns True.
    A subclass implements ``_verdict`` and, where it keeps state, ``reset``, ``_state`` and
    ``_parse``.

    Attributes:
        needs_loss: Whether every observation must have a loss.
        needs_grad_norm: Whether every observation must have a squared gradient norm.
        at_once: Whether the switch comes before the first Adam step, with nothing observed.
        reason: Why to switch, when the last ``observe`` returned True and where ``at_once`` is
            set; otherwise empty.
    """

    needs_loss: bool = False
    needs_grad_norm: bool = False
    at_once: bool = False
    reason: str = ""

    def observe(self, obs: Observation) -> bool:
        """Take in one Adam step and say whether to switch now.

        Raises:
            ValueError: The observation lacks what the criterion needs, or its parameters do not
                fit (see ``check``).
        """
        for name, needed in (("loss", self.needs_loss), ("grad_norm_sq", self.needs_grad_norm)):
            if needed and getattr(obs, name) is None:
                raise ValueError(f"{self!r} needs the observation's {name}, which is None")
        self.reason = self._verdict(obs)
        return self.reason != ""

    def check(self, params: Sequence[torch.Tensor]) -> None:
        """Raise ValueError if the criterion does not fit these parameters; by default it does."""
        return None

    def reset(self) -> None:
        """Forget everything observed."""
        self.reason = AT_ONCE if self.at_once else ""

    def waiting(self, step: int, epoch: int) -> str:
        """In words, why there is no switch yet, after so many Adam steps and epochs."""
        return f"{self!r} is not true yet"

    def state_dict(self) -> dict[str, object]:
        """What was observed, in types that JSON and ``torch.load(weights_only=True)`` know."""
        return {"kind": type(self).__name__, **self._state()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from the state of a criterion of the same kind, windows and members.

        Thresholds are arguments, not state: this criterion keeps its own.

        Raises:
            ValueError: The state is of another kind or window, or a field is missing, unknown
                or not valid. The criterion is then unchanged.
        """
        self._restore(self._parse(state))

    def __and__(self, other: "Switchover") -> "All":
        return All(self, other) if isinstance(other, Switchover) else NotImplemented

    def __or__(self, other: "Switchover") -> "Any":
        return Any(self, other) if isinstance(other, Switchover) else NotImplemented

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abstractmethod
    def _verdict(self, obs: Observation) -> str:
        """The reason to switch now, empty if there is none."""

    def _state(self) -> dict[str, object]:
        return {}

    def _parse(self, state: object) -> dict[str, object]:
        """The attributes that the state stands for, all checked. Changes nothing."""
        Reader(self, state)
        return {}

    def _restore(self, parsed: dict[str, object]) -> None:
        self.reset()
        vars(self).update(parsed)

    def _leaves(self) -> Iterator["Switchover"]:
        yield self


class _Composite(Switchover):
    """Base of All and Any: several criteria, each of which sees every observation."""

    def __init__(self, *members: Switchover) -> None:
        flat: list[Switchover] = []
        for i, member in enumerate(members):
            if not isinstance(member, Switchover):
                raise TypeError(f"members[{i}] must be a Switchover, got {member!r}")
            flat.extend(member.members if type(member) is type(self) else [member])
        if not flat:
            raise ValueError(f"{type(self).__name__}() has no members")
        leaves = [leaf for member in flat for leaf in member._leaves()]
        if len({id(leaf) for leaf in leaves}) < len(leaves):
            # It would see every step twice.
            raise ValueError(f"the same criterion occurs twice in members={members!r}")
        self.members: tuple[Switchover, ...] = tuple(flat)
        self.needs_loss = any(member.needs_loss for member in flat)
        self.needs_grad_norm = any(member.needs_grad_norm for member in flat)

    def check(self, params: Sequence[torch.Tensor]) -> None:
        """Check every member."""
        for member in self.members:
            member.check(params)

    def reset(self) -> None:
        """Reset every member."""
        for member in self.members:
            member.reset()
        super().reset()

    def _waiting(self, step: int, epoch: int, between: str) -> str:
        words = [member.waiting(step, epoch) for member in self.members if not member.reason]
        return between.join(words)

    def _observe_all(self, obs: Observation) -> list[bool]:
        return [member.observe(obs) for member in self.members]

    def _reasons(self) -> str:
        return " and ".join(member.reason for member in self.members if member.reason)

    def _state(self) -> dict[str, object]:
        return {"members": [member.state_dict() for member in self.members]}

    def _parse(self, state: object) -> dict[str, object]:
        states = Reader(self, state, "members").sequence("members", None)
        if len(states) != len(self.members):
            raise ValueError(
                f"state of {type(self).__name__}: {len(states)} members, "
                f"this one has {len(self.members)}"
            )
        return {"members": [m._parse(s) for m, s in zip(self.members, states, strict=True)]}

    def _restore(self, parsed: dict[str, object]) -> None:
        for member, fields in zip(
            self.members, cast(list[dict[str, object]], parsed["members"]), strict=True
        ):
            member._restore(fields)
        Switchover.reset(self)

    def _leaves(self) -> Iterator[Switchover]:
        for member in self.members:
            yield from member._leaves()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.members))})"


class All(_Composite):
    """Switch when all members say so after the same Adam step; also written ``a & b``.

    Nothing latches: a member that was true before and no longer is counts as false.
    """

    def __init__(self, *members: Switchover) -> None:
        super().__init__(*members)
        self.at_once = all(member.at_once for member in self.members)
        Switchover.reset(self)

    def waiting(self, step: int, epoch: int) -> str:
        """What each member waits for that has not said so last."""
        return self._waiting(step, epoch, "; and ")

    def _verdict(self, obs: Observation) -> str:
        return self._reasons() if all(self._observe_all(obs)) else ""


class Any(_Composite):
    """Switch when any member says so; also written ``a | b``."""

    def __init__(self, *members: Switchover) -> None:
        super().__init__(*members)
        self.at_once = any(member.at_once for member in self.members)
        Switchover.reset(self)

    def waiting(self, step: int, epoch: int) -> str:
        """What each member waits for."""
        return self._waiting(step, epoch, "; or ")

    def _verdict(self, obs: Observation) -> str:
        return self._reasons() if any(self._observe_all(obs)) else ""


class Reader:
    """A state under inspection; every ValueError names the kind of criterion and the field."""

    def __init__(self, owner: Switchover, state: object, *fields: str) -> None:
        kind = type(owner).__name__
        self._of = f"state of {kind}"
        if not isinstance(state, dict):
            raise ValueError(f"{self._of}: expected a dict, got {state!r}")
        if state.get("kind") != kind:
            raise ValueError(f"{self._of}: kind is {state.get('kind')!r}")
        for what, names in (
            ("missing", {*fields} - {*state}),
            ("unknown", {*state} - {"kind", *fields}),
        ):
            if names:
                raise ValueError(f"{self._of}: {what} fields {sorted(map(str, names))}")
        self._state: dict[str, object] = state

    def same(self, name: str, expected: object) -> None:
        """Check that a field is what this criterion has."""
        if self._state[name] != expected:
            raise ValueError(f"{self._of}: {name}={self._state[name]!r}, expected {expected!r}")

    def integer(self, name: str) -> int:
        """An integer >= 0."""
        value = self._state[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._invalid(name)
        return value

    def number(self, name: str) -> float:
        """A usable number."""
        value = self._state[name]
        if not _is_number(value):
            raise self._invalid(name)
        return value

    def optional(self, name: str) -> float | None:
        """A usable number or None."""
        return None if self._state[name] is None else self.number(name)

    def string(self, name: str) -> str:
        """A string."""
        value = self._state[name]
        if not isinstance(value, str):
            raise self._invalid(name)
        return value

    def sequence(self, name: str, most: int | None) -> list[object]:
        """A list of at most ``most`` items."""
        value = self._state[name]
        if not isinstance(value, list) or (most is not None and len(value) > most):
            raise self._invalid(name)
        return value

    def numbers(self, name: str, most: int | None) -> list[float]:
        """A list of at most ``most`` usable numbers."""
        values = self.sequence(name, most)
        if not all(map(_is_number, values)):
            raise self._invalid(name)
        return cast(list[float], values)

    def _invalid(self, name: str) -> ValueError:
        return ValueError(f"{self._of}: {name}={self._state[name]!r} is not valid")


def usable(value: float | None) -> TypeGuard[float]:
    """Whether a loss or squared norm counts: it is finite, and sums of it will be."""
    return value is not None and abs(value) <= LARGEST


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and usable(value)
