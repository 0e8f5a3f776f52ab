"""What an optimizer holds, phase by phase, as a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PhaseMemory:
    """What one phase of an optimizer holds.

    Attributes:
        phase: "adam", "lbfgs" or "fuse"; "one function" for the one that may come after these.
        state_bytes: What ``state_dict`` saves, padding included, but for the 16 KiB or more of its
            record of counts and names.
        workspace_bytes: Scratch held between steps, once the line search has needed it.
        inherited: Bytes of the state that the phase before leaves.
        host_bytes: What the host holds of state and scratch beside the device, and is not in the
            other figures: with ``history_device="cpu"``.
    """

    phase: str
    state_bytes: int
    workspace_bytes: int
    inherited: int = 0
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """State and workspace."""
        return self.state_bytes + self.workspace_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """What an optimizer will hold; ``print`` it for a table.

    Attributes:
        optimizer: Its name.
        numel: Real numbers in the parameters (a complex parameter is two).
        phases: In the order they come.
        one_function: What comes in the place of the last one if FusePV finds out that its closure
            is one function: a matrix, or up to 200 pairs; None where it cannot find out, or holds
            as much. In no other figure than ``peak_of_one_function``.
    """

    optimizer: str
    numel: int
    phases: tuple[PhaseMemory, ...]
    one_function: PhaseMemory | None = None

    @property
    def state_bytes(self) -> int:
        """State of the phase that holds most."""
        return max(phase.state_bytes for phase in self.phases)

    @property
    def workspace_bytes(self) -> int:
        """Workspace of the phase that holds most."""
        return max(phase.workspace_bytes for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """What the host holds beside the device, in the phase that has it hold most."""
        return max(phase.host_bytes for phase in self.phases)

    @property
    def peak_bytes(self) -> int:
        """The most held at once: at a switch, the states of both phases for a moment."""
        at_switch = sum(phase.state_bytes - phase.inherited for phase in self.phases)
        return max(at_switch, *(phase.total_bytes for phase in self.phases))

    @property
    def peak_of_one_function(self) -> int:
        """The most held at once if that is found out: then too both states, for a moment."""
        found = self.one_function
        if found is None:
            return self.peak_bytes
        grows = self.phases[-1].total_bytes + found.state_bytes
        return max(self.peak_bytes, grows, found.total_bytes)

    @property
    def bytes_per_parameter(self) -> float:
        """``state_bytes`` over ``numel``."""
        return self.state_bytes / self.numel

    def __str__(self) -> str:
        rows = [("phase", "state", "workspace", "bytes a parameter")]
        more = () if self.one_function is None else (self.one_function,)
        for phase in (*self.phases, *more):
            rows.append(
                (
                    phase.phase,
                    _readable(phase.state_bytes),
                    _readable(phase.workspace_bytes),
                    f"{phase.state_bytes / self.numel:.2f} + "
                    f"{phase.workspace_bytes / self.numel:.2f}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])],
            )
            for row in rows
        ]
        title = f"{self.optimizer}, {self.numel:,} parameters"
        end = f"at most {_readable(self.peak_bytes)} at once"
        if more:
            end += f", {_readable(self.peak_of_one_function)} if the closure is one function"
        if self.host_bytes:
            end += f", and {_readable(self.host_bytes)} on the host"
        return "\n".join([title, *lines, end])


def _readable(nbytes: int) -> str:
    size, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
