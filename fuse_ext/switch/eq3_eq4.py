"""FUSE's Eq. 3, the mean squared gradient norm, and Eq. 4, the mean change of the loss.

Deviation from the paper:
    - Eq. 4's expectation is taken over a window; a single difference, as printed, is chance on
      minibatches.
"""

from fuse_ext.checks import check_integer, check_number
from fuse_ext.switch.criterion import Observation, Reader, usable
from fuse_ext.switch.mean import MeanCriterion


class GradNorm(MeanCriterion):
    """Switch when the mean squared gradient norm is at most ``zeta`` (Eq. 3).

    Args:
        zeta: The bound; >= 0.
        window: None takes the mean over all steps since Adam began or was returned to, as Eq. 3
            is printed, in which the first gradients weigh for long; an integer over the last that
            many steps.
    """

    needs_grad_norm = True

    def __init__(self, zeta: float, window: int | None = None) -> None:
        check_number("zeta", zeta, 0.0)
        if window is not None:
            check_integer("window", window, 1)
        self.zeta = float(zeta)
        super().__init__(window)

    def waiting(self, step: int, epoch: int) -> str:
        """The mean so far."""
        value = self._mean.value if self._mean.full else 0.0
        return self._holds("the squared gradient norm", value, f"zeta={self.zeta:g}")

    def _verdict(self, obs: Observation) -> str:
        if usable(obs.grad_norm_sq):
            self._mean.push(obs.grad_norm_sq)
        if not self._mean.full or self._mean.value > self.zeta:
            return ""
        value = f"{self._mean.value:.3g} <= zeta={self.zeta:g}"
        return f"squared gradient norm {value} {self._over(obs)} (Eq. 3)"

    def __repr__(self) -> str:
        return f"GradNorm(zeta={self.zeta!r}, window={self.window})"


class LossChange(MeanCriterion):
    """Switch when the mean of ``|f_k - f_{k-1}|`` is at most ``sigma`` (Eq. 4).

    Args:
        sigma: The bound; >= 0. On minibatches the mean settles at the loss's noise, and
            ``sigma`` must lie above it.
        window: The differences over which Eq. 4's expectation is taken; 1 is the single
            difference as printed, which on minibatches is chance.
    """

    needs_loss = True
    _fields = (*MeanCriterion._fields, "previous")

    def __init__(self, sigma: float, window: int = 100) -> None:
        check_number("sigma", sigma, 0.0)
        check_integer("window", window, 1)
        self.sigma = float(sigma)
        super().__init__(window)

    def reset(self) -> None:
        """Forget the losses."""
        super().reset()
        self._previous: float | None = None

    def waiting(self, step: int, epoch: int) -> str:
        """The mean so far."""
        value = self._mean.value if self._mean.full else 0.0
        return self._holds("the loss's change", value, f"sigma={self.sigma:g}")

    def _verdict(self, obs: Observation) -> str:
        if usable(obs.loss):
            if self._previous is not None:
                self._mean.push(abs(obs.loss - self._previous))
            self._previous = obs.loss
        if not self._mean.full or self._mean.value > self.sigma:
            return ""
        value = f"{self._mean.value:.3g} <= sigma={self.sigma:g}"
        return f"loss change {value} {self._over(obs)} (Eq. 4)"

    def _state(self) -> dict[str, object]:
        return {**super()._state(), "previous": self._previous}

    def _parse(self, state: object) -> dict[str, object]:
        previous = Reader(self, state, *self._fields).optional("previous")
        return {**super()._parse(state), "_previous": previous}

    def __repr__(self) -> str:
        return f"LossChange(sigma={self.sigma!r}, window={self.window})"
