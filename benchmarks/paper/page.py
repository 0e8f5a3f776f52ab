"""The page: each result of the paper beside ours, and whether it reproduces."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.harness import machine, saving, tables

YES, PARTLY, NO = "reproduces", "reproduces in part", "does not reproduce"
VERDICTS = (YES, PARTLY, NO)
COLORS = 256  # of a picture's palette


@dataclass(frozen=True)
class Report:
    """What became of a section.

    Attributes:
        claim: What the paper prints, or claims of its picture.
        verdict: One of ``VERDICTS``.
        sentence: Why, with the figures; built from ``data``.
        text: Tables and more, in Markdown; built from ``data``.
        data: All figures, as JSON can hold them.
        figures: By name: "" for NAME.png, "x" for NAME-x.png. Closed when saved.
    """

    claim: str
    verdict: str
    sentence: str
    text: str
    data: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {VERDICTS}, got {self.verdict!r}")


def write_section(
    out: Path, name: str, title: str, report: Report, facts: dict[str, Any], work: dict[str, Any]
) -> str:
    """Writes NAME.json and the pictures; returns the section's Markdown.

    Args:
        out: Folder.
        name: Of the section.
        title: Above it.
        report: Its contents.
        facts: From :func:`benchmarks.harness.machine.facts`.
        work: The number of cells, and seconds.
    """
    document = {
        "section": name,
        "title": title,
        "claim": report.claim,
        "verdict": report.verdict,
        "sentence": report.sentence,
        "machine": facts,
        "work": work,
        **report.data,
    }
    text = json.dumps(saving.plain(document), indent=1)
    (out / f"{name}.json").write_text(_on_one_line(text) + "\n")
    pictures = []
    for suffix, figure in report.figures.items():
        file = f"{name}-{suffix}.png" if suffix else f"{name}.png"
        save_picture(figure, out / file)
        pictures.append(f"![{title}]({file})")
    parts = [
        f"### {title}",
        f"*The paper:* {report.claim}",
        f"**{report.verdict.capitalize()}.** {report.sentence}",
        *pictures,
        report.text,
    ]
    return "\n\n".join(part for part in parts if part)


def _on_one_line(text: str) -> str:
    """The JSON with lists of plain numbers on one line each."""
    return re.sub(r"\[\s*([^][{}\"]*?)\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def save_picture(figure: Figure, path: Path) -> None:
    """A PNG with a palette, a third of the size; closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, facecolor="white")
    plt.close(figure)
    # Without dithering, flat colours stay flat.
    picture = Image.open(buffer).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def write_page(out: Path, names: Iterable[str], written: dict[str, str]) -> None:
    """Writes README.md: a summary of all sections whose JSON is in ``out``, and the sections.

    Args:
        out: Folder.
        names: Of all sections, in order.
        written: Markdown of those to be rewritten, by name; others stay as they are.
    """
    page = out / "README.md"
    sections = _split(page.read_text()) if page.exists() else {}
    sections |= written
    order = [name for name in names if name in sections and (out / f"{name}.json").exists()]
    documents = {name: json.loads((out / f"{name}.json").read_text()) for name in order}
    bodies = [f"<!-- {name}: begin -->\n{sections[name]}\n<!-- {name}: end -->" for name in order]
    page.write_text(
        "\n\n".join(
            [
                "# The paper and ours, side by side",
                "Every result of [FUSE (arXiv 2503.04204)](https://arxiv.org/abs/2503.04204), "
                "reproduced by `make paper` (`python -m benchmarks.paper`), which writes this "
                "page, the pictures and one JSON file a section. The sentences are made from the "
                "figures in those files and say the opposite when the figures do.",
                _summary(documents),
                *bodies,
                "### Conditions",
                _conditions(documents),
            ]
        )
        + "\n"
    )


def _split(page: str) -> dict[str, str]:
    found = re.findall(r"<!-- (\w+): begin -->\n(.*?)\n<!-- \1: end -->", page, re.DOTALL)
    return dict(found)


def _summary(documents: dict[str, dict[str, Any]]) -> str:
    rows = []
    for document in documents.values():
        anchor = re.sub(r"[^\w -]", "", document["title"].lower()).replace(" ", "-")
        link = f"[{document['title']}](#{anchor})"
        rows.append([link, document["claim"], f"**{document['verdict']}**. {document['sentence']}"])
    lines = [["", "the paper", "ours"], [":--"] * 3, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _conditions(documents: dict[str, dict[str, Any]]) -> str:
    """Every machine once, with the sections that were measured on it."""
    found: dict[str, list[str]] = {}
    for document in documents.values():
        work = document["work"]
        minutes = tables.number(work["seconds"] / 60, 2)
        noted = f"{document['title'].partition(':')[0]} ({work['cells']} runs, {minutes} minutes)"
        facts = {**document["machine"], "share_of_others": None}
        found.setdefault(machine.sentence(facts), []).append(noted)
    return "\n".join(
        f"- {', '.join(sections)}: {sentence}" for sentence, sections in found.items()
    ) + (
        "\n\nMinutes are of processor time, each run on one thread; a run that serves two sections "
        "counts in both."
    )
