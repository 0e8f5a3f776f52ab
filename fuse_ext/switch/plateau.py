"""The loss plateau: the criterion for leaving Adam where a line search follows."""

import math
from collections import deque
from itertools import combinations
from statistics import median

from fuse_ext.checks import check_integer, check_number
from fuse_ext.switch.criterion import LARGEST, Observation, Reader, Switchover, usable

_BLOCKS = 20  # block means in a window; a check compares all pairs of them
_CHECKS = 4  # checks per window
_PAIRS = list(combinations(range(_BLOCKS), 2))
# Standard deviation of Kendall's S when all orders of the block means are equally likely.
_S_DEVIATION = math.sqrt(_BLOCKS * (_BLOCKS - 1) * (2 * _BLOCKS + 5) / 18)


class LossPlateau(Switchover):
    """Switch when the loss has stopped decreasing, or nearly so; needs no tuning.

    FusePV's default before a line search, unless the closure is promised to be deterministic.

    The last ``window`` losses are averaged in 20 blocks. Four times per window the loss is found
    to make no progress if

    - the block means show no significant decrease by the Mann-Kendall trend test, which knows
      only their order (no scale, offset or outlier changes it); or
    - the loss is free of noise (it rose at fewer than a quarter of the steps) and its decrease
      over the window, by Sen's slope, is at most ``rtol`` times its level or the range of the
      block means since the start, whichever is less. The level is the yardstick for a loss that
      goes to 0, the range for a loss with an offset.

    The switch comes when all checks over ``patience`` windows find no progress, or when the
    median block mean has reached no new minimum for ``patience + 3`` windows, however steeply the
    loss falls between its bursts. So it comes after ``patience * window`` steps at the earliest;
    a shorter run wants a smaller window.

    Measured with the defaults: over 30 windows of exponential decay they see half-lives of up to 3
    windows without noise, and up to 10, 3 and 0.5 windows through noise of 10, 30 and 100 % of
    the loss; stationary noise is recognised after 2 windows in 80 % and after 4 in 99 % of cases.
    With Adam at a learning rate of 1e-3 the switch came after 1,100 steps on a weight-decayed MLP
    (scikit-learn's digits, batch 64; loss 0.20 of a final 0.18), after 2,300 to 3,550 steps
    without the decay, where 45 % batch noise hides a half-life of 1,000 steps, and with full
    batches after 1,200 to 1,450 steps on a Poisson PINN and 1,850 to 2,100 on a fit of two sines;
    L-BFGS (m = 10) from there ended 3 to 290 times below Adam at 3,000 gradients.

    A plateau at a saddle looks like any other. A loss that falls in stairs, epoch by epoch, wants
    a window of an epoch at least.

    Args:
        window: Steps; a multiple of 20.
        rtol: The relative decrease per window that a loss without noise must exceed; >= 0.
        z: How many standard deviations make a decrease significant; >= 0. 1.645 is the one-sided
            5 % level.
        patience: Windows; >= 1.

    References:
        - H. B. Mann, Nonparametric tests against trend, Econometrica 13, 1945, pp. 245-259.
        - P. K. Sen, Estimates of the regression coefficient based on Kendall's tau, Journal of
          the American Statistical Association 63, 1968, pp. 1379-1389.
    """

    needs_loss = True

    def __init__(
        self, window: int = 200, rtol: float = 0.2, z: float = 1.645, patience: int = 2
    ) -> None:
        check_integer("window", window, _BLOCKS)
        if window % _BLOCKS:
            raise ValueError(f"window must be a multiple of {_BLOCKS}, got {window}")
        check_number("rtol", rtol, 0.0)
        check_number("z", z, 0.0)
        check_integer("patience", patience, 1)
        self.window = window
        self.rtol = float(rtol)
        self.z = float(z)
        self.patience = patience
        self.reset()

    def reset(self) -> None:
        """Forget the losses."""
        super().reset()
        self._blocks: deque[float] = deque(maxlen=_BLOCKS)  # means
        self._rises: deque[int] = deque(maxlen=_BLOCKS)  # steps of each block that raised the loss
        self._sum = 0.0  # of the block being filled, as are the next two
        self._count = 0
        self._rising = 0
        self._previous: float | None = None
        self._highest = -LARGEST  # of all block means
        self._lowest = LARGEST
        self._unchecked = 0  # blocks since the last check
        self._streak = 0  # checks in a row that found no progress
        self._least_median = LARGEST
        self._checks_since_least = 0
        self._finding = ""  # of the last check

    def waiting(self, step: int, epoch: int) -> str:
        """What the checks have found so far."""
        needed = _CHECKS * (self.patience - 1) + 1
        if self._streak:
            return f"{self._streak} of {needed} checks in a row found a plateau ({self._finding})"
        if self._least_median == LARGEST:
            return f"a plateau of the loss shows after {self.window} steps at the earliest"
        return "the loss still falls"

    def _verdict(self, obs: Observation) -> str:
        if usable(obs.loss):
            self._push(obs.loss)
        if self._streak > _CHECKS * (self.patience - 1):
            steps = self.patience * self.window
            return f"loss plateau over {steps} steps at step {obs.step} ({self._finding})"
        if self._checks_since_least >= _CHECKS * (self.patience + 3):
            steps = (self.patience + 3) * self.window
            return f"no new minimum of the loss for {steps} steps at step {obs.step}"
        return ""

    def _push(self, loss: float) -> None:
        self._sum += loss
        self._count += 1
        self._rising += self._previous is not None and loss > self._previous
        self._previous = loss
        if self._count < self.window // _BLOCKS:
            return
        mean = self._sum / self._count
        self._blocks.append(mean)
        self._rises.append(self._rising)
        self._sum, self._count, self._rising = 0.0, 0, 0
        self._highest = max(self._highest, mean)
        self._lowest = min(self._lowest, mean)
        self._unchecked += 1
        if len(self._blocks) == _BLOCKS and self._unchecked >= _BLOCKS // _CHECKS:
            self._unchecked = 0
            self._check()

    def _check(self) -> None:
        blocks = list(self._blocks)
        level = median(blocks)
        if level < self._least_median:
            self._least_median, self._checks_since_least = level, 0
        else:
            self._checks_since_least += 1

        s = sum((blocks[j] > blocks[i]) - (blocks[j] < blocks[i]) for i, j in _PAIRS)
        z = s / _S_DEVIATION
        slope = median((blocks[j] - blocks[i]) / (j - i) for i, j in _PAIRS)
        decrease = -slope * _BLOCKS
        yardstick = min(abs(level), self._highest - self._lowest)
        self._finding = ""
        if z > -self.z:
            self._finding = f"no significant decrease: Mann-Kendall z {z:.2f} > -{self.z:g}"
        elif 4 * sum(self._rises) < self.window and decrease <= self.rtol * yardstick:
            self._finding = (
                f"decrease {decrease:.3g} in {self.window} steps <= "
                f"rtol={self.rtol:g} of {yardstick:.3g}"
            )
        self._streak = self._streak + 1 if self._finding else 0

    def _state(self) -> dict[str, object]:
        return {
            "window": self.window,
            "blocks": list(self._blocks),
            "rises": list(self._rises),
            **{name: getattr(self, f"_{name}") for name in (*_NUMBERS, *_INTEGERS)},
            "previous": self._previous,
            "finding": self._finding,
        }

    def _parse(self, state: object) -> dict[str, object]:
        lists = ("blocks", "rises")
        fields = ("window", *lists, *_NUMBERS, *_INTEGERS, "previous", "finding")
        read = Reader(self, state, *fields)
        read.same("window", self.window)
        return {
            **{f"_{name}": deque(read.numbers(name, _BLOCKS), _BLOCKS) for name in lists},
            **{f"_{name}": read.number(name) for name in _NUMBERS},
            **{f"_{name}": read.integer(name) for name in _INTEGERS},
            "_previous": read.optional("previous"),
            "_finding": read.string("finding"),
        }

    def __repr__(self) -> str:
        return (
            f"LossPlateau(window={self.window}, rtol={self.rtol!r}, z={self.z!r}, "
            f"patience={self.patience})"
        )


_NUMBERS = ("sum", "highest", "lowest", "least_median")
_INTEGERS = ("count", "rising", "unchecked", "streak", "checks_since_least")
