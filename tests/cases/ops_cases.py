"""Inputs for the tests of the ops, and what the tests compare with.

Two kinds of numbers are used. Small integers, for which every sum and product of the kernels is
exact in every dtype: then the result must be the exact one, and a dropped, doubled or misplaced
element shows at any size. And normally distributed numbers, compared within bounds on the
rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dense_cases import dense_arguments
from torch import Tensor

from fuse_ext.kernels import fixed_step, ops
from fuse_ext.kernels import scalars as ring

CPU = torch.device("cpu")
BACKENDS = {name: ops.select(name, CPU) for name in ("native", "reference")}
NATIVE = BACKENDS["native"]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
STATE_DTYPES = (F32, F64)
# Around the lengths at which the kernels change gear: vectors, runs (1,024), blocks (4,096), and
# several chunks.
SIZES = (0, 1, 2, 3, 31, 127, 128, 129, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 8193, 50001)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def integers(numel: int, values: Sequence[float] = (-1, 1, 2)) -> Tensor:
    """Random elements of ``values``, as float64 [numel]."""
    return torch.tensor(values, dtype=F64)[torch.randint(len(values), (numel,))]


def normal(numel: int) -> Tensor:
    """Standard normal numbers, as float64 [numel]."""
    return torch.randn(numel, dtype=F64)


def large_then_small(numel: int) -> Tensor:
    """Runs of 1,024 large numbers, each followed by three runs of small ones.

    Products of two are 2^12 or 2^-10. The sum of a run is exact in float32; one that went on from
    large ones to small ones would lose all of the small ones.
    """
    large = torch.arange(numel) // 1024 % 4 == 0
    return torch.where(large, 2.0**6, 2.0**-5).to(F64)


def split(numel: int, pieces: int) -> list[int]:
    """Random lengths, zeros among them, with the sum ``numel``."""
    cuts = torch.randint(numel + 1, (pieces - 1,)).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, numel], strict=True)]


def fits(param_dtype: torch.dtype, state_dtype: torch.dtype) -> bool:
    """Whether such parameters may have such a state: float64 needs float64."""
    return param_dtype != F64 or state_dtype == F64


@dataclass
class Tensors:
    """1-D parameters with gradients; tensor i lies at ``offsets[i]`` in a vector of ``numel``."""

    params: list[Tensor]
    grads: list[Tensor]
    offsets: list[int]
    numel: int

    def flat(self, tensors: Iterable[Tensor]) -> Tensor:
        """The tensors end to end as float64, zeros where there is none."""
        out = torch.zeros(self.numel, dtype=F64)
        for tensor, offset in zip(tensors, self.offsets, strict=True):
            out[offset : offset + tensor.numel()] = tensor.to(F64)
        return out

    def spread(self, values: Sequence[float], otherwise: float) -> Tensor:
        """One value per tensor at each of its elements; empty ``values`` are ``otherwise``."""
        return self.flat(
            torch.full((p.numel(),), value, dtype=F64)
            for p, value in zip(self.params, values or [otherwise] * len(self.params), strict=True)
        )

    def covered(self) -> Tensor:
        """Which flat elements belong to a tensor."""
        return self.spread([], 1.0).bool()


def make_tensors(
    sizes: Sequence[int],
    param_dtypes: Sequence[torch.dtype] = (F32,),
    grad_dtypes: Sequence[torch.dtype] = (),
    *,
    draw: Callable[[int], Tensor] = normal,
    gaps: Sequence[int] = (0,),
) -> Tensors:
    """Tensors of these sizes; dtypes and gaps before each tensor are taken in turn."""
    grad_dtypes = grad_dtypes or param_dtypes
    made = Tensors([], [], [], 0)
    for i, size in enumerate(sizes):
        made.numel += gaps[i % len(gaps)]
        made.offsets.append(made.numel)
        made.params.append(draw(size).to(param_dtypes[i % len(param_dtypes)]))
        made.grads.append(draw(size).to(grad_dtypes[i % len(grad_dtypes)]))
        made.numel += size
    return made


PADDING = 7  # elements between rows, which nothing may touch


@dataclass
class Ring:
    """A history and its scalars.

    Attributes:
        history: [2, slots, numel], rows apart as the ring has them.
        scalars: As in csrc/two_loop.h.
        grad_prev: The previous gradient, or None where it is the open slot's Y row.
        history_scale: [2, slots, blocks] beside an int8 history (curvature/test_int8_history.py).
        control: What a fixed step decides by (fuse_ext/kernels/fixed_step.py), if it does.
    """

    history: Tensor
    scalars: Tensor
    grad_prev: Tensor | None
    history_scale: Tensor | None = None
    control: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.history.size(1)

    @property
    def opened(self) -> int:
        return int(self.scalar("open"))

    @property
    def pairs(self) -> list[int]:
        """Slots of the pairs, newest first."""
        return [(self.opened - 1 - age) % self.slots for age in range(int(self.scalar("count")))]

    @property
    def previous(self) -> Tensor:
        """The previous gradient, wherever it is."""
        return self.history[1, self.opened] if self.grad_prev is None else self.grad_prev

    @property
    def padding(self) -> Tensor:
        """What lies between the rows."""
        whole = self.history.as_strided(
            (2, self.slots, self.history.size(2) + PADDING), self.history.stride()
        )
        return whole[:, :, self.history.size(2) :]

    def scalar(self, name: str) -> float:
        return float(self.scalars[ring.index(name, self.slots)])

    def array(self, name: str) -> Tensor:
        return ring.array(self.scalars, name, self.slots)


def make_ring(
    numel: int,
    history_size: int,
    opened: int,
    count: int,
    row_dtype: torch.dtype = F32,
    state_dtype: torch.dtype = F32,
    *,
    draw: Callable[[int], Tensor] = normal,
) -> Ring:
    """A ring with ``count`` pairs before the slot ``opened``.

    Whatever no op may read is NaN: rows outside of the ring and the padding.
    """
    slots = history_size + 1
    memory = torch.full((2, slots, numel + PADDING), float("nan"), dtype=row_dtype)
    scalars = ring.new_scalars(slots, CPU)
    made = Ring(memory[:, :, :numel], scalars, None)
    scalars[ring.index("open", slots)] = opened
    for name in ("count", "usable"):
        scalars[ring.index(name, slots)] = count
    for slot in made.pairs:
        for side in (0, 1):
            made.history[side, slot] = draw(numel)
    made.history[0, opened] = draw(numel)
    made.array("row_scale").fill_(1.0)
    if row_dtype != state_dtype:
        made.grad_prev = torch.empty(numel, dtype=state_dtype)
    made.previous.copy_(draw(numel))
    return made


def assert_stored(
    actual: Tensor, exact: Tensor, error: Tensor | float, what: str = "values"
) -> None:
    """Checks that ``actual`` is a rounding of some number within ``error`` of ``exact``.

    Rounding is monotone, so such a value lies between the roundings of the bounds.
    """
    low, high = (exact - error).to(actual.dtype), (exact + error).to(actual.dtype)
    wrong = ~((low <= actual) & (actual <= high))
    if wrong.any():
        i = int(wrong.nonzero()[0, 0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {actual.numel()} differ, first [{i}]: "
            f"{float(actual[i])!r}, expected {float(exact[i])!r} in "
            f"[{float(low[i])!r}, {float(high[i])!r}]"
        )


def assert_sum(
    actual: float,
    terms: Tensor,
    dtype: torch.dtype,
    what: str,
    size: Tensor | None = None,
) -> None:
    """Checks a sum that the kernels take in runs of 1,024 in ``dtype``, then in float64.

    A run is summed in at least 2 lanes (SSE2) of at most 512 additions. Rounding errors of n
    additions grow like sqrt(n)/2 roundoffs of the sum of magnitudes: 11 for one lane. 32 leave
    room for the terms' own errors and for luck. (``size`` are the magnitudes where the terms come
    out of a subtraction.) One element of average size that is dropped weighs 1/n: 10 times as
    much for the lengths used here, in float32. Sums of integers are compared exactly.
    """
    error = 32 * unit_roundoff(dtype) * float((terms if size is None else size).abs().sum())
    exact = float(terms.sum())
    assert abs(actual - exact) <= error, f"{what}: {actual!r}, expected {exact!r} +- {error:g}"


def bits(tensor: Tensor) -> Tensor:
    """The stored bits, so that NaN equals NaN and 0 differs from -0."""
    same_size = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[
        tensor.element_size()
    ]
    return tensor.detach().clone(memory_format=torch.preserve_format).view(same_size)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def clone_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an op with tensors of their own, strides kept."""

    def clone(value: Any) -> Any:
        if isinstance(value, Tensor):
            size = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
            whole = value.detach().as_strided((size if value.numel() else 0,), (1,)).clone()
            return whole.as_strided(value.shape, value.stride(), 0)
        if isinstance(value, list):
            return [clone(entry) for entry in value]
        return value

    return {name: clone(value) for name, value in arguments.items()}


