"""Who wins: FusePV beside each rival and beside itself in Adam's metric, counted and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.comparison import Sample, verdict
from benchmarks.harness.tables import number, table
from benchmarks.stochastic.methods import METHODS, PEERS, Entry
from benchmarks.stochastic.tasks import Spec
from benchmarks.stochastic.tournament import BASES, Standing

VERDICTS = {"win": "wins", "draw": "is level", "loss": "loses"}


@dataclass(frozen=True)
class Duel:
    """Two entries on a task.

    Attributes:
        question: What is asked; the duels of one question are counted together.
        task: Title.
        ours: Who is asked about.
        theirs: Beside whom.
        samples: Of both, by basis; higher is better.
        unit: "%" or "nats".
    """

    question: str
    task: str
    ours: Entry
    theirs: Entry
    samples: dict[str, tuple[Sample, Sample]]
    unit: str

    def verdict(self, basis: str) -> str:
        """For ours: "win", "draw" or "loss"; more than one standard deviation, the larger one."""
        return verdict(*self.samples[basis])

    def difference(self, basis: str) -> float:
        """Of the means, in the unit; above 0 where ours is better."""
        ours, theirs = self.samples[basis]
        return (ours.mean - theirs.mean) * (100 if self.unit == "%" else 1)

    def json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "question": self.question,
            "task": self.task,
            "ours": self.ours.title,
            "theirs": self.theirs.title,
            "unit": self.unit,
            "difference": {basis: self.difference(basis) for basis in self.samples},
            "verdict": {basis: self.verdict(basis) for basis in self.samples},
            "entries": [list(self.ours), list(self.theirs)],
            "values": {b: [list(of.values) for of in both] for b, both in self.samples.items()},
        }

    @classmethod
    def of_json(cls, known: dict[str, Any]) -> Duel:
        """From what :meth:`json` made; what JSON has no number for had diverged."""
        ours, theirs = (Entry(*names) for names in known["entries"])
        samples = {
            basis: (_sample(one), _sample(other)) for basis, (one, other) in known["values"].items()
        }
        return cls(known["question"], known["task"], ours, theirs, samples, known["unit"])


def _sample(values: list[float | None]) -> Sample:
    return Sample(tuple(float("-inf") if value is None else value for value in values))


def duels(spec: Spec, standings: dict[Entry, Standing]) -> list[Duel]:
    """All of a task's.

    Beside rivals each method has the schedule that its tuning liked best; where nothing else is
    said, that is. Runs at equal cost are as long as those of FusePV with the rival's schedule.
    """
    found: list[Duel] = []

    def ask(question: str, ours: Entry | None, theirs: Entry | None) -> None:
        if ours in standings and theirs in standings:
            one, other = standings[ours], standings[theirs]
            # Of one price whatever the basis, if both are ours.
            bases = ["steps"] if METHODS[theirs.method].ours else [*BASES]
            samples = {basis: (one.sample(), other.sample(basis)) for basis in bases}
            unit = "nats" if spec.measure == "loss" else "%"
            found.append(Duel(question, spec.title, ours, theirs, samples, unit))

    best = {name: best_of(name, standings) for name in METHODS}
    ask("FusePV beside AdamW, each with its best schedule", best["fuse_pv"], best["adamw"])
    for schedule, words in (
        ("constant", "without a schedule"),
        ("cosine", "both with a cosine"),
        ("cosine_10", "both with a cosine to 10%"),
        ("warmup_cosine", "both with warm-up and cosine"),
    ):
        question = f"FusePV beside AdamW, {words}"
        ask(question, Entry("fuse_pv", schedule), Entry("adamw", schedule))
    question = "FusePV with the switch at half beside AdamW, each with its best schedule"
    ask(question, best["fuse_pv_half"], best["adamw"])
    for peer in PEERS:
        question = f"FusePV beside {METHODS[peer].title}, each with its best schedule"
        ask(question, best["fuse_pv"], best[peer])
    question = "FusePV beside itself in Adam's metric, without a schedule"
    ask(question, Entry("fuse_pv", "constant"), Entry("control", "constant"))
    question = "FusePV beside itself in Adam's metric, each with its best schedule"
    ask(question, best["fuse_pv"], best["control"])
    question = "FusePV beside itself in Adam's metric, both with the switch at half"
    ask(question, best["fuse_pv_half"], best["control_half"])
    return found


def best_of(method: str, standings: dict[Entry, Standing]) -> Entry | None:
    """The method's entry that was best in tuning, not in what is reported; None without any."""
    of = [entry for entry in standings if entry.method == method]
    return max(of, key=lambda entry: standings[entry].tuned, default=None)


def counts(found: Sequence[Duel]) -> str:
    """How often FusePV wins, is level and loses: a row a question."""
    rows = []
    for question in dict.fromkeys(duel.question for duel in found):
        of = [duel for duel in found if duel.question == question]
        row = [question]
        for basis in BASES:
            told = [duel.verdict(basis) for duel in of if basis in duel.samples]
            row.append(" / ".join(str(told.count(word)) for word in VERDICTS) if told else "")
        rows.append(row)
    return table(["wins / level / losses", *BASES.values()], rows)


def sentences(found: Sequence[Duel]) -> str:
    """Where FusePV wins, is level and loses, in words: a line a question and basis.

    Equal gradients, and equal CPU time, have a line of their own where they change a verdict.
    """
    lines = []
    for question in dict.fromkeys(duel.question for duel in found):
        of = [duel for duel in found if duel.question == question]
        before: dict[str, str] = {}
        for basis in BASES:
            told = {duel.task: duel.verdict(basis) for duel in of if basis in duel.samples}
            if told and told != before:
                lines.append(f"- {question}, at {BASES[basis]}: {_told(of, basis)}.")
                before = told
    return "\n".join(lines)


def _told(found: Sequence[Duel], basis: str) -> str:
    parts = []
    for word, text in VERDICTS.items():
        of = [duel for duel in found if basis in duel.samples and duel.verdict(basis) == word]
        named = ", ".join(f"{duel.task} ({_signed(duel, basis)})" for duel in of)
        parts.append(f"**{text}** on {named}" if named else f"{text} nowhere")
    return "; ".join(parts)


def _signed(duel: Duel, basis: str) -> str:
    difference = duel.difference(basis)
    shown = number(abs(difference), 2)
    return f"{'-' if difference < 0 else '+'}{shown}{' %' if duel.unit == '%' else ' nats'}"
