"""One list of the ways in which the optimizers are used, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fuse_ext import LBFGS, Adam, Fuse, FusePV, Never

# Adam steps before L-BFGS where a test wants both.
FEW = 5
NEVER_STOP = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@dataclass(frozen=True)
class Configuration:
    """A kind of optimizer with its options, and what a loop has to know of it.

    Attributes:
        id: Its name in test ids.
        kind: Adam, LBFGS, FusePV or Fuse.
        options: What it is made with.
        phase: Where it ends up: "adam", "lbfgs" or "fuse".
        uses_line_search: After the switch, if there is one.
        one_function: The closure is promised to be the same function at every call.
        full_batch: The closure is that in truth, promised or not.
        living: The second phase is that for minibatches, in a living metric.
        driver: How ``step`` is called: with a "closure" alone, with a "batch_id" or "pair_closure".
        dtypes: Of the parameters that it is tested with.
    """

    id: str
    kind: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    phase: str = "lbfgs"
    uses_line_search: bool = False
    one_function: bool = False
    full_batch: bool = True
    living: bool = False
    driver: str = "closure"
    dtypes: tuple[torch.dtype, ...] = (F32, F64)

    def make(self, params: Any, **over: Any) -> torch.optim.Optimizer:
        """The optimizer of these parameters or groups; ``over`` are other options."""
        options = {**self.options, **over}
        if isinstance(options.get("switch"), type):  # criteria have a state: each its own
            options["switch"] = options["switch"]()
        return self.kind(params, **options)

    @property
    def needs_closure(self) -> bool:
        """Whether ``step()`` alone will not do."""
        return self.uses_line_search or self.options.get("max_iter", 1) > 1

    @property
    def capturable(self) -> bool:
        return bool(self.options.get("capturable"))

    @property
    def dense(self) -> bool:
        """Whether it ends up with a matrix, small as the tests' parameters are."""
        told = self.options.get("curvature", "auto")
        if told != "auto":
            return told == "dense"
        pairs = {"history_size", "history_dtype"} & self.options.keys()
        one_function = self.uses_line_search and self.options.get("deterministic") is not False
        steps_once = self.options.get("max_iter", 1) == 1
        return self.kind is FusePV and one_function and steps_once and not pairs

    @property
    def adam_steps(self) -> int | None:
        """Adam steps before the switch; None where there is none."""
        return self.options["switch"] if self.kind is FusePV and self.phase == "lbfgs" else None

    @property
    def descends(self) -> bool:
        """Whether no step of L-BFGS may raise the loss."""
        return self.phase == "lbfgs" and self.uses_line_search and self.full_batch

    @property
    def decouples(self) -> bool:
        """Whether it knows ``decoupled_weight_decay``."""
        return self.kind is not LBFGS

    @property
    def steps(self) -> int:
        """As many as show it at work: matrices have their bases 20 after the switch."""
        return 40 if self.living else 16


def _adam(name: str, **options: Any) -> Configuration:
    dtypes = options.pop("dtypes", (F32, F64))
    return Configuration(f"adam{name}", Adam, {"lr": 0.01, **options}, "adam", dtypes=dtypes)


def _lbfgs(name: str, **options: Any) -> Configuration:
    dtypes = options.pop("dtypes", (F32, F64))
    search = options.get("line_search_fn")
    promised = options.get("deterministic", False)
    defaults = {"max_iter": 1, "history_size": 10, "lr": 1.0 if search else 0.1, **NEVER_STOP}
    return Configuration(
        f"lbfgs_{name}",
        LBFGS,
        {**defaults, **options},
        uses_line_search=search is not None,
        one_function=promised,
        dtypes=dtypes,
    )


def _pv(name: str, switch: Any = FEW, **options: Any) -> Configuration:
    known = {
        key: options.pop(key)
        for key in ("uses_line_search", "full_batch", "living", "driver", "dtypes")
        if key in options
    }
    promised = bool(options.get("deterministic"))
    phase = "adam" if switch is Never else "lbfgs"
    return Configuration(
        f"pv_{name}",
        FusePV,
        {"lr": 0.01, "switch": switch, **options},
        phase,
        one_function=promised,
        **known,
    )


def _fuse(name: str, **options: Any) -> Configuration:
    search = options.get("line_search")
    return Configuration(
        f"fuse_{name}",
        Fuse,
        {"lr": 0.01, "theta": 0.5, "lbfgs_lr": 1.0 if search else 0.1, **options},
        "fuse",
        uses_line_search=search is not None,
        one_function=options.get("deterministic", False),
    )


