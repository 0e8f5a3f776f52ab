"""What the benchmarks share: command line, interleaved rounds, spread, tables, saving, style."""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import machine

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"

# Okabe and Ito's colours, which survive colour blindness; ours are the warm ones.
COLORS = {
    "ours": "#d55e00",
    "ours bf16": "#e69f00",
    "ours int8": "#cc79a7",
    "torch": "#0072b2",
    "torch alone": "#56b4e9",
    "other": "#009e73",
    "grey": "#666666",
}


# --- command line ---------------------------------------------------------------------------


def arguments(
    name: str,
    description: str,
    rounds: tuple[int, int] | None = None,
    threads: int | None = None,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The command line that all benchmarks share.

    Args:
        name: Of the module.
        description: For --help.
        rounds: How often each case is repeated: in full and in quick mode; None where nothing
            is timed.
        threads: Where nothing else is asked for; None for torch's default.
        add: Adds the module's own options, which then take the place of --threads and --largest.

    Returns:
        quick, rounds, threads, largest, out, and readme: the file to rewrite the tables in, or
        None where the results go elsewhere than beside it.
    """
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    if rounds is not None:
        usual = f"repeats ({rounds[0]}; --quick {rounds[1]})"
        parser.add_argument("--rounds", type=int, help=usual)
    if add is not None:
        parser.set_defaults(threads=threads)
        add(parser)
    else:
        usual = "torch's default" if threads is None else str(threads)
        parser.add_argument(
            "--threads", type=int, default=threads, help=f"for torch and for us ({usual})"
        )
        parser.add_argument(
            "--largest", type=float, default=math.inf, help="leave out cases of more parameters"
        )
    if name in ("time_to_loss", "robustness", "switching"):
        parser.add_argument("--budget", type=int, help="gradient evaluations a run")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results (benchmarks/results, whose tables go into README.md too)",
    )
    args = parser.parse_args()
    if rounds is None:
        args.rounds = None
    elif args.rounds is None:
        args.rounds = rounds[args.quick]
    elif args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    if args.threads is not None:
        if args.threads < 1:
            parser.error(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    args.started = machine.cpu_clock()
    args.readme = README if args.out is None else None
    args.out = args.out or RESULTS
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def progress(total: int, title: str) -> tqdm[Any]:
    """A progress bar over ``total`` repeats."""
    return tqdm(
        total=total, desc=title, ncols=79, leave=False, bar_format="{l_bar}{bar}| {elapsed}"
    )


# --- timing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeats.

    Attributes:
        median: Of the values.
        low: First quartile.
        high: Third quartile.
        values: One per round.
    """

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """The spread of one value a round."""
        numbers = tuple(values)
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return Spread(median, low, high, numbers)

    def over(self, other: Spread) -> Spread:
        """The quotient, round by round: what was noise to both is no noise in it."""
        return Spread.of(a / b for a, b in zip(self.values, other.values, strict=True))

    def scaled(self, factor: float) -> Spread:
        """All values times a factor."""
        return Spread.of(factor * value for value in self.values)

    def per(self, amount: float) -> Spread:
        """``amount`` over each value: a rate, where the values are times."""
        return Spread.of(amount / value for value in self.values)

    def show(self, digits: int = 3) -> str:
        """``median (low-high)``."""
        return f"{number(self.median, digits)} ({self.range(digits)})"

    def range(self, digits: int = 3) -> str:
        """``low-high``."""
        return f"{number(self.low, digits)}-{number(self.high, digits)}"


@contextmanager
def no_garbage() -> Any:
    """Collects now and not while the clock runs, as timeit does."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleaved(
    cases: dict[str, Callable[[], float]], rounds: int, title: str, warmup: int = 1
) -> dict[str, Spread]:
    """Repeats every case once a round, in an order drawn anew (seeded) for each round.

    Whatever slows the machine for a while then slows all cases alike, and no case always runs
    behind the same other.

    Args:
        cases: Each runs once and returns its own seconds.
        rounds: Repeats that count.
        title: For the progress bar.
        warmup: Rounds that do not.
    """
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with no_garbage(), progress((rounds + warmup) * len(cases), title) as bar:
        for at in range(-warmup, rounds):
            order = list(cases)
            shuffle(order)
            for name in order:
                spent = cases[name]()
                if at >= 0:
                    seconds[name].append(spent)
                bar.update()
            gc.collect(0)
    return {name: Spread.of(values) for name, values in seconds.items()}


def clocked(
    step: Callable[[], object], before: Callable[[], object] | None = None
) -> Callable[[], float]:
    """Times one call of ``step``; ``before`` runs ahead of it, off the clock."""
    clock = time.perf_counter

    def once() -> float:
        if before is not None:
            before()
        start = clock()
        step()
        return clock() - start

    return once


def repeated(once: Callable[[], float], least: float = 5e-3) -> Callable[[], float]:
    """The mean of as many calls as fill ``least`` seconds (at most 200): one repeat of a case.

    Short calls get one more that does not count, to bring back to the cache what belongs there.
    """
    calls = 0

    def run() -> float:
        nonlocal calls
        if not calls:
            calls = min(200, max(1, math.ceil(least / min(once(), once()))))
        elif calls > 1:
            once()
        return sum(once() for _ in range(calls)) / calls

    return run


# --- saving ---------------------------------------------------------------------------------


def number(value: float, digits: int = 3) -> str:
    """A number in so many significant digits, never in scientific notation for common sizes."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
        return f"{round(value, places):.{max(places, 0)}f}"
    return f"{value:.{digits - 1}e}"


def time_unit(seconds: float) -> tuple[float, str]:
    """The factor and name of a unit that suits a time."""
    return (1e6, "us") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1.0, "s")


def show_time(spread: Spread) -> str:
    """A time with quartiles in a unit that suits it."""
    factor, unit = time_unit(spread.median)
    return f"{number(factor * spread.median)} {unit} ({spread.scaled(factor).range()})"


def count(value: float) -> str:
    """A power of ten where it is one: 2e7 reads better than 20000000."""
    if value < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column reads from the left, the others from the right."""
    rule = [":--", *["--:"] * (len(headers) - 1)]
    lines = [headers, rule, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


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
    figure: Figure,
) -> None:
    """Writes NAME.json, NAME.md and NAME.png, rewrites the README's tables, prints them.

    Args:
        args: From :func:`arguments`.
        name: Of the module.
        facts: From :func:`benchmarks.machine.facts`.
        results: What was measured; a :class:`Spread` becomes median, quartiles and rounds.
        tables: Markdown.
        figure: Saved and closed.
    """
    facts["share_of_others"] = machine.share_of_others(args.started)
    text = f"{machine.sentence(facts)}\n\n{tables}"
    document = {"benchmark": name, "machine": facts, **results}
    (args.out / f"{name}.json").write_text(json.dumps(plain(document), indent=1) + "\n")
    (args.out / f"{name}.md").write_text(f"# {name}\n\n{text}\n\n![{name}]({name}.png)\n")
    figure.savefig(args.out / f"{name}.png", dpi=150, facecolor="white")
    plt.close(figure)
    if args.readme is not None:
        rewrite(args.readme, name, text)
    print(text)


def rewrite(readme: Path, name: str, text: str) -> None:
    """Puts ``text`` between the README's markers ``<!-- NAME: begin -->`` and ``end``."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = readme.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{readme} has no {begin} ... {end} to put the tables between")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")


@contextmanager
def style() -> Any:
    """How our pictures look."""
    with plt.rc_context(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e5e5e5",
            "grid.linewidth": 0.7,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
        }
    ):
        yield
