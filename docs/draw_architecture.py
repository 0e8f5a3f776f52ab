"""The rooms of fuse_ext, who imports whom, and the picture of both: docs/images/architecture.svg.

``python docs/draw_architecture.py`` draws it anew, with Python's standard library alone: files are
parsed, nothing is imported. What lives in a room is read from the page that shows the picture,
docs/architecture.md. tests/project/test_architecture.py holds the package to the table here, and
compares the picture.
"""

from __future__ import annotations

import ast
from collections.abc import KeysView
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fuse_ext"
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"


class Room(NamedTuple):
    """A folder of the package; what lives there is said in docs/architecture.md alone.

    Attributes:
        floor: Where it stands; arrows point to lower floors only.
        may_import: Where it may import from, from the top down.
    """

    floor: int
    may_import: tuple[str, ...]


ROOMS = {
    "optim": Room(
        6, ("phase", "tell", "objective", "curvature", "search", "switch", "vector", "kernels")
    ),
    "phase": Room(5, ("objective", "curvature", "search", "switch", "vector", "kernels")),
    "tell": Room(5, ("objective", "curvature", "search", "vector")),
    "objective": Room(4, ("curvature", "search", "vector", "kernels")),
    "curvature": Room(3, ("vector", "kernels")),
    "search": Room(3, ()),
    "switch": Room(3, ()),
    "vector": Room(2, ("kernels", "_C")),
    "kernels": Room(1, ("_C",)),
}
# Modules beside the rooms. The front door may import anything. The others import nothing of ours,
# and anyone may import them, but for the compiled one, which is in the table.
FRONT_DOOR, COMPILED = "__init__.py", "_C"
FOR_ALL = ("checks.py", "_version.py")


def rows_of_the_page() -> dict[str, list[str]]:
    """The cells of every room's row in the page's table."""
    rows = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[1].strip("`/") in ROOMS:
            rows[cells[1].strip("`/")] = cells
    return rows


# --- who imports whom -----------------------------------------------------------------------

Arrow = tuple[str, str]


def files_of(package: Path) -> dict[str, Path]:
    """Every Python file of a package by its path from there, such as ``objective/trials.py``."""
    return {path.relative_to(package).as_posix(): path for path in sorted(package.rglob("*.py"))}


def room_of(name: str) -> str:
    """The room that a file is in, empty for the modules beside the rooms."""
    return name.partition("/")[0] if "/" in name else ""


def arrows(package: Path) -> set[Arrow]:
    """All imports within a package, those in functions and for type checkers included.

    An arrow leads to the file that is named: importing ``fuse_ext.a.b`` is an arrow to ``a/b.py``,
    and none to ``a/__init__.py``. What names no file is an arrow to the dotted name.
    """
    files = files_of(package)
    return {
        (name, target)
        for name, path in files.items()
        for node in ast.walk(ast.parse(path.read_text()))
        for target in _targets(node, name, package.name, files.keys())
    }


def _targets(node: ast.AST, name: str, package: str, files: KeysView[str]) -> list[str]:
    """What one statement or call in the file ``name`` imports from."""
    if isinstance(node, ast.Import):
        dotted = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = module_named(node, name, package)
        inner = [f"{base}.{alias.name}" for alias in node.names]
        dotted = [module if _file(module, files) else base for module in inner]
    elif isinstance(node, ast.Call):
        dotted = _imported_by_name(node)
    else:
        return []
    ours = [target for target in dotted if target.split(".")[0] == package]
    return [_file(target, files) or target for target in ours]


def module_named(node: ast.ImportFrom, name: str, package: str) -> str:
    """The module, dotted and absolute, that the file ``name`` imports from."""
    inside = [package, *name.split("/")[:-1]]
    above = inside[: len(inside) - node.level + 1] if node.level else []
    return ".".join([*above, *filter(None, [node.module])])


def _imported_by_name(call: ast.Call) -> list[str]:
    """The module of ``import_module("...")`` or the like, which would hide an arrow."""
    called = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if called not in ("import_module", "__import__") or not call.args:
        return []
    named = call.args[0]
    return [named.value] if isinstance(named, ast.Constant) and isinstance(named.value, str) else []


def _file(dotted: str, files: KeysView[str]) -> str:
    """The file of a module of the package, empty where there is none."""
    inside = "/".join(dotted.split(".")[1:])
    if inside == COMPILED:
        return COMPILED
    candidates = (f"{inside}.py", f"{inside}/__init__.py".removeprefix("/"))
    return next((file for file in candidates if file in files), "")


def between_rooms(found: set[Arrow]) -> set[Arrow]:
    """The same arrows, of rooms instead of files."""
    pairs = {(room_of(source), room_of(target)) for source, target in found}
    return {(source, target) for source, target in pairs if source and target and source != target}


def circles(found: set[Arrow]) -> list[list[str]]:
    """Circles among the arrows, each from its first file back to it, until none is left.

    Where several pass through one arrow, one of them is listed.
    """
    left, rings = set(found), []
    while True:
        graph: dict[str, list[str]] = {}
        for source, target in sorted(left):
            graph.setdefault(source, []).append(target)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            ring = error.args[1][:0:-1]
            first = ring.index(min(ring))
            ring = [*ring[first:], *ring[: first + 1]]
            rings.append(ring)
            left.discard((ring[0], ring[1]))
        else:
            return rings


