"""The optimizers that FusePV is held against on minibatches: torch's, and two packages'."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.averages import Averaged
from benchmarks.harness.networks import hidden_matrices

# Packages that are taken into account where they are installed.
PACKAGES = {"schedule_free": "schedulefree", "soap": "pytorch-optimizer"}


def version_of(name: str) -> str | None:
    """The package that an optimizer comes from, with its version; None where it is torch.

    Raises:
        RuntimeError: There is no such package, or this torch has no such optimizer.
    """
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"torch {torch.__version__} has no Muon")
    if name not in PACKAGES:
        return None
    try:
        return f"{PACKAGES[name]} {version(PACKAGES[name])}"
    except PackageNotFoundError as error:
        raise RuntimeError(f"{PACKAGES[name]} is not installed") from error


class Relay:
    """Adam for ``switch_step`` steps, then another optimizer on the same parameters."""

    def __init__(self, first: Any, second: Any, phase: str, switch_step: int) -> None:
        self.first, self.second, self.second_phase = first, second, phase
        self.switch_step, self.steps = switch_step, 0

    @property
    def phase(self) -> str:
        """Whose turn it is."""
        return "adam" if self.steps < self.switch_step else self.second_phase

    def step(self, closure: Callable[[], Tensor]) -> Any:
        """A step of the optimizer whose turn it is."""
        optimizer = self.first if self.phase == "adam" else self.second
        self.steps += 1
        return optimizer.step(closure)


class Together:
    """Several optimizers, each on parameters of its own, on one gradient."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """A step of each."""
        loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


def build(model: nn.Module, name: str, options: dict[str, Any], steps_per_epoch: int) -> Any:
    """An optimizer.

    Args:
        model: Whose parameters it is for.
        name: "sgd", "adam", "adamw", "adam_averaged" (judged by its mean), "muon" (with AdamW for
            all that is no hidden matrix), "schedule_free" (AdamW), "soap", or "adam_sgd" and
            "adam_torch_lbfgs", which relay.
        options: Keyword arguments. The two that relay take "switch" (epochs) or "switch_step",
            and "sgd_lr" the first of them.
        steps_per_epoch: Steps in an epoch.

    Raises:
        ValueError: No such optimizer.
        RuntimeError: Its package is missing.
    """
    options, params = dict(options), list(model.parameters())
    version_of(name)
    if name == "sgd":
        return torch.optim.SGD(params, **options)
    if name == "adam":
        return torch.optim.Adam(params, fused=True, **options)
    if name == "adamw":
        return torch.optim.AdamW(params, fused=True, **options)
    if name == "adam_averaged":
        return Averaged(model, torch.optim.Adam(params, fused=True, **options))
    if name == "muon":
        return _muon(model, options)
    if name == "schedule_free":
        return _schedule_free(params, options)
    if name == "soap":
        return _soap(params, options)
    if name in ("adam_sgd", "adam_torch_lbfgs"):
        return _relay(params, name, options, steps_per_epoch)
    raise ValueError(f"optimizer name {name!r} is not known")


def _muon(model: nn.Module, options: dict[str, Any]) -> Together:
    hidden = hidden_matrices(model)
    known = {id(matrix) for matrix in hidden}
    others = [p for p in model.parameters() if id(p) not in known]
    decay = {"lr": options["lr"], "weight_decay": options.get("weight_decay", 0.0)}
    # With the length of an AdamW step one learning rate does for both.
    muon = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **decay)
    return Together(muon, torch.optim.AdamW(others, fused=True, **options))


def _schedule_free(params: list[Tensor], options: dict[str, Any]) -> Any:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(params, **options)
    optimizer.train()
    return optimizer


def _soap(params: list[Tensor], options: dict[str, Any]) -> Any:
    from pytorch_optimizer import SOAP

    # Its own betas, 0.95 both, are its authors' choice; Adam's belong to Adam.
    return SOAP(params, **{key: value for key, value in options.items() if key != "betas"})


def _relay(params: list[Tensor], name: str, options: dict[str, Any], steps_per_epoch: int) -> Relay:
    step = options.pop("switch_step", None)
    if step is None:
        step = round(options.pop("switch") * steps_per_epoch)
    adam = torch.optim.Adam(params, lr=options.pop("lr"), fused=True)
    if name == "adam_sgd":
        options["lr"] = options.pop("sgd_lr")
        return Relay(adam, torch.optim.SGD(params, **options), "sgd", step)
    options = {"max_iter": 1, "history_size": 10, "line_search_fn": "strong_wolfe", **options}
    return Relay(adam, torch.optim.LBFGS(params, **options), "lbfgs", step)
