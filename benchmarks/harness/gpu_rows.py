"""The rows of `make gpu-check`, each measured in a process that ends where one of them fails.

    python -m benchmarks.harness.gpu_rows FIRST [--quick]

measures the rows from one on and prints them, a JSON object a line, until one fails: after an error
of the device nothing else works in its process. :func:`measure` starts such processes, one after
the other, and stops one that hangs.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cuda_model
from benchmarks.harness import gpu_steps, gpu_table
from benchmarks.harness.gpu_table import HEADINGS, Table, brief, failure, release

ROOT = Path(__file__).resolve().parents[2]
CHILD = [sys.executable, "-m", "benchmarks.harness.gpu_rows"]
ROW_SECONDS = 900.0  # of one row, with what its process takes to start
TWICE = 2.0  # seconds between two Control-C that end all rows


@dataclass(frozen=True)
class Row:
    """Lines that are measured together: of a step, or of a passage.

    Attributes:
        names: Of the lines.
        shapes: Of the parameters.
        work: Makes the lines, and says how many failed.
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    work: Callable[[Table], tuple[list[str], int]]

    def failed(self, said: str) -> list[str]:
        """Its lines where it could not be measured."""
        return [failure(name, self.shapes, said) for name in self.names]


def all_rows() -> list[Row]:
    """In the order of the table."""
    rows: list[Row] = []

    def steps(
        of: dict[str, gpu_steps.Step], shapes: list[tuple[int, ...]], pairs: int, note: str = ""
    ) -> None:
        for name, step in of.items():
            rows.append(
                Row(
                    [name + note],
                    shapes,
                    lambda table, name=name, step=step: (
                        [table.step(name, step, shapes, pairs, note)],
                        0,
                    ),
                )
            )

    def passage(of: gpu_steps.Passage, shapes: list[tuple[int, ...]]) -> None:
        rows.append(Row(of.names(), shapes, lambda table: table.passage(of, shapes)))

    plain = [[(numel,)] * count for numel, count in gpu_table.CASES]
    matrices = [[(side, side)] * count for count, side in gpu_table.WEIGHTS]
    few = [[(numel,)] for numel in gpu_table.MATRICES]
    for shapes in plain:
        steps(gpu_steps.STEPS, shapes, gpu_steps.PAIRS)
    for numel, count in gpu_table.ODD_CASES:
        steps(gpu_steps.OF_ODD, [(numel,)] * count, gpu_steps.PAIRS, gpu_table.ODD)
    for shapes in matrices:
        steps(gpu_steps.OF_MATRICES, shapes, gpu_steps.PAIRS)
    for numel in gpu_table.LONG:
        steps(gpu_steps.LONG, [(numel,)], gpu_steps.LONG_PAIRS)
    for shapes in plain:
        passage(gpu_steps.WITH_PAIRS, shapes)
    for shapes in matrices:
        passage(gpu_steps.LIVING, shapes)
        passage(gpu_steps.LIVING_SCALED, shapes)
    for shapes in few:
        passage(gpu_steps.WITH_MATRIX, shapes)
    for shapes in few:
        numel = math.prod(shapes[0])
        rows.append(
            Row(
                ["dense_direction alone"],
                shapes,
                lambda table, numel=numel: ([gpu_table.matrix_line(table, numel)], 0),
            )
        )
    return rows


def work(first: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Measures the rows from ``first`` on, to the first that fails."""
    repeats = 5 if quick else 30
    bandwidth = gpu_table.triad_bandwidth(repeats)
    of = Table(gpu_table.this_gpu(bandwidth), cuda_model.counted(), repeats)
    yield {"head": f"Triad: {bandwidth / 1e12:.3f} TB/s. The model takes this GPU for: {of.gpu}."}
    for number, row in enumerate(all_rows()[first:], first):
        print(f"{row.names[0]}, {len(row.shapes)} of {row.shapes[0]}", file=sys.stderr, flush=True)
        try:
            lines, failed = row.work(of)
        except Exception as error:
            lines, failed = row.failed(brief(error)), len(row.names)
        yield {"row": number, "lines": lines, "failed": failed}
        if failed:
            break
        release()
    yield {"end": True}


def follow(first: int, quick: bool) -> Iterator[dict[str, Any]]:
    """What a process says that does the same.

    Raises:
        RuntimeError: It died, or said nothing for too long.
    """
    command = [*CHILD, str(first), *(["--quick"] if quick else [])]
    said: queue.Queue[str | None] = queue.Queue()
    with tempfile.TemporaryFile("w+") as errors:
        # Of a session of its own: Control-C is for this process, which then ends it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                said.put(line)
            said.put(None)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while (line := said.get(timeout=ROW_SECONDS)) is not None:
                if line.startswith("{"):
                    found = json.loads(line)
                    yield found
                    if "end" in found:
                        return
            status = process.wait()
            errors.seek(0)
            raise RuntimeError(f"the process ended with {status}: {errors.read()[-200:]}")
        except queue.Empty:
            raise RuntimeError(f"stopped after {ROW_SECONDS:g} s") from None
        finally:
            process.kill()
            process.wait()
            reader.join()
            assert process.stdout is not None
            process.stdout.close()


def measure(quick: bool) -> Iterator[tuple[bool, str]]:
    """The table's lines as they come, and whether each row is well.

    Control-C ends the row under way; twice in a moment all.
    """
    rows, first, failed, interrupted, headed = all_rows(), 0, 0, -math.inf, False
    while first < len(rows):
        try:
            for found in follow(first, quick):
                if "head" in found and not headed:
                    headed = True
                    yield True, found["head"] + "\n"
                    yield True, "| " + " | ".join(HEADINGS) + " |"
                    yield True, "|---" * len(HEADINGS) + "|"
                if "row" in found:
                    first = found["row"] + 1
                    failed += found["failed"]
                    for line in found["lines"]:
                        yield not found["failed"], line
            continue
        except KeyboardInterrupt:
            if time.monotonic() - interrupted < TWICE:
                raise
            interrupted, lost = time.monotonic(), "stopped by Control-C"
        except Exception as error:
            lost = brief(error)
        lines = rows[first].failed(lost)
        first, failed = first + 1, failed + len(lines)
        for line in lines:
            yield False, line
    if failed:
        yield False, f"\n{failed} rows FAILED."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int, help="number of the first row, from 0")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    for found in work(options.first, options.quick):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