def longest_chain(found: set[Arrow]) -> list[str]:
    """The longest way along the arrows, which must have no circle."""
    graph: dict[str, list[str]] = {}
    for source, target in sorted(found):
        graph.setdefault(source, []).append(target)
    longest: dict[str, list[str]] = {}
    for node in TopologicalSorter(graph).static_order():
        below = (longest[target] for target in graph.get(node, ()))
        longest[node] = [node, *max(below, key=len, default=[])]
    return max(longest.values(), key=len, default=[])


# --- the picture ----------------------------------------------------------------------------

WIDTH, TOP, GAP = 1000, 20, 46
# Where rooms begin and end, from left to right. The lanes between them are for arrows that pass.
PLACES = {
    "optim": (52, 984),
    "tell": (150, 392),
    "phase": (432, 924),
    "objective": (252, 642),
    "curvature": (108, 400),
    "search": (452, 696),
    "switch": (788, 960),
    "vector": (150, 730),
    "kernels": (52, 984),
}
# Arrows go straight down, at this place from the left.
LANES = {
    ("optim", "phase"): 680,
    ("optim", "tell"): 270,
    ("optim", "objective"): 412,
    ("optim", "switch"): 948,
    ("optim", "curvature"): 128,
    ("optim", "kernels"): 68,
    ("tell", "objective"): 320,
    ("tell", "curvature"): 180,
    ("phase", "objective"): 540,
    ("phase", "switch"): 860,
    ("phase", "search"): 669,
    ("phase", "vector"): 714,
    ("phase", "kernels"): 768,
    ("objective", "curvature"): 350,
    ("objective", "search"): 590,
    ("objective", "vector"): 418,
    ("curvature", "vector"): 280,
    ("curvature", "kernels"): 128,
    ("vector", "kernels"): 440,
}
# Or they turn twice: (place at the start, how far below that room's floor, place at the end).
TURNS = {
    ("tell", "search"): (206, 4, 16, 500),
    ("tell", "vector"): (192, 4, 30, 436),
    ("phase", "curvature"): (470, 5, 22, 230),
    ("optim", "search"): (934, 4, 30, 684),
}
# Or once: out of a room's side, or into it.
OUT = {("objective", "kernels"): 748}
IN = {("optim", "vector"): 974}

INK, LINE, PASSING, PALE = "#1f2328", "#57606a", "#8c959f", ' fill-opacity="0.75"'
SANS, MONO = "Helvetica, Arial, sans-serif", "Menlo, Consolas, DejaVu Sans Mono, monospace"
NAME, SMALL, FILE = 15, 12, 11
SANS_EM, MONO_EM = 0.6, 0.605  # widths of letters in the widest font that may come


class Box(NamedTuple):
    """A room in the picture: its lines of text, and its sub-folders' names with theirs."""

    lives: list[str]
    files: list[str]
    folders: list[tuple[str, list[str]]]

    @property
    def height(self) -> int:
        """With all that it holds."""
        inner = sum(26 + 15 * len(lines) for _, lines in self.folders)
        return 36 + 15 * len(self.lives) + 15 * len(self.files) + inner


def _wrapped(words: list[str], width: float, em: float, gap: str) -> list[str]:
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]}{gap}{word}" if lines else word
        if lines and len(longer) * em <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _box(room: str, says: str, names: list[str]) -> Box:
    width = PLACES[room][1] - PLACES[room][0] - 24
    inside: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.removeprefix(f"{room}/").rpartition("/")
        if file != "__init__.py":
            inside.setdefault(folder, []).append(file)
    lives = _wrapped(says.replace("`", "").split(), width, SANS_EM * SMALL, " ")
    em = MONO_EM * FILE
    files = _wrapped(inside.pop("", []), width, em, "  ")
    folders = [(name, _wrapped(f, width - 20, em, "  ")) for name, f in sorted(inside.items())]
    return Box(lives, files, folders)


def _text(x: float, y: float, size: int, text: str, more: str = "", font: str = SANS) -> str:
    look = f'font-family="{font}" font-size="{size}" fill="{INK}" xml:space="preserve"{more}'
    return f'<text x="{x:g}" y="{y:g}" {look}>{text}</text>'


