"""A benchmark's JSON, Markdown and picture, and its place in the README."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.harness import machine
from benchmarks.harness.rounds import Spread


def plain(value: Any) -> Any:
    """What JSON can hold: a spread becomes median, quartiles and rounds, infinity and NaN null."""
    if isinstance(value, Spread):
        return {
            "median": value.median,
            "quartiles": [value.low, value.high],
            "rounds": [float(f"{v:.5g}") for v in value.values],
        }
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def save(
    args: argparse.Namespace,
    name: str,
    facts: dict[str, Any],
    results: dict[str, Any],
    tables: str,
    figure: Figure | None,
    short: str | None = None,
) -> None:
    """Writes NAME.json, NAME.md and NAME.png, rewrites the README's tables, prints them.

    Args:
        args: From :func:`arguments`.
        name: Of the module.
        facts: From :func:`benchmarks.harness.machine.facts`.
        results: What was measured; a :class:`Spread` becomes median, quartiles and rounds.
        tables: Markdown.
        figure: Saved and closed; None for none.
        short: Takes the place of the tables in the README, where they are too long for it.
    """
    facts["share_of_others"] = machine.share_of_others(args.started)
    text = f"{machine.sentence(facts)}\n\n{tables}"
    picture = "" if figure is None else f"\n![{name}]({name}.png)\n"
    document = {"benchmark": name, "machine": facts, **results}
    (args.out / f"{name}.json").write_text(json.dumps(plain(document), indent=1) + "\n")
    (args.out / f"{name}.md").write_text(f"# {name}\n\n{text}\n{picture}")
    if figure is not None:
        figure.savefig(args.out / f"{name}.png", dpi=150, facecolor="white")
        plt.close(figure)
    if args.readme is not None:
        told = text if short is None else f"{machine.sentence(facts)}\n\n{short}"
        rewrite(args.readme, name, told)
    print(text)


def rewrite(readme: Path, name: str, text: str) -> None:
    """Puts ``text`` between the README's markers ``<!-- NAME: begin -->`` and ``end``."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = readme.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{readme} has no {begin} ... {end} to put the tables between")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")
