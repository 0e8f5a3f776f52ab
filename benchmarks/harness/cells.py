"""Many independent runs side by side, each of which is stored and not run again: cells.

A cell is a call of a function of some module with options that JSON can hold; its result can too.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import hashlib
import importlib
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[2]


class Cell(NamedTuple):
    """One call.

    Attributes:
        key: Of the result, and the name of its file: letters, digits, ``/``, ``.``, ``-``, ``_``.
        function: "package.module:name".
        options: Its keyword arguments, as JSON gives them back.
        also: Modules that it imports by a name among its options, so that its own module's
            fingerprint does not know of them.
    """

    key: str
    function: str
    options: dict[str, Any]
    also: tuple[str, ...] = ()


class TooLateError(Exception):
    """A cell was not begun, since time was up."""


class CellError(Exception):
    """Some cells failed.

    Attributes:
        results: Of the others, by key.
        failures: Errors by key.
    """

    def __init__(self, results: dict[str, Any], failures: dict[str, BaseException]) -> None:
        lines = [f"{key}: {type(error).__name__}: {error}" for key, error in failures.items()]
        super().__init__(f"{len(failures)} cells failed\n" + "\n".join(lines))
        self.results, self.failures = results, failures


def pool(workers: int) -> Executor | None:
    """So many processes with one thread each, started when they are needed; None for 0."""
    if workers == 0:
        return None
    # Spawned: a fork of a process whose torch has threads may hang.
    return concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )


def run(
    cells: Iterable[Cell],
    folder: Path,
    title: str,
    workers: int | Executor | None = 2,
    fresh: bool = False,
    until: float = math.inf,
) -> dict[str, Any]:
    """The results of all cells by key, from ``folder`` where they are stored there and still fit.

    Each of the other cells runs in one of the workers. Its result goes to ``folder/KEY.json`` at
    once, with the function, options and :func:`fingerprint`, and the CPU seconds it took.

    Args:
        cells: Keys are different.
        folder: Made where it is missing.
        title: For the progress bar.
        workers: From :func:`pool`, for several calls, or so many of them for this one.
        fresh: Run all of them.
        until: The ``time.time()`` after which none begins; what has not begun has no result.

    Raises:
        ValueError: Two cells have one key, or a key is no file's name.
        CellError: After all others have been run and stored.
    """
    cells = list(cells)
    _check_keys(cells)
    results = {} if fresh else results_of(cells, folder)
    todo = [cell for cell in cells if cell.key not in results]
    if not todo:
        return results
    failures: dict[str, BaseException] = {}
    with tqdm(total=len(cells), initial=len(results), desc=title, unit="cell", ncols=79) as bar:
        for cell, outcome in _outcomes(todo, workers, until):
            try:
                results[cell.key] = _store(cell, folder, *outcome())
            except TooLateError:
                continue
            except Exception as error:
                failures[cell.key] = error
                tqdm.write(f"{cell.key} failed: {type(error).__name__}: {error}")
            bar.update()
    if failures:
        raise CellError(results, failures)
    return results


def _outcomes(
    cells: list[Cell], workers: int | Executor | None, until: float
) -> Iterator[tuple[Cell, Callable[[], tuple[Any, float]]]]:
    """Each cell when it is done, with a function that returns its result or raises its error."""
    if isinstance(workers, int):
        with pool(workers) or contextlib.nullcontext() as executor:
            yield from _outcomes(cells, executor, until)
        return
    if workers is None:
        yield from ((cell, partial(_call, cell, until)) for cell in cells)
        return
    running = {workers.submit(_call, cell, until): cell for cell in cells}
    try:
        for future in concurrent.futures.as_completed(running):
            yield running[future], future.result
    finally:  # interrupted: what runs already ends, the rest does not begin
        for future in running:
            future.cancel()


def _check_keys(cells: list[Cell]) -> None:
    seen = set()
    for key in (cell.key for cell in cells):
        if key in seen:
            raise ValueError(f"two cells have the key {key!r}")
        seen.add(key)
        parts = key.split("/")
        plain = key.replace("/", "").replace(".", "").replace("-", "").replace("_", "")
        if not (plain.isascii() and plain.isalnum()) or {"", ".", ".."} & {*parts}:
            raise ValueError(f"key {key!r} is no file's name: use letters, digits, / . - _")


def _call(cell: Cell, until: float) -> tuple[Any, float]:
    if time.time() > until:
        raise TooLateError(cell.key)
    module, _, name = cell.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    start = time.process_time()
    return function(**cell.options), time.process_time() - start


# --- storage --------------------------------------------------------------------------------


def stamp(cell: Cell) -> dict[str, str]:
    """What was asked, and of which state of the code, as two hashes.

    For results that are kept elsewhere than in the folder of the cells.
    """
    of = _conditions(cell)
    asked = json.dumps([of["function"], of["options"]], sort_keys=True)
    return {"asked": hashlib.sha256(asked.encode()).hexdigest()[:16], "code": of["fingerprint"]}


def _conditions(cell: Cell) -> dict[str, Any]:
    return {
        "function": cell.function,
        "options": cell.options,
        "fingerprint": "-".join(
            fingerprint(module) for module in (cell.function.partition(":")[0], *cell.also)
        ),
    }


def _stored(cell: Cell, folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / f"{cell.key}.json").read_text())
    except (OSError, ValueError):
        return None
    fits = all(record.get(name) == value for name, value in _conditions(cell).items())
    return record if fits else None


def _store(cell: Cell, folder: Path, result: Any, seconds: float) -> Any:
    record = {**_conditions(cell), "seconds": round(seconds, 3), "result": result}
    path = folder / f"{cell.key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record))
    unfinished.replace(path)
    # As a later run will read it.
    return json.loads(path.read_text())["result"]


def results_of(cells: Iterable[Cell], folder: Path) -> dict[str, Any]:
    """The results of those cells that are stored and still fit, by key."""
    records = {cell.key: _stored(cell, folder) for cell in cells}
    return {key: record["result"] for key, record in records.items() if record is not None}


def seconds(cells: Iterable[Cell], folder: Path) -> float:
    """CPU seconds that the stored cells took."""
    records = [_stored(cell, folder) for cell in cells]
    return sum(record["seconds"] for record in records if record is not None)


# --- fingerprints ---------------------------------------------------------------------------


@cache
def fingerprint(module: str) -> str:
    """A hash of what a cell of this module depends on.

    Namely: the sources of the module and of all that it imports from this repository, those of all
    of fuse_ext and its kernels if it imports any of it, and torch's version. Comments and layout of
    Python sources do not count.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    sources = _sources_of(module)
    package = ROOT / "fuse_ext"
    kernels: list[Path] = []
    if any(package in path.parents for path in sources):
        sources |= set(package.rglob("*.py"))
        kernels = sorted((ROOT / "csrc").rglob("*"))
    for path in sorted(sources):
        digest.update(ast.dump(ast.parse(path.read_text())).encode())
    for path in kernels:
        if path.suffix in (".cpp", ".h", ".inl", ".cu", ".cuh"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _sources_of(module: str) -> set[Path]:
    """The module's file, and those that it imports from here, directly or not."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        path = _path_of(waiting.pop())
        if path is None or path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                waiting += [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    return found


def _path_of(module: str) -> Path | None:
    # The scripts in examples/ call each other by bare names.
    for root in (ROOT, ROOT / "examples"):
        base = root.joinpath(*module.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None
