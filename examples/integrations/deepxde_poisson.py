"""DeepXDE (PyTorch backend): model.compile(FusePV(...)), resampling, and the report ends the run.

u_xx = -pi^2 sin(pi x) on [-1, 1] with u = 0 at the ends. One optimizer in place of "adam" and then
"L-BFGS": one compile, one train.
"""

from __future__ import annotations

import os

os.environ.setdefault("DDE_BACKEND", "pytorch")

import deepxde as dde
import numpy as np
import torch

from fuse_ext import FusePV


class StopWhenConverged(dde.callbacks.Callback):
    """Ends ``model.train`` where FusePV has nothing left to gain."""

    def on_epoch_end(self) -> None:
        """After every step."""
        if self.model.opt.report().converged:
            self.model.stop_training = True


class NewPoints(dde.callbacks.PDEPointResampler):
    """Draws points anew every ``period`` steps, and says so to FusePV."""

    def on_epoch_end(self) -> None:
        """After every step."""
        super().on_epoch_end()
        if self.epochs_since_last_resample == 0:
            self.model.opt.new_objective()


def make(width: int = 20) -> tuple[dde.Model, FusePV]:
    """The problem, and the optimizer it is compiled with."""
    dde.config.set_default_float("float64")
    dde.config.set_random_seed(0)

    def residual(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return dde.grad.hessian(u, x) + np.pi**2 * torch.sin(np.pi * x)

    line = dde.geometry.Interval(-1, 1)
    ends = dde.icbc.DirichletBC(line, lambda x: 0, lambda x, on_boundary: on_boundary)
    data = dde.data.PDE(line, residual, ends, num_domain=32, num_boundary=2)
    net = dde.nn.FNN([1, width, width, 1], "tanh", "Glorot uniform")
    model = dde.Model(data, net)
    optimizer = FusePV(net.parameters(), lr=1e-3, deterministic=True)
    model.compile(optimizer)
    return model, optimizer


def train(steps: int = 2000, resample_every: int = 0) -> tuple[float, FusePV]:
    """Trains; the relative l2 error, and the optimizer."""
    model, optimizer = make()
    callbacks: list[dde.callbacks.Callback] = [StopWhenConverged()]
    if resample_every:
        callbacks.append(NewPoints(period=resample_every))
    model.train(iterations=steps, callbacks=callbacks, display_every=200, verbose=0)
    x = np.linspace(-1, 1, 201)[:, None]
    exact = np.sin(np.pi * x)
    return float(np.linalg.norm(model.predict(x) - exact) / np.linalg.norm(exact)), optimizer


if __name__ == "__main__":
    error, optimizer = train()
    print(optimizer.report())
    print(f"relative error {error:.1e} on fixed points, {train(resample_every=100)[0]:.1e} on new")