SEARCHES = ("strong_wolfe", "approximate_wolfe", "armijo")
_SEARCHED = {"uses_line_search": True}
_SEARCH_SAID = {"line_search": "strong_wolfe", "uses_line_search": True}
_PROMISED = {"uses_line_search": True, "deterministic": True}
_LIVING = {"living": True, "full_batch": False}
_FIXED = {"line_search": None, "lbfgs_lr": 0.1}

CONFIGURATIONS = [
    _adam("", dtypes=(F32, F64, BF16)),
    _adam("_amsgrad", amsgrad=True),
    _adam("_decoupled", decoupled_weight_decay=True),
    _adam("_capturable", capturable=True),
    _adam("_reference", backend="reference"),
    _adam("_bf16_moments", moment_dtype=BF16, dtypes=(F32,)),
    _lbfgs("fixed", dtypes=(F32, F64, BF16)),
    _lbfgs("fixed_reference", backend="reference"),
    _lbfgs("capturable", capturable=True),
    *(
        _lbfgs(f"{search}{'_promised' * promised}", line_search_fn=search, deterministic=promised)
        for search in SEARCHES
        for promised in (False, True)
    ),
    _lbfgs("reference", line_search_fn="strong_wolfe", backend="reference"),
    _lbfgs("max_iter", line_search_fn="strong_wolfe", max_iter=5),
    _lbfgs("max_iter_fixed", max_iter=5),
    _lbfgs("bf16_history", line_search_fn="strong_wolfe", history_dtype=BF16, dtypes=(F32,)),
    _lbfgs("broyden", line_search_fn="strong_wolfe", self_scaling=True, update="broyden"),
    _lbfgs("int8_history", line_search_fn="strong_wolfe", history_dtype=torch.int8, dtypes=(F32,)),
    _pv("adam", Never, dtypes=(F32, F64, BF16)),
    _pv("diagonal", metric="diagonal", deterministic=False, **_LIVING, dtypes=(F32, F64, BF16)),
    _pv("kronecker", metric="kronecker", deterministic=False, **_LIVING, dtypes=(F32, F64, BF16)),
    _pv("diagonal_reference", metric="diagonal", backend="reference", **_LIVING),
    _pv("kronecker_watched", **_LIVING),
    _pv("kronecker_decoupled", metric="kronecker", decoupled_weight_decay=True, **_LIVING),
    _pv("found_one_function", **_SEARCHED),
    _pv("promised", **_PROMISED),
    _pv("promised_at_once", 0, **_PROMISED),
    _pv("promised_pairs", curvature="pairs", **_PROMISED),
    _pv("promised_broyden", 0, curvature="pairs", self_scaling=True, history_size=4, **_PROMISED),
    _pv("found_pairs", curvature="pairs", **_SEARCHED),
    _pv("dense_bfgs", update="bfgs", **_PROMISED),
    _pv("dense_unscaled", 0, self_scaling=False, **_PROMISED),
    _pv("dense_on_batches", curvature="dense", deterministic=False, **_SEARCH_SAID),
    _pv("promised_reference", 0, backend="reference", **_PROMISED),
    _pv("promised_bf16", 0, history_dtype=BF16, **_PROMISED, dtypes=(F32,)),
    _pv("strong_wolfe", line_search="strong_wolfe", **_SEARCHED),
    _pv("same_batch", pairs="same_batch", full_batch=False, **_FIXED),
    _pv("consecutive", pairs="consecutive", driver="batch_id", full_batch=False, **_FIXED),
    _pv("overlap", pairs="same_batch", driver="pair_closure", full_batch=False, **_FIXED),
    _pv("max_iter", max_iter=3, **_SEARCHED),
    _pv("capturable", capturable=True, **_FIXED),
    _fuse("fixed"),
    _fuse("fixed_promised", deterministic=True),
    _fuse("strong_wolfe", line_search="strong_wolfe"),
    _fuse("strong_wolfe_promised", line_search="strong_wolfe", deterministic=True),
]


def each(
    keep: Callable[[Configuration], bool] = lambda _: True, dtypes: Iterable[torch.dtype] = ()
) -> pytest.MarkDecorator:
    """Parametrizes a test over (config, dtype), of those kept and, if given, of these dtypes."""
    wanted = tuple(dtypes) or (F32, F64, BF16)
    cases = [
        pytest.param(config, dtype, id=f"{config.id}-{str(dtype).removeprefix('torch.')}")
        for config in CONFIGURATIONS
        if keep(config)
        for dtype in config.dtypes
        if dtype in wanted
    ]
    return pytest.mark.parametrize(("config", "dtype"), cases)