def tensors_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors among the arguments, by name: ``exp_avg``, ``params[0]``, ..."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, list):
            found |= {f"{name}[{i}]": v for i, v in enumerate(value) if isinstance(v, Tensor)}
    return found


class Watch:
    """Which tensors an op changes, and whose version counters it bumps."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._tensors = tensors_of(arguments)
        self._before = {name: bits(t) for name, t in self._tensors.items()}
        self._versions = {name: t._version for name, t in self._tensors.items()}

    def changed(self) -> set[str]:
        return {n for n, t in self._tensors.items() if not torch.equal(bits(t), self._before[n])}

    def bumped(self) -> set[str]:
        return {n for n, t in self._tensors.items() if t._version != self._versions[n]}


def adam_arguments(
    tensors: Tensors,
    state_dtype: torch.dtype = F32,
    *,
    amsgrad: bool = False,
    draw: Callable[[int], Tensor] = normal,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of adam_step in the middle of a run."""
    exp_avg_sq = draw(tensors.numel).square()
    absent = ("grad_scale", "found_inf", "step_tensor", "lr_tensor", "loss", "grad_square")
    options = dict.fromkeys((*absent, "counts")) | options
    return {
        "params": tensors.params,
        "grads": tensors.grads,
        "offsets": tensors.offsets,
        "exp_avg": draw(tensors.numel).to(state_dtype),
        "exp_avg_sq": exp_avg_sq.to(state_dtype),
        # Larger than exp_avg_sq for about half of the elements.
        "max_exp_avg_sq": (exp_avg_sq + draw(tensors.numel)).abs().to(state_dtype)
        if amsgrad
        else None,
        "stats": torch.full((1,), float("nan"), dtype=F64),
        "step": 5,
        "lr": 0.05,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "eps_in_root": 0.0,
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
        "maximize": False,
    } | options