def _rectangle(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{more}/>'


def _draw_box(room: str, box: Box, top: float, height: float) -> list[str]:
    left, right = PLACES[room]
    drawn = [_rectangle(left, top, right - left, height, "#ffffff", f' rx="5" stroke="{LINE}"')]
    x, y = left + 12, top + 22
    drawn.append(_text(x, y, NAME, f"{room}/", ' font-weight="bold"'))
    for line in box.lives:
        y += 15
        drawn.append(_text(x, y, SMALL, line, PALE))
    y += 3
    for line in box.files:
        y += 15
        drawn.append(_text(x, y, FILE, line, font=MONO))
    for folder, lines in box.folders:
        y += 8
        size = 18 + 15 * len(lines)
        drawn.append(_rectangle(x, y, right - left - 24, size, "#f6f8fa", ' rx="3"'))
        drawn.append(_text(x + 10, y + 13, FILE, f"{folder}/", ' font-weight="bold"', MONO))
        for i, line in enumerate(lines):
            drawn.append(_text(x + 10, y + 28 + 15 * i, FILE, line, font=MONO))
        y += size
    return drawn


def route(arrow: Arrow, spans: dict[int, tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of an arrow between two rooms; ``spans`` are :func:`floors`.

    Raises:
        KeyError: No way is known; it belongs into ``LANES``, ``TURNS``, ``OUT`` or ``IN``.
    """
    source, target = arrow
    start, end = spans[ROOMS[source].floor][1], spans[ROOMS[target].floor][0]
    if arrow in LANES:
        x = LANES[arrow]
        return [(x, start), (x, end)]
    if arrow in TURNS:
        x, floor, below, last = TURNS[arrow]
        y = spans[floor][1] + below
        return [(x, start), (x, y), (last, y), (last, end)]
    if arrow in OUT:
        y = sum(spans[ROOMS[source].floor]) / 2
        return [(PLACES[source][1], y), (OUT[arrow], y), (OUT[arrow], end)]
    if arrow in IN:
        y = sum(spans[ROOMS[target].floor]) / 2
        return [(IN[arrow], start), (IN[arrow], y), (PLACES[target][1], y)]
    raise KeyError(f"docs/draw_architecture.py knows no way for {source} -> {target}")


def _draw_arrow(corners: list[tuple[float, float]], passes: bool) -> str:
    points = " ".join(f"{x:g},{y:g}" for x, y in corners)
    if passes:
        style = f'stroke="{PASSING}" stroke-dasharray="5 3" marker-end="url(#passing)"'
    else:
        style = f'stroke="{LINE}" stroke-width="1.6" marker-end="url(#next)"'
    return f'<polyline points="{points}" fill="none" {style}/>'


def _marker(name: str, color: str) -> str:
    size = 'markerUnits="userSpaceOnUse" markerWidth="9" markerHeight="8" refX="8.5" refY="4"'
    path = f'<path d="M0,0.5 L9,4 L0,7.5 z" fill="{color}"/>'
    return f'<marker id="{name}" {size} orient="auto">{path}</marker>'


def _legend(y: float) -> list[str]:
    left = PLACES["optim"][0]
    drawn = []
    for x, passes, says in ((left, False, "the next floor"), (left + 250, True, "a lower floor")):
        drawn.append(_draw_arrow([(x, y), (x + 36, y)], passes))
        drawn.append(_text(x + 44, y + 4, SMALL, f"imports from {says}"))
    others = (
        "checks.py and _version.py, which anyone may import; _C (csrc/), for kernels/ and vector/"
    )
    return [*drawn, _text(left, y + 24, SMALL, f"Not drawn: __init__.py; {others}.")]


def _boxes(package: Path) -> dict[str, Box]:
    names, rows = list(files_of(package)), rows_of_the_page()
    return {
        room: _box(room, rows[room][2], [name for name in names if room_of(name) == room])
        for room in ROOMS
    }


def floors(package: Path = PACKAGE) -> dict[int, tuple[float, float]]:
    """Top and bottom of each floor in the picture, from the top down."""
    boxes, y = _boxes(package), float(TOP)
    spans: dict[int, tuple[float, float]] = {}
    for floor in sorted({room.floor for room in ROOMS.values()}, reverse=True):
        height = max(boxes[room].height for room in ROOMS if ROOMS[room].floor == floor)
        spans[floor] = y, y + height
        y += height + GAP
    return spans


def draw(package: Path = PACKAGE) -> str:
    """The picture of a package as SVG."""
    spans = floors(package)
    drawn = []
    for floor, (top, bottom) in spans.items():
        drawn.append(_rectangle(8, top - 8, WIDTH - 16, bottom - top + 16, "#f0f3f6", ' rx="6"'))
        drawn.append(_text(22, (top + bottom) / 2 + 6, 18, str(floor), PALE))
    for source, target in sorted(between_rooms(arrows(package))):
        passes = ROOMS[source].floor - ROOMS[target].floor > 1
        drawn.append(_draw_arrow(route((source, target), spans), passes))
    for room, box in _boxes(package).items():
        top, bottom = spans[ROOMS[room].floor]
        drawn += _draw_box(room, box, top, bottom - top)
    y = spans[1][1] + GAP + 28
    drawn += _legend(y - 40)
    size = f'width="{WIDTH}" height="{y:g}" viewBox="0 0 {WIDTH} {y:g}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        "<title>The rooms of fuse_ext and who imports whom</title>",
        f"<defs>{_marker('next', LINE)}{_marker('passing', PASSING)}</defs>",
        _rectangle(0, 0, WIDTH, y, "#ffffff"),
    ]
    return "\n".join([*head, *drawn, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(draw())
