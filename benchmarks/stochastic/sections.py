"""The page's sections: what each says, and what the page showed of it before."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.stochastic.duels import Duel

SECTIONS = {
    "images": "Images at the paper's learning rates, and at tuned ones",
    "ablation": "One option at a time",
    "schedules": "A schedule for everyone",
    "robustness": "Dropout, wrong labels, batches of all sizes",
    "change": "A change of task",
    "text": "A transformer on text",
}
PLAYED = ("schedules", "text", "robustness")  # sections that are tournaments
EARLIER = "_Run with an earlier state of the code, whose runs are not stored here._"


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        texts: Markdown, without the title.
        data: Its entries of the JSON.
        short: Markdown for the README.
        asked: Its duels.
        seeds: How many a tournament compared; None elsewhere.
        earlier: Whether it was read from an earlier page.
    """

    texts: list[str]
    data: dict[str, Any]
    short: list[str] = field(default_factory=list)
    asked: list[Duel] = field(default_factory=list)
    seeds: int | None = None
    earlier: bool = False

    @property
    def shown(self) -> list[str]:
        """The texts, marked where they are of an earlier page."""
        return [EARLIER, *self.texts] if self.earlier else self.texts

    def json(self) -> dict[str, Any]:
        """What :func:`before` reads."""
        return {
            "texts": self.texts,
            "short": self.short,
            "seeds": self.seeds,
            "data": [*self.data],
            "duels": [duel.json() for duel in self.asked],
        }


def document(sections: dict[str, Section]) -> dict[str, Any]:
    """For the JSON: what was found, and the sections for a later page."""
    found: dict[str, Any] = {}
    for section in sections.values():
        found |= section.data
    found["duels"] = [duel.json() for section in sections.values() for duel in section.asked]
    return {**found, "sections": {name: section.json() for name, section in sections.items()}}


def before(path: Path, mode: str) -> dict[str, Section]:
    """The sections of the page whose JSON this is; none where it is missing or of another mode."""
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    if known["machine"]["mode"] != mode:
        return {}
    return {
        name: Section(
            of["texts"],
            {key: known[key] for key in of["data"]},
            of["short"],
            [Duel.of_json(duel) for duel in of["duels"]],
            of["seeds"],
            earlier=True,
        )
        for name, of in known.get("sections", {}).items()
    }