def _tensor_arguments(tensors: Tensors, decay: Sequence[float], maximize: bool) -> dict[str, Any]:
    return {
        "params": tensors.params,
        "grads": tensors.grads,
        "offsets": tensors.offsets,
        "weight_decay": list(decay),
        "maximize": maximize,
    }


def stats_arguments(
    tensors: Tensors,
    history: Ring | None = None,
    decay: Sequence[float] = (),
    maximize: bool = False,
) -> dict[str, Any]:
    """Arguments of grad_stats."""
    return _tensor_arguments(tensors, decay, maximize) | {
        "history": None if history is None else history.history,
        "scalars": None if history is None else history.scalars,
        "history_scale": None if history is None else history.history_scale,
        "stats": torch.full((5,), float("nan"), dtype=F64),
    }


def update_arguments(
    tensors: Tensors,
    history: Ring,
    form_pair: bool = True,
    decay: Sequence[float] = (),
    maximize: bool = False,
) -> dict[str, Any]:
    """Arguments of lbfgs_update."""
    return _tensor_arguments(tensors, decay, maximize) | {
        "history": history.history,
        "history_scale": history.history_scale,
        "grad_prev": history.grad_prev,
        "scalars": history.scalars,
        "form_pair": form_pair,
        "control": history.control,
    }


