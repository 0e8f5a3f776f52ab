"""What an optimizer did, step by step: kept, drawn, and given to TensorBoard."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

from fuse_ext.tell.unwrap import unwrap


class Step(NamedTuple):
    """A step as :class:`Log` has kept it.

    Attributes:
        loss: What the closure returned where it began; NaN without one.
        phase: That took it: "adam", "lbfgs" or "fuse".
        step_length: t of an L-BFGS step, 0 for Adam's.
        evaluations: Calls of the closure so far.
        stop_reason: Why an L-BFGS step ended; "" for Adam's.
    """

    loss: float
    phase: str
    step_length: float
    evaluations: int
    stop_reason: str


class Log:
    """Keeps loss, phase, step length, evaluations and stop reason of every step.

    ::

        log = fuse_ext.Log(optimizer)
        ...                           # train
        log.plot()                    # the loss over evaluations, the switch marked
        log[-1].stop_reason, log.losses

    It listens to ``step`` (a hook of torch's), so that trainers need not know of it. A step costs
    one ``report()`` more, some 20 us and on a GPU a wait for the loss. Replays of a CUDA graph are
    not steps, and are not seen. It belongs to a process: a checkpoint does not hold it.

    Args:
        optimizer: ``FusePV``, ``LBFGS`` or ``Fuse``, or a trainer's wrapper of one.

    Attributes:
        switches: At which index each second phase began.

    Memory: 26 bytes a step.

    Raises:
        TypeError: The optimizer has no ``report()``.
    """

    def __init__(self, optimizer: Any) -> None:
        self._losses, self._lengths = array("d"), array("d")
        self._evaluations = array("q")
        self._phases, self._reasons = array("B"), array("B")
        self._names: list[str] = []  # of phases and reasons
        self._written = 0
        self._phase_before = ""
        self.switches: list[int] = []
        inner = unwrap(optimizer)
        self._handles = [
            inner.register_step_pre_hook(self._begin),
            inner.register_step_post_hook(self._take),
        ]

    def close(self) -> None:
        """Listens no longer; what is kept stays."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._phase_before = getattr(optimizer, "phase", "")

    def _take(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        report = optimizer.report()
        phase = self._phase_before or report.phase
        if phase == "lbfgs" and (not self._phases or self._name(self._phases[-1]) == "adam"):
            self.switches.append(len(self))
        steps = phase != "adam" and report.phase != "adam"
        self._losses.append(math.nan if report.loss is None else report.loss)
        self._lengths.append(report.step_length if steps else 0.0)
        self._evaluations.append(report.evaluations)
        self._phases.append(self._code(phase))
        self._reasons.append(self._code(report.stop_reason if steps else ""))

    def _code(self, name: str) -> int:
        if name not in self._names:
            self._names.append(name)
        return self._names.index(name)

    def _name(self, code: int) -> str:
        return self._names[code]

    def __len__(self) -> int:
        return len(self._losses)

    def __getitem__(self, i: int) -> Step:
        return Step(
            self._losses[i],
            self._name(self._phases[i]),
            self._lengths[i],
            self._evaluations[i],
            self._name(self._reasons[i]),
        )

    def __iter__(self) -> Iterator[Step]:
        return map(self.__getitem__, range(len(self)))

    @property
    def losses(self) -> list[float]:
        """The loss where each step began."""
        return list(self._losses)

    def columns(self) -> dict[str, list[Any]]:
        """What ``pandas.DataFrame`` takes: each attribute of :class:`Step`, step by step."""
        return {name: [getattr(step, name) for step in self] for name in Step._fields}

    def plot(self, ax: Any = None, *, by: str = "evaluations") -> Any:
        """Draws the loss, and a line where each second phase began; needs matplotlib.

        A loss that is positive throughout is drawn on a logarithmic axis.

        Args:
            ax: matplotlib's axes; None for the present ones.
            by: "evaluations" or "steps".

        Returns:
            The axes.
        """
        if by not in ("evaluations", "steps"):
            raise ValueError(f"by must be 'evaluations' or 'steps', got {by!r}")
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.gca()
        at = list(range(len(self))) if by == "steps" else list(self._evaluations)
        ax.plot(at, list(self._losses), color="#D55E00", linewidth=1.2)
        for k, i in enumerate(self.switches):
            label = "switch" if k == 0 else None
            ax.axvline(at[i], color="black", linestyle=":", linewidth=1.0, label=label)
        known = [loss for loss in self._losses if math.isfinite(loss)]
        ax.set(xlabel=by, ylabel="loss")
        if known and min(known) > 0.0:
            ax.set_yscale("log")
        if self.switches:
            ax.legend(frameon=False)
        return ax

    def to_tensorboard(self, writer: Any, prefix: str = "fuse_ext") -> None:
        """Writes the steps since the last call as scalars.

        Args:
            writer: A ``torch.utils.tensorboard.SummaryWriter``, or whatever has ``add_scalar``.
            prefix: Before the names ``loss``, ``step_length``, ``evaluations`` and
                ``second_phase`` (0 or 1).
        """
        for i in range(self._written, len(self)):
            step = self[i]
            scalars = {
                "loss": step.loss,
                "step_length": step.step_length,
                "evaluations": step.evaluations,
                "second_phase": float(step.phase == "lbfgs"),
            }
            for name, value in scalars.items():
                writer.add_scalar(f"{prefix}/{name}", value, i)
        self._written = len(self)

    def __repr__(self) -> str:
        return f"<Log of {len(self)} steps: {self[-1]}>" if len(self) else "<Log of no steps>"
