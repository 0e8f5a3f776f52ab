"""PINA: FusePV in its solver and trainer; the report ends the run.

u_xx + u_yy = -2 pi^2 sin(pi x) sin(pi y) on the unit square with u = 0 at its edge.
"""

from __future__ import annotations

import logging
import math
import warnings

import torch
from lightning.pytorch.callbacks import Callback
from pina import Condition, Trainer
from pina.domain import CartesianDomain
from pina.equation import Equation
from pina.equation.zoo import FixedValue
from pina.model import FeedForward
from pina.operator import laplacian
from pina.optim import TorchOptimizer
from pina.problem import SpatialProblem
from pina.solver import PhysicsInformedSingleModelSolver

from fuse_ext import FusePV, unwrap


def source(input_: torch.Tensor, output_: torch.Tensor) -> torch.Tensor:
    """The equation's residual."""
    x, y = input_.extract(["x"]), input_.extract(["y"])
    force = 2 * math.pi**2 * torch.sin(math.pi * x) * torch.sin(math.pi * y)
    return laplacian(output_, input_, components=["u"], d=["x", "y"]) + force


class Poisson(SpatialProblem):
    """On the unit square."""

    output_variables = ["u"]  # noqa: RUF012 (PINA reads it from the class)
    spatial_domain = CartesianDomain({"x": [0, 1], "y": [0, 1]})
    domains = {  # noqa: RUF012
        "inside": spatial_domain,
        "left": CartesianDomain({"x": 0, "y": [0, 1]}),
        "right": CartesianDomain({"x": 1, "y": [0, 1]}),
        "below": CartesianDomain({"x": [0, 1], "y": 0}),
        "above": CartesianDomain({"x": [0, 1], "y": 1}),
    }
    conditions = {  # noqa: RUF012
        "inside": Condition(domain="inside", equation=Equation(source)),
        **{
            side: Condition(domain=side, equation=FixedValue(0.0))
            for side in ("left", "right", "below", "above")
        },
    }


class StopWhenConverged(Callback):
    """Ends ``trainer.train`` where FusePV has nothing left to gain."""

    def on_train_batch_end(self, trainer, *args) -> None:
        """After every step."""
        if unwrap(trainer.optimizers[0]).report().converged:
            trainer.should_stop = True


def make(steps: int, **options) -> Trainer:
    """The problem, a network and FusePV in PINA's trainer; options are the optimizer's."""
    torch.manual_seed(0)
    problem = Poisson()
    problem.discretise_domain(100, "grid", domains="inside")
    problem.discretise_domain(20, "grid", domains=["left", "right", "below", "above"])
    model = FeedForward(2, 1, inner_size=16, n_layers=2, func=torch.nn.Tanh)
    optimizer = TorchOptimizer(FusePV, lr=1e-3, deterministic=True, **options)
    return Trainer(
        PhysicsInformedSingleModelSolver(problem, model, optimizer=optimizer),
        max_epochs=steps,
        batch_size=None,  # the promise of deterministic=True
        accelerator="cpu",
        callbacks=[StopWhenConverged()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        train_size=1.0,
        val_size=0.0,
        test_size=0.0,
    )


def error_of(trainer: Trainer) -> float:
    """Relative, in the l2 norm, on a grid of its own."""
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 21)] * 2)
    exact = torch.sin(math.pi * grid).prod(1, keepdim=True)
    with torch.no_grad():
        return float((trainer.solver.model(grid) - exact).norm() / exact.norm())


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    trainer = make(steps=500)
    trainer.train()
    print(unwrap(trainer.optimizers[0]).report())
    print(f"relative error {error_of(trainer):.1e}")
