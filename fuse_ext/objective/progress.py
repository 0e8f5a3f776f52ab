"""What the last step of L-BFGS did, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass

from fuse_ext.checks import warn_caller
from fuse_ext.objective.step_options import StepOptions

# Reasons to end that leave nothing to gain.
CONVERGED = ("gradient", "slope", "step", "loss", "progress", "precision", "no_descent")


@dataclass
class Progress:
    """What the last call of an L-BFGS ``step`` did.

    Attributes:
        reason: Why it ended: "max_iter" or "max_eval" (the budget), "gradient" (at most
            tolerance_grad), "slope", "step" or "loss" (changes at most tolerance_change),
            "progress" (a decrease of at most rtol times the loss),
            "precision" (rounding or noise of the loss hides any further decrease), "line_search"
            (it found no step that lowers the loss), "no_descent" (the gradient is 0, or so small
            that its square is), "non_finite", "watch" (the step was given to finding out whether
            the closure is the same function at every call), "lr" (which is 0), or "no_gradient"
            (there is none, or has been none but 0 though the loss is not: nothing was trained).
        step_length: Of the last step taken.
        line_search: Why the last search ended.
        warned: Whether it has been said that there are no gradients.
    """

    reason: str = "not started"
    step_length: float = 0.0
    line_search: str = "none"
    warned: bool = False

    def stop_untrained(self, steps: int) -> None:
        """Notes that there was no gradient to train with; warns where there never was any.

        ``steps`` were taken before.
        """
        self.reason = "no_gradient"
        if not self.warned and not steps:
            self.warned = True
            warn_caller(
                "the closure has left no gradient, or nothing but 0, so that nothing is trained: "
                "it must zero the gradients, compute the loss and call loss.backward(), and "
                "nothing may zero them after that"
            )

    def ends_after(
        self,
        options: StepOptions,
        before: float,
        here: float | None,
        largest_gradient: float,
        longest_step: float,
        last: bool,
    ) -> bool:
        """Whether :func:`after_iteration` finds a reason to stop, which is noted.

        In the last iteration that is "max_iter", but for what tells a loop to end.
        """
        reason = after_iteration(options, before, here, largest_gradient, longest_step)
        if reason and not (last and reason not in ("gradient", "progress")):
            self.reason = reason
        return bool(reason)


def after_iteration(
    options: StepOptions,
    before: float,
    here: float | None,
    largest_gradient: float,
    longest_step: float,
) -> str:
    """torch.optim.LBFGS's tests after an iteration: why to stop, empty to go on.

    Args:
        options: The tolerances.
        before: The loss where the iteration began.
        here: The loss where it has led, None where it is not known.
        largest_gradient: max |g| there.
        longest_step: max |t p|.
    """
    if largest_gradient <= options.tolerance_grad:
        return "gradient"
    if longest_step <= options.tolerance_change:
        return "step"
    if here is None:
        return ""
    if abs(here - before) < options.tolerance_change:
        return "loss"
    return "progress" if 0.0 < options.rtol * abs(here) >= abs(here - before) else ""
