"""GPyTorch and BoTorch: the marginal likelihood by FusePV, trials that fail included.

Where a trial makes the covariance singular, or NaN, its Cholesky factorisation raises: with
``trial_errors`` that is a step that is too long.
"""

from __future__ import annotations

from typing import Any

import gpytorch
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim.core import OptimizationResult, OptimizationStatus
from botorch.optim.utils.model_utils import get_parameters_and_bounds
from gpytorch.mlls import ExactMarginalLogLikelihood, MarginalLogLikelihood
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor, nn
from torch.func import functional_call

import fuse_ext
from fuse_ext import FusePV

FAILED_TRIALS = (NanError, NotPSDError, torch.linalg.LinAlgError)


def fit(mll: MarginalLogLikelihood, steps: int = 300, **options: Any) -> FusePV:
    """Maximises the marginal likelihood of an exact GP; the optimizer tells how it went."""
    mll.train()
    options = {"lr": 0.05, "switch": 20, "deterministic": True, **options}
    optimizer = FusePV(
        (p for p in mll.parameters() if p.requires_grad), trial_errors=FAILED_TRIALS, **options
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        model = mll.model
        loss = -mll(model(*model.train_inputs), model.train_targets).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        if optimizer.report().converged:
            break
    return optimizer


class NegativeLikelihood(nn.Module):
    """What is to be minimised, as a module whose parameters torch.func can put in."""

    def __init__(self, mll: MarginalLogLikelihood) -> None:
        super().__init__()
        self.mll = mll

    def forward(self) -> Tensor:
        """At the data that the model was given."""
        model = self.mll.model
        return -self.mll(model(*model.train_inputs), model.train_targets).sum()


def fit_with_fuse(mll: MarginalLogLikelihood, **kwargs: Any) -> OptimizationResult:
    """What BoTorch takes: ``fit_gpytorch_mll(mll, optimizer=fit_with_fuse)``.

    BoTorch's parameters have bounds, so that this is ``fuse_ext.minimize`` with bounds, in place of
    scipy's L-BFGS-B, and stays on the GPU where they are there.
    """
    mll.train()
    params, bounds = get_parameters_and_bounds(mll, requires_grad=True)
    loss = NegativeLikelihood(mll)
    low = {name: bounds.get(name, (None, None))[0] for name in params}
    high = {name: bounds.get(name, (None, None))[1] for name in params}

    def fun(x: dict[str, Tensor]) -> Tensor:
        return functional_call(loss, {f"mll.{name}": value for name, value in x.items()}, ())

    found = fuse_ext.minimize(
        fun, params, bounds=(low, high), trial_errors=FAILED_TRIALS, maxfun=kwargs.get("steps", 500)
    )
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(found.x[name])
    status = OptimizationStatus.SUCCESS if found.success else OptimizationStatus.STOPPED
    return OptimizationResult(step=found.nit, fval=found.fun, status=status, message=found.message)


class Smooth(gpytorch.models.ExactGP):
    """A GP of GPyTorch's own."""

    def __init__(
        self, x: Tensor, y: Tensor, likelihood: gpytorch.likelihoods.GaussianLikelihood
    ) -> None:
        super().__init__(x, y, likelihood)
        self.mean = gpytorch.means.ConstantMean()
        self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        """The prior at x."""
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


def data(points: int = 30) -> tuple[Tensor, Tensor]:
    """A noisy sine."""
    torch.manual_seed(0)
    x = torch.linspace(0, 1, points, dtype=torch.float64)
    return x, torch.sin(6 * x) + 0.1 * torch.randn(points, dtype=torch.float64)


def gpytorchs() -> ExactMarginalLogLikelihood:
    """A likelihood of GPyTorch's own."""
    x, y = data()
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    return ExactMarginalLogLikelihood(likelihood, Smooth(x, y, likelihood).double()).double()


def botorchs() -> ExactMarginalLogLikelihood:
    """A likelihood of BoTorch's, with its priors and standardisation."""
    x, y = data()
    model = SingleTaskGP(x[:, None], y[:, None])
    return ExactMarginalLogLikelihood(model.likelihood, model)


def negative_likelihood(mll: MarginalLogLikelihood) -> float:
    """Where a fit has led."""
    mll.train()
    with torch.no_grad():
        return float(NegativeLikelihood(mll)())


if __name__ == "__main__":
    optimizer = fit(gpytorchs())
    print(optimizer.report(), "\n")
    mll = botorchs()
    fit_gpytorch_mll(mll, optimizer=fit_with_fuse)
    print(f"BoTorch: likelihood {-negative_likelihood(mll):.6f}", end=", ")
    scipys = botorchs()
    fit_gpytorch_mll(scipys)
    print(f"and by scipy's L-BFGS-B {-negative_likelihood(scipys):.6f}")