def direction_arguments(
    tensors: Tensors,
    history: Ring,
    decay: Sequence[float] = (),
    lr_scale: Sequence[float] = (),
    maximize: bool = False,
) -> dict[str, Any]:
    """Arguments of lbfgs_direction."""
    return _tensor_arguments(tensors, decay, maximize) | {
        "lr_scale": list(lr_scale),
        "history": history.history,
        "history_scale": history.history_scale,
        "grad_prev": history.grad_prev,
        "scalars": history.scalars,
        "control": history.control,
    }


def point_arguments(tensors: Tensors, history: Ring, origin: Tensor) -> dict[str, Any]:
    """What lbfgs_move and fuse_blend have in common."""
    return {
        "params": tensors.params,
        "offsets": tensors.offsets,
        "origin": origin,
        "history": history.history,
        "history_scale": history.history_scale,
        "scalars": history.scalars,
    }


def move_arguments(
    tensors: Tensors, history: Ring, origin: Tensor, step: float = 0.5, save: bool = True
) -> dict[str, Any]:
    """Arguments of lbfgs_move."""
    told = {"step": step, "save": save, "control": history.control}
    return point_arguments(tensors, history, origin) | told


def set_out_arguments(
    tensors: Tensors,
    history: Ring,
    origin: Tensor,
    decay: Sequence[float] = (),
    lr_scale: Sequence[float] = (),
    maximize: bool = False,
) -> dict[str, Any]:
    """Arguments of lbfgs_set_out."""
    arguments = direction_arguments(tensors, history, decay, lr_scale, maximize)
    del arguments["control"]
    return arguments | {"origin": origin, "step": 0.5}


def decide_arguments(history: Ring, **options: Any) -> dict[str, Any]:
    """Arguments of lbfgs_decide; the ring must have a control."""
    return {
        "scalars": history.scalars,
        "slots": history.slots,
        "control": history.control,
        "lr": 0.5,
        "lr_unit": 1.0,
        "lr_tensor": None,
        "loss": None,
        "curvature_tol": 1e-8,
        "tolerance_grad": 0.0,
        "tolerance_change": 0.0,
        "eps": unit_roundoff(F32) * 2,
        "patience": 3,
        "closes_pair": False,
    } | options


def give_control(history: Ring, **numbers: float) -> Tensor:
    """A control for the ring, with grad_prev apart; the numbers are put in by name."""
    if history.grad_prev is None:
        history.grad_prev = history.previous.clone()
    history.control = fixed_step.new_control(CPU)
    for name, value in numbers.items():
        setattr(fixed_step.Control(history.control), name, value)
    return history.control


def copy_arguments(tensors: Tensors, flat: Tensor) -> dict[str, Any]:
    """Arguments of grad_gather and grad_scatter."""
    return {
        "params": tensors.params,
        "grads": tensors.grads,
        "offsets": tensors.offsets,
        "flat": flat,
    }


def dense_op(numel: int, awkward: bool) -> dict[str, Any]:
    """Arguments of dense_direction, at a pair with which M takes its terms in."""
    more = {"known": False, "shares": True, "broyden": False} if awkward else {}
    arguments = dense_arguments(numel, held=2, room=3, **more)
    for tensor in tensors_of(arguments).values():
        tensor.nan_to_num_(0.0)  # see every_op
    return arguments


