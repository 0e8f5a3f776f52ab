"""L-BFGS with a fixed step that the device decides alone, for steps that a CUDA graph repeats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.ring import History
from fuse_ext.kernels import fixed_step
from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.capture import device_loss, is_capturing, refuse_while_capturing
from fuse_ext.kernels.fixed_step import PLACES, Control
from fuse_ext.kernels.hooks import with_grad
from fuse_ext.kernels.ops import Ops
from fuse_ext.objective.evaluations import Evaluations
from fuse_ext.objective.progress import Progress
from fuse_ext.objective.setbacks import Setbacks
from fuse_ext.objective.step_options import StepOptions
from fuse_ext.phase.lbfgs.iteration import BAD_BATCHES
from fuse_ext.phase.protocol import Call, Outcome
from fuse_ext.vector.flat import Closure, FlatParams

# What the control counts, under the names of the state entry.
COUNTED = ("n_iter", "non_finite", "resets", "step_cuts", "cuts")


class DevicePhase:
    """Algorithm 1 with a fixed step, one iteration a step, and nothing read from the device.

    What the host decides and counts elsewhere lies in ``entry["control"]`` on the device
    (csrc/fixed_step.h), and the previous gradient in a vector of its own, so that a gradient that
    is refused takes nothing with it. Results are those of
    :class:`~fuse_ext.phase.lbfgs.iteration.Iteration` (on CPUs to the bit), but that

    - nobody may move the parameters between two steps (the host notices, a graph cannot);
    - whether a direction descends is foretold from dot products. Where that errs, for rounding or
      for groups with different lr, the step is left out and the next one is along -g;
    - ``deterministic`` does not spare the evaluation after the last step, and undoes a step at
      whose end loss or gradient are not finite when the next one begins.

    Args:
        flat: The parameters.
        ops: Kernels to use.
        entry: The optimizer's state entry.
        history_size: m.
        history_dtype: Storage of the pairs; None for the state's.
    """

    begun, host_decides = True, False

    def __init__(
        self,
        flat: FlatParams,
        ops: Ops,
        entry: dict[str, Any],
        history_size: int,
        history_dtype: torch.dtype | None,
    ) -> None:
        refuse_while_capturing(flat.device, "the history of L-BFGS is made")
        from_host = "history" in entry and "grad_prev" not in entry
        self._flat, self._ops, self.entry = flat, ops, entry
        self.history = history = History(
            flat, ops, entry, history_size, history_dtype, grad_prev_apart=True
        )
        objective = Evaluations(flat, entry, history)  # the names that a checkpoint has
        self.precision = objective.precision
        self.progress = Progress(reason=entry["settled"] or Progress.reason)
        self._setbacks = Setbacks(entry, history, self.progress)
        assert history.grad_prev is not None
        if from_host:
            history.grad_prev.copy_(history.rows[1, int(history.header().open)])
        control = fixed_step.new_control(history.scalars.device)
        if "control" in entry:
            control.copy_(entry["control"])
        else:
            for name in COUNTED:
                control[PLACES[name]] = float(entry[name])
            control[PLACES["pair_step"]] = entry["pair_step"] or 0.0
        self._control = entry["control"] = control
        self._origin = flat.new_vector()

    def settle(self, log: dict[str, Any]) -> None:
        """Brings what the device has counted to the state entry and to ``progress``."""
        settle(self.entry)
        numbers = Control(self._control.cpu())
        self.progress.reason = fixed_step.REASONS[int(numbers.reason)]
        self.progress.step_length = numbers.taken
        self.progress.line_search = "fixed" if numbers.taken else "none"

    def refuse(self) -> None:
        """Counts a step that was not taken for an infinite gradient."""
        self._setbacks.count_non_finite()

    def outdated(self, state: dict[Any, Any]) -> bool:
        """Whether the user has cleared or replaced ``Optimizer.state``."""
        return state.get(self._flat.params[0]) is not self.entry

    def new_objective(self) -> None:
        """The closure is another function from the next step on: no pair mixes the two."""
        self._drop_waiting()

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        return self.history.nbytes

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch vectors held between steps (not part of the state)."""
        return self._origin.nbytes

    def step(self, call: Call) -> Outcome:
        """One iteration with the step ``options.lr`` (times ``call.lr`` / ``call.lr_unit``)."""
        closure, options = call.closure, call.options
        assert options is not None
        self._flat.check_unchanged()
        told: dict[str, Any] = {
            "lr": options.lr,
            "lr_unit": call.lr_unit,
            "lr_tensor": call.lr,
            "curvature_tol": options.curvature_tol,
            "tolerance_grad": options.tolerance_grad,
            "tolerance_change": options.tolerance_change,
            "eps": torch.finfo(self._flat.dtype).eps,
            # Of a deterministic closure a start that is not finite is the step's own fault.
            "patience": 0 if options.deterministic and closure is not None else BAD_BATCHES,
        }
        loss = None if closure is None else self._loss(closure)
        grads = self._decide(loss, options, told, closes_pair=False)
        if grads is not None:
            self._take_direction(grads, options)
            del grads  # the closure may drop them
            self._move()
        if closure is not None and options.same_batch_pairs and not options.deterministic:
            try:
                end = self._loss(closure)
            except BaseException:
                self._take_back()
                raise
            if self._decide(end, options, told, closes_pair=True) is not None:
                self._move()
        return Outcome(loss.detach() if isinstance(loss, Tensor) else loss)

    def _loss(self, closure: Closure) -> Any:
        loss = with_grad(closure)
        if not is_capturing(self._flat.device):
            self.entry["func_evals"] += 1
        device_loss(loss, self._control.device)  # raises here, where nothing has changed
        return loss

    def _decide(
        self, loss: Any, options: StepOptions, told: dict[str, Any], closes_pair: bool
    ) -> list[Tensor] | None:
        """Pass 1 and what follows from it; returns the gradients, None where there is nothing."""
        part, grads = self._flat.gradients(options.freezing)
        history = self.history
        if closes_pair and part.absent != history.part.absent:
            self._drop_waiting()  # its second gradient is of other parameters
            return None
        if not part.params:
            return None
        if part.absent != history.part.absent:
            refuse_while_capturing(
                self._flat.device, "other parameters have gradients than in the step before"
            )
        if history.enter(part):
            self._drop_waiting()
        elif is_capturing(self._flat.device):
            history.note_set()  # a graph says itself which parameters it is for
        self._ops.lbfgs_update(
            part.reals(part.params),
            grads,
            part.offsets,
            part.pick(options.weight_decay),
            options.maximize,
            history.rows,
            history.grad_prev,
            history.scalars,
            False,
            history_scale=history.scales,
            control=self._control,
        )
        self._ops.lbfgs_decide(
            history.scalars,
            history.slots,
            self._control,
            loss=device_loss(loss, self._control.device),
            closes_pair=closes_pair,
            **told,
        )
        return grads

    def _take_direction(self, grads: list[Tensor], options: StepOptions) -> None:
        part, history = self.history.part, self.history
        self._ops.lbfgs_direction(
            part.reals(part.params),
            grads,
            part.offsets,
            part.pick(options.weight_decay),
            part.pick(options.lr_scale),
            options.maximize,
            history.rows,
            history.grad_prev,
            history.scalars,
            history_scale=history.scales,
            control=self._control,
        )

    def _move(self) -> None:
        part, history = self.history.part, self.history
        self._ops.lbfgs_move(
            part.reals(part.params),
            part.offsets,
            self._origin,
            history.rows,
            history.scalars,
            0.0,
            False,
            history_scale=history.scales,
            control=self._control,
        )

    def _drop_waiting(self) -> None:
        """Gives up a pair in waiting, wherever there is one."""
        self._control[PLACES["pair_step"]].fill_(0.0)

    def _take_back(self) -> None:
        """Undoes the step under way, whose end could not be evaluated."""
        if is_capturing(self._flat.device):  # nothing has been done, and nothing may be read
            return
        if self._control[PLACES["pair_step"]] != 0.0:
            self._drop_waiting()
            self.history.move(self._origin, 0.0, save=False)


def settle(entry: dict[str, Any]) -> None:
    """Writes into a state entry what its control, if it has one, has counted on the device."""
    if "control" not in entry:
        return
    numbers = Control(entry["control"].cpu())
    for name in COUNTED:
        entry[name] = int(getattr(numbers, name))
    entry["pair_step"] = numbers.pair_step or None


def to_host(entry: dict[str, Any]) -> None:
    """The state of :class:`DevicePhase` as :class:`Iteration` has it."""
    settle(entry)
    if "control" not in entry:
        return
    reset = Control(entry.pop("control").cpu()).reset
    rows, scalars, slots = entry["history"], entry["scalars"], entry["history"].size(1)
    if reset:
        entry["resets"] += 1
        for name in ("count", "gamma", "usable"):
            scalars[ring.index(name, slots)] = 0.0
    if entry["grad_prev"].dtype == rows.dtype:
        rows[1, int(ring.read_header(scalars).open)] = entry.pop("grad_prev")
