"""Criteria that count steps ("simple iteration" in FUSE, section II.C) or epochs."""

from collections import deque

from fuse_ext.checks import check_integer
from fuse_ext.switch.criterion import AT_ONCE, Observation, Reader, Switchover, usable


class Never(Switchover):
    """Stay with Adam."""

    def waiting(self, step: int, epoch: int) -> str:
        """It never switches."""
        return "switch=Never()"

    def _verdict(self, obs: Observation) -> str:
        return ""


class AtOnce(Switchover):
    """Begin with L-BFGS: switch before the first Adam step."""

    at_once = True
    reason = AT_ONCE

    def _verdict(self, obs: Observation) -> str:
        return AT_ONCE


class AfterSteps(Switchover):
    """Switch after ``n`` Adam steps ("simple iteration" in II.C); 0 is :class:`AtOnce`."""

    def __init__(self, n: int) -> None:
        check_integer("n", n, 0)
        self.n = n
        self.at_once = self.n == 0
        self.reset()

    def waiting(self, step: int, epoch: int) -> str:
        """Steps done, of how many."""
        return f"{step} of {self.n} steps"

    def _verdict(self, obs: Observation) -> str:
        return f"step {obs.step} >= n={self.n}" if obs.step >= self.n else ""

    def __repr__(self) -> str:
        return f"AfterSteps(n={self.n})"


class AfterEpochs(Switchover):
    """Switch after ``n`` epochs, as in the paper's experiments; 0 is :class:`AtOnce`.

    With ``steps_per_epoch`` an epoch is that many Adam steps, and the switch follows the last of
    them. Without, epochs are what the optimizer's ``next_epoch()`` counts, and the switch follows
    the first Adam step after the call.
    """

    def __init__(self, n: int, steps_per_epoch: int | None = None) -> None:
        check_integer("n", n, 0)
        if steps_per_epoch is not None:
            check_integer("steps_per_epoch", steps_per_epoch, 1)
        self.n = n
        self.steps_per_epoch = steps_per_epoch
        self.at_once = self.n == 0
        self.reset()

    def waiting(self, step: int, epoch: int) -> str:
        """Epochs done, of how many."""
        done = epoch if self.steps_per_epoch is None else step // self.steps_per_epoch
        return f"{done} of {self.n} epochs"

    def _verdict(self, obs: Observation) -> str:
        steps = self.steps_per_epoch
        epoch = obs.epoch if steps is None else obs.step // steps
        return f"epoch {epoch} >= n={self.n} at step {obs.step}" if epoch >= self.n else ""

    def __repr__(self) -> str:
        return f"AfterEpochs(n={self.n}, steps_per_epoch={self.steps_per_epoch})"


class WarmUp(Switchover):
    """Switch after ``n`` Adam steps, if the losses are those of one smooth function.

    Where the closure is the same function at every step, L-BFGS gains more per evaluation than
    Adam almost from the start: on two physics-informed networks and 1,200 evaluations, switches
    after 10 to 100 steps ended 1.8 to 7 times lower than the recipe of 500 steps and one long one
    of torch.optim.LBFGS, and 10 to 70 times lower than with one iteration a step; beside
    torch.optim.LBFGS from the very start they ended at 0.5 to 2.4 times its loss, better on one
    network and worse on the other (medians of five starts, ``python -m benchmarks.switching``).
    Minibatches are told by the turning points of the last ``n`` losses: independent noise turns at
    two steps of three (Kendall and Stuart), a smooth function, even where Adam makes it oscillate,
    at fewer than one of four. Then it waits, for good if need be; FusePV's default for
    ``deterministic=True`` is ``WarmUp() | LossPlateau()``.

    Args:
        n: Steps; at least 10.

    Attributes:
        refused: The turning points where n steps are done and they are too many; else 0.

    References:
        M. G. Kendall and A. Stuart, The Advanced Theory of Statistics, volume 3, 1966, Section
        45.18.
    """

    needs_loss = True

    def __init__(self, n: int = 100) -> None:
        check_integer("n", n, 10)
        self.n = n
        self.reset()

    def reset(self) -> None:
        """Forget the losses."""
        super().reset()
        self._turns: deque[float] = deque(maxlen=self.n - 2)  # 1 at a turning point
        self._previous: float | None = None
        self._rising = 0  # whether the last loss was higher than the one before
        self.refused = 0  # turning points, where they were too many for a switch that was due

    def waiting(self, step: int, epoch: int) -> str:
        """Steps done, or why more than n are."""
        if not self.refused:
            return f"{step} of {self.n} steps of a smooth loss"
        return (
            f"the loss turned at {self.refused} of the last {self.n} steps, as on minibatches, "
            "with dropout or with too large an lr"
        )

    def _verdict(self, obs: Observation) -> str:
        if usable(obs.loss):
            if self._previous is not None:
                rising = int(obs.loss > self._previous)
                self._turns.append(abs(rising - self._rising))
                self._rising = rising
            self._previous = obs.loss
        turns = int(sum(self._turns))
        due = obs.step >= self.n and len(self._turns) >= self.n - 2
        self.refused = turns if due and 4 * turns > self.n else 0
        if not due or self.refused:
            return ""
        return f"step {obs.step} >= n={self.n} of a smooth loss ({turns} turning points)"

    def _state(self) -> dict[str, object]:
        return {
            "n": self.n,
            "turns": list(self._turns),
            "previous": self._previous,
            "rising": self._rising,
        }

    def _parse(self, state: object) -> dict[str, object]:
        read = Reader(self, state, "n", "turns", "previous", "rising")
        read.same("n", self.n)
        return {
            "_turns": deque(read.numbers("turns", self.n - 2), self.n - 2),
            "_previous": read.optional("previous"),
            "_rising": read.integer("rising"),
        }

    def __repr__(self) -> str:
        return f"WarmUp(n={self.n})"