def every_op(
    awkward: bool, int8: bool = False, decided: bool = False, narrow: bool = False
) -> dict[str, dict[str, Any]]:
    """Arguments for each op: one float32 tensor, or several of all kinds and every optional.

    ``int8`` makes the history one of 8 bits; ``decided``: the device decides what it can;
    ``narrow``: Adam's moments are bfloat16.
    """
    numel = 300
    if awkward:
        tensors = make_tensors([100, 0, 1, 199], (F32, BF16, F16), (F32, BF16, F32))
        shaped = torch.randn(5, 20).t()
        tensors.params[0], tensors.grads[0] = (
            shaped,
            torch.randn(40, 10).t()[::2, ::2].reshape(5, 20).t(),
        )
        tensors.params[3] = torch.randn(398)[::2]
        decay, lr_scale = [0.1, 0.0, 0.0, 0.3], [1.0, 1.0, 0.5, 2.0]
        history = make_ring(numel, 3, 2, 3, BF16)
    else:
        tensors = make_tensors([numel])
        decay, lr_scale = [], []
        history = make_ring(numel, 2, 0, 0)
    for name in ("coef_s", "coef_y", "coef_g", "gram_sy", "gram_yy"):
        history.array(name).copy_(torch.rand_like(history.array(name)) + 0.5)
    # Also in unused slots: opcheck compares all values, and NaN differs from itself.
    history.history.nan_to_num_(0.0)
    if int8:
        history.history = torch.randint(-127, 128, history.history.shape, dtype=torch.int8)
        history.history_scale = torch.rand(2, history.slots, -(-numel // 128)) / 127
        history.grad_prev = torch.randn(numel)
    history.scalars[ring.index("direction_sq", history.slots)] = 1.0
    history.scalars[ring.index("y_dot_y", history.slots)] = 1.0
    history.scalars[ring.index("gamma", history.slots)] = 1.0
    history.array("y_s").fill_(0.5)
    going = {"pair_step": 0.5, "move": fixed_step.GO, "step_length": 0.25, "grad_square": 2.0}
    undecided = history.grad_prev
    give_control(history, **going, grad_sum=20.0, grad_largest=1.0, param_largest=2.0)
    history.scalars[ring.index("direction_dot_grad", history.slots)] = -1.0
    decide = decide_arguments(history)
    if awkward:
        given = {"loss": torch.tensor(3.0), "lr_tensor": torch.tensor(0.5), "lr_unit": 2.0}
        decide |= given
    if not decided:
        history.control, history.grad_prev = None, undecided

    adam = adam_arguments(tensors)
    if awkward:
        adam = adam_arguments(
            tensors,
            amsgrad=True,
            weight_decay=0.1,
            maximize=True,
            grad_scale=torch.tensor(4.0),
            found_inf=torch.tensor(0.0),
        )
    adam["stats"].zero_()
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        if narrow and adam[name] is not None:
            adam[name] = adam[name].to(BF16)
    if decided:
        adam |= {
            "step_tensor": torch.full((4,), 4.0),
            "lr_tensor": torch.tensor(0.05),
            "loss": torch.tensor(2.0),
            "grad_square": torch.ones(1, dtype=F64),
            "counts": torch.zeros(2, dtype=F64),
        }
    stats = stats_arguments(tensors, history if awkward else None, decay, awkward)
    stats["stats"].zero_()
    point = point_arguments(tensors, history, torch.randn(numel))
    arguments = {
        "adam_step": adam,
        "grad_stats": stats,
        "lbfgs_update": update_arguments(tensors, history, True, decay, awkward),
        "lbfgs_two_loop": {
            "scalars": history.scalars,
            "slots": history.slots,
            "commit": awkward,
            "step_length": 0.5,
            "curvature_tol": 1e-8,
            "broyden": ring.new_broyden(history.slots, CPU) if awkward else None,
            "scaled": False,
        },
        "lbfgs_decide": decide,
        "lbfgs_direction": direction_arguments(tensors, history, decay, lr_scale, awkward),
        "lbfgs_set_out": set_out_arguments(
            tensors, history, point["origin"], decay, lr_scale, awkward
        ),
        "lbfgs_move": move_arguments(tensors, history, point["origin"], 0.5, awkward),
        "dense_direction": dense_op(numel, awkward),
        "fuse_blend": point | {"theta": 0.25, "step": 0.5},
        "grad_gather": copy_arguments(tensors, torch.zeros(numel)),
        "grad_scatter": copy_arguments(tensors, torch.randn(numel)),
    }
    return {name: clone_arguments(arguments[name]) for name in ops.NAMES}
