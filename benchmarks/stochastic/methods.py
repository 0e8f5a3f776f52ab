"""Who takes part: methods, their schedules, and the one place where the control is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.harness import rivals
from benchmarks.harness.optimizers import OURS
from benchmarks.harness.schedules import SCHEDULES, warm_up_steps

# FusePV with the lengths of its second phase in Adam's own metric: what that of matrices is worth.
CONTROL: dict[str, Any] = {"metric": "diagonal"}

# The fourth one, a cosine to 10%, costs a third more: --schedules has it.
RUN_SCHEDULES = ("constant", "cosine", "warmup_cosine")
GRID = (0.001, 0.003, 0.01)  # where each search begins


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        title: For people.
        optimizer: Its description, without what the task says.
        own_schedule: Where it needs none of the task's.
    """

    title: str
    optimizer: dict[str, Any]
    own_schedule: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it is a FusePV."""
        return self.optimizer["name"] in OURS


AT_HALF = {"name": "fuse_pv", "switch": 0.5}
METHODS: dict[str, Method] = {
    "adamw": Method("AdamW", {"name": "adamw"}),
    "fuse_pv": Method("FusePV", {"name": "fuse_pv"}),
    "fuse_pv_half": Method("FusePV, switch at half", AT_HALF),
    "control": Method("FusePV in Adam's metric", {"name": "fuse_pv", **CONTROL}),
    "control_half": Method("FusePV in Adam's metric, switch at half", {**AT_HALF, **CONTROL}),
    "muon": Method("Muon", {"name": "muon"}),
    "soap": Method("SOAP", {"name": "soap"}),
    # Made to do without a schedule; its authors add a warm-up.
    "schedule_free": Method("Schedule-Free AdamW", {"name": "schedule_free"}, "warm_up"),
}
PEERS = ("muon", "soap", "schedule_free")
TITLES = {**SCHEDULES, "warm_up": "warm-up"}


class Entry(NamedTuple):
    """A method with a schedule."""

    method: str
    schedule: str

    @property
    def title(self) -> str:
        """For people."""
        return f"{METHODS[self.method].title}, {TITLES[self.schedule]}"

    @property
    def counterpart(self) -> Entry:
        """FusePV with this schedule, or what is nearest to it."""
        known = self.schedule in SCHEDULES
        return Entry("fuse_pv", self.schedule if known else "warmup_cosine")


def describe(entry: Entry, rate: float, common: dict[str, Any], steps: int) -> dict[str, Any]:
    """The optimizer's description, as :func:`benchmarks.stochastic.training.train` takes it.

    Args:
        entry: Who.
        rate: Learning rate.
        common: "betas" and "weight_decay" (decoupled), the same for all that have them.
        steps: Of the run.
    """
    method = METHODS[entry.method]
    found = {**method.optimizer, "lr": rate, **common}
    if method.ours:
        found["decoupled_weight_decay"] = True
    elif version := rivals.version_of(found["name"]):
        found["version"] = version
    if entry.schedule in SCHEDULES:
        return {**found, "schedule": entry.schedule}
    return {**found, "warmup_steps": warm_up_steps(steps)}


def left_out(method: str, hidden_matrices: int) -> str | None:
    """Why a method has no row on a task; None where it has.

    Args:
        method: A key of ``METHODS``.
        hidden_matrices: Of the task's network.
    """
    if method == "muon" and not hidden_matrices:
        return "no hidden matrix: it would be AdamW"
    if METHODS[method].ours:
        return None
    try:
        rivals.version_of(METHODS[method].optimizer["name"])
    except RuntimeError as error:
        return str(error)
    return None
