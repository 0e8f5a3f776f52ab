"""Criteria for problems whose least loss or solution is known (FUSE, section II.C)."""

import math
from collections.abc import Sequence

import torch

from fuse_ext.checks import check_integer, check_number
from fuse_ext.switch.criterion import Observation, Switchover, usable
from fuse_ext.switch.mean import MeanCriterion


class LossGap(MeanCriterion):
    """Switch when ``f - f_star <= sigma``, for problems whose least loss is known (II.C).

    Args:
        f_star: The least loss.
        sigma: The bound; >= 0.
        window: ``f`` is the mean of the last that many losses.
    """

    needs_loss = True

    def __init__(self, f_star: float, sigma: float, window: int = 1) -> None:
        check_number("f_star", f_star, -math.inf)
        self.f_star = float(f_star)
        check_number("sigma", sigma, 0.0)
        check_integer("window", window, 1)
        self.sigma = float(sigma)
        super().__init__(window)

    def waiting(self, step: int, epoch: int) -> str:
        """The gap so far."""
        value = self._mean.value - self.f_star if self._mean.full else 0.0
        return self._holds("f - f*", value, f"sigma={self.sigma:g}")

    def _verdict(self, obs: Observation) -> str:
        if usable(obs.loss):
            self._mean.push(obs.loss)
        if not self._mean.full or self._mean.value - self.f_star > self.sigma:
            return ""
        value = f"{self._mean.value - self.f_star:.3g} <= sigma={self.sigma:g}"
        return f"loss gap f - f* {value} {self._over(obs)}"

    def __repr__(self) -> str:
        return f"LossGap(f_star={self.f_star!r}, sigma={self.sigma!r}, window={self.window})"


class NearSolution(Switchover):
    """Switch when ``||x - x_star|| <= sigma``, for problems whose solution is known (II.C).

    The norm is taken in float64, in a pass over the parameters after every Adam step, for which
    the CPU waits.

    Args:
        x_star: A tensor, or a sequence of tensors, with the shapes of the parameters.
        sigma: The bound; >= 0.
    """

    def __init__(self, x_star: torch.Tensor | Sequence[torch.Tensor], sigma: float) -> None:
        tensors = [x_star] if isinstance(x_star, torch.Tensor) else x_star
        if not isinstance(tensors, Sequence):
            raise TypeError(f"x_star must be a tensor or a sequence of tensors, got {x_star!r}")
        for i, x in enumerate(tensors):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"x_star[{i}] must be a tensor, got {x!r}")
            if not torch.isfinite(x).all():
                raise ValueError(f"x_star[{i}] has an entry that is NaN or infinite")
        check_number("sigma", sigma, 0.0)
        self.sigma = float(sigma)
        self.x_star = tuple(x.detach().clone() for x in tensors)

    def check(self, params: Sequence[torch.Tensor]) -> None:
        """Raise ValueError if the parameters have not the shapes of ``x_star``."""
        if any(hasattr(p, "placements") for p in params):
            raise ValueError("x_star: NearSolution does not know parameters that are DTensors")
        expected = [tuple(x.shape) for x in self.x_star]
        shapes = [tuple(p.shape) for p in params]
        if shapes != expected:
            raise ValueError(f"x_star has the shapes {expected}, the parameters have {shapes}")

    def _verdict(self, obs: Observation) -> str:
        self.check(obs.params)
        norms = []
        for p, x in zip(obs.params, self.x_star, strict=True):
            wide = torch.complex128 if p.is_complex() or x.is_complex() else torch.float64
            difference = p.detach().to(wide) - x.to(p.device, wide)
            norms.append(float(torch.linalg.vector_norm(difference)))
        distance = math.hypot(*norms)
        if not distance <= self.sigma:
            return ""
        return f"distance ||x - x*|| {distance:.3g} <= sigma={self.sigma:g} at step {obs.step}"

    def __repr__(self) -> str:
        if sum(x.numel() for x in self.x_star) <= 20:
            shown = [f"torch.tensor({x.tolist()}, dtype={x.dtype})" for x in self.x_star]
        else:
            shown = [f"<tensor of shape {tuple(x.shape)}>" for x in self.x_star]
        return f"NearSolution(x_star=[{', '.join(shown)}], sigma={self.sigma!r})"
