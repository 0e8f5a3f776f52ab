"""What the pages say can be run is run; where the README points, something is.

The blocks of a page that are marked ``python`` run in order, in one namespace. One that cannot be
run has ``<!-- not run: why -->`` on the line before it, and is compiled.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fuse_ext

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = re.compile(r"\s*<!-- not run: (\S.+) -->")


class Block(NamedTuple):
    """Python on a page; ``why`` it is not to be run, if so."""

    line: int
    code: str
    why: str | None


def blocks_of(text: str) -> list[Block]:
    """In the order of the page."""
    lines = text.splitlines()
    found = []
    fences = (i for i, line in enumerate(lines) if line.strip().startswith("```python"))
    for i in fences:
        indent = lines[i].partition("`")[0]
        end = lines.index(f"{indent}```", i)
        why = NOT_RUN.fullmatch(lines[i - 1]) if i else None
        code = dedent("\n".join(lines[i + 1 : end]))
        found.append(Block(i + 1, code, why[1] if why else None))
    return found


def readers() -> dict[str, Any]:
    """What a reader of the README has: a model, a loss, the full batch, and batches."""
    x = torch.linspace(-1.0, 1.0, 64).unsqueeze(1)
    y = torch.sin(3.0 * x)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    batches = list(zip(x.split(16), y.split(16), strict=True)) * 10
    return {"torch": torch, "model": model, "loss_fn": nn.MSELoss(), "x": x, "y": y} | {
        "batches": batches
    }


def run_page(page: str, text: str, namespace: dict[str, Any]) -> None:
    for block in blocks_of(text):
        code = compile(block.code, f"{page}, block at line {block.line}", "exec")
        if block.why is None:
            exec(code, namespace)


@pytest.fixture(autouse=True)
def _defaults_come_back() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text()
    assert text.count("```python") == len(blocks_of(text))
    run_page(page.name, text, readers() if page == README else {})


def test_a_block_that_fails_fails_the_page() -> None:
    with pytest.raises(ZeroDivisionError):
        run_page("page", "```python\nx = 1\n```\n\n  ```python\n  x / 0\n  ```\n", {})
    with pytest.raises(SyntaxError):
        run_page("page", "<!-- not run: it is wrong -->\n```python\nx =\n```\n", {})
    run_page("page", "<!-- not run: it is wrong -->\n```python\n1 / 0\n```\n", {})
    with pytest.raises(ZeroDivisionError):  # without a reason it is run
        run_page("page", "<!-- not run: -->\n```python\n1 / 0\n```\n", {})


def strings_of(package: Path) -> Iterator[str]:
    """Every string in the package, with the expressions that stand in it."""
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value for part in node.values)  # of text or of an expression
                yield "".join(p if isinstance(p, str) else ast.unparse(p) for p in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_what_is_said() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    tables = page.partition("## Errors")[2].partition("\n## ")[0]
    rows = [line for line in tables.splitlines() if line.startswith("| `")]
    quotes = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(quotes) >= 20
    said = list(strings_of(ROOT / "fuse_ext"))
    for quote in quotes:
        # In what is left out a message names values.
        parts = [part.strip(" ,") for part in quote.split("...")]
        assert any(all(part in text for part in parts) for text in said), quote


def test_every_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text()
    for name in set(fuse_ext.__all__) - {"__version__"}:
        assert re.search(rf":: {name}$", reference, re.MULTILINE), name


def test_no_merge_was_left_half_done() -> None:
    marks = re.compile(r"^(<{7} |={7}$|>{7} )", re.MULTILINE)
    for folder in ("benchmarks", "csrc", "docs", "examples", "fuse_ext", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".cpp", ".cu", ".cuh", ".h", ".inl", ".txt"):
                assert not marks.search(path.read_text()), path
    for path in ROOT.glob("*.*"):
        if path.suffix in (".py", ".md", ".toml"):
            assert not marks.search(path.read_text()), path


def slug(heading: str) -> str:
    """A heading's anchor, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in page.read_text().splitlines() if line[:1] == "#"}


def test_readme_points_at_what_is_there() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", README.read_text())
    inside = [target for target in targets if "://" not in target]
    assert len(inside) > 5
    for target in inside:
        path, _, anchor = target.partition("#")
        file = ROOT / path if path else README
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
