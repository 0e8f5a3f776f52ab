"""The rooms of the package: who may import whom, how large things are, and what the page says.

The table of rooms is docs/draw_architecture.py's; ``docs/architecture.md`` explains it.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fuse_ext"
PAGE = ROOT / "docs" / "architecture.md"
SUFFIXES = {".py", ".pyi", ".md", ".svg", ".txt", ".cpp", ".cu", ".h", ".inl"}
MOST_FLOORS = 6  # rooms on the longest way down; modules beside the rooms are not counted
MOST_LINES = 400
MOST_FILES = 8  # of a folder, __init__ included; a sub-folder is counted apart
LEAST_DOC_LINES = 3  # what a folder's __init__ says
MOST_ANCESTORS = 2  # as FusePV -> FlatOptimizer -> Optimizer; these do not count:
PLAIN = {"object", "Protocol", "ABC", "NamedTuple", "Generic", "Enum", "Exception"}


def load() -> ModuleType:
    path = ROOT / "docs" / "draw_architecture.py"
    spec = importlib.util.spec_from_file_location("draw_architecture", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # NamedTuple looks itself up
    spec.loader.exec_module(module)
    return module


architecture = load()
ROOMS = architecture.ROOMS

# --- the rules: each returns what breaks it, one line for each ------------------------------


def against_the_table(package: Path) -> list[str]:
    """Imports that no row of the table allows."""
    broken = []
    files = architecture.files_of(package)
    for source, target in sorted(architecture.arrows(package)):
        room, other = architecture.room_of(source), architecture.room_of(target)
        may_import = ROOMS[room].may_import if room in ROOMS else ()
        if source == architecture.FRONT_DOOR:
            allowed = target in files or target == architecture.COMPILED
        elif not room:  # checks.py and the like stand below all rooms
            allowed = False
        elif target == architecture.COMPILED:
            allowed = target in may_import
        elif other and target in files:
            allowed = other in (room, *may_import)
        else:
            allowed = target in architecture.FOR_ALL
        if not allowed:
            broken.append(f"{source} -> {target}")
    return broken


def without_a_room(package: Path) -> list[str]:
    """Files in folders that are no rooms, and modules that nobody has planned beside them."""
    beside = {architecture.FRONT_DOOR, *architecture.FOR_ALL}
    names = architecture.files_of(package)
    return [
        name for name in names if name not in beside and architecture.room_of(name) not in ROOMS
    ]


def circles(package: Path) -> list[str]:
    """Modules that import each other, on whatever way."""
    return [" -> ".join(ring) for ring in architecture.circles(architecture.arrows(package))]


def too_tall(package: Path) -> list[str]:
    """The longest way down from room to room, if it is too long; or rooms in a circle."""
    found = architecture.between_rooms(architecture.arrows(package))
    ways = architecture.circles(found)
    if not ways:
        chain = architecture.longest_chain(found)
        ways = [chain] if len(chain) > MOST_FLOORS else []
    return [" -> ".join(way) for way in ways]


def too_long(package: Path) -> list[str]:
    """Files of too many lines."""
    lengths = {
        name: len(path.read_text().splitlines())
        for name, path in architecture.files_of(package).items()
    }
    return [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > MOST_LINES]


def too_full(package: Path) -> list[str]:
    """Folders of too many files."""
    held: dict[str, int] = {}
    for name in architecture.files_of(package):
        folder = name.rpartition("/")[0]
        held[folder] = held.get(folder, 0) + 1
    return [f"{folder}/: {n} files" for folder, n in held.items() if folder and n > MOST_FILES]


def silent(package: Path) -> list[str]:
    """Files that do not say what they are, and folders that say too little of themselves."""
    broken = []
    for name, path in architecture.files_of(package).items():
        says = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        least = LEAST_DOC_LINES if path.name == "__init__.py" else 1
        if len(says) < least:
            broken.append(f"{name}: a docstring of {len(says)} lines, not {least}")
    return broken


def unfinished(package: Path) -> list[str]:
    """Where NotImplementedError is raised: what cannot do a thing must not look as if it could."""
    return [
        f"{name}:{node.lineno}"
        for name, path in architecture.files_of(package).items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
        and node.exc is not None
        and "NotImplementedError" in {getattr(n, "id", "") for n in ast.walk(node.exc)}
    ]


class Classes:
    """The classes of a package by their dotted names, and what each inherits."""

    def __init__(self, package: Path) -> None:
        self._bases: dict[str, list[str]] = {}
        self._imported: dict[str, str] = {}  # what is imported into a module, by its name there
        for name, path in architecture.files_of(package).items():
            module = ".".join([package.name, *name.removesuffix(".py").split("/")])
            module = module.removesuffix(".__init__")
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    names = [
                        ast.unparse(getattr(b, "value", b))
                        if isinstance(b, ast.Subscript)
                        else ast.unparse(b)
                        for b in node.bases
                    ]
                    self._bases[f"{module}.{node.name}"] = [f"{module}.{base}" for base in names]
                elif isinstance(node, ast.ImportFrom):
                    source = architecture.module_named(node, name, package.name)
                    for alias in node.names:
                        here = f"{module}.{alias.asname or alias.name}"
                        self._imported[here] = f"{source}.{alias.name}"
                elif isinstance(node, ast.Import):
                    for alias in node.names:
                        whole = alias.asname or alias.name.split(".")[0]
                        self._imported[f"{module}.{whole}"] = alias.name if alias.asname else whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def _meant(self, dotted: str) -> str:
        """The name by which its own module knows it: imports are followed."""
        if dotted in self._bases:
            return dotted
        parts = dotted.split(".")
        for i in range(len(parts), 0, -1):
            source = self._imported.get(".".join(parts[:i]))
            if source is not None:
                return self._meant(".".join([source, *parts[i:]]))
        return dotted

    def ancestors(self, name: str) -> list[str]:
        """All that a class inherits from, but for itself and what is in ``PLAIN``."""
        above: list[str] = []
        for base in map(self._meant, self._bases[name]):
            if base in self._bases:
                above += [base, *self.ancestors(base)]
            elif base.rpartition(".")[2] not in PLAIN:
                above.append(base.removeprefix(f"{name.rpartition('.')[0]}."))
        return list(dict.fromkeys(above))


def too_deep(package: Path) -> list[str]:
    """Classes that inherit from too many."""
    classes = Classes(package)
    chains = [[name, *classes.ancestors(name)] for name in classes]
    return [" -> ".join(chain) for chain in chains if len(chain) > 1 + MOST_ANCESTORS]


RULES = [
    against_the_table,
    without_a_room,
    circles,
    too_tall,
    too_long,
    too_full,
    silent,
    unfinished,
    too_deep,
]

# --- the package ----------------------------------------------------------------------------


def hold(what: str, broken: list[str]) -> None:
    assert not broken, "\n".join([what, *broken])


@pytest.mark.parametrize("rule", RULES, ids=[rule.__name__ for rule in RULES])
def test_the_package_keeps(rule: Callable[[Path], list[str]]) -> None:
    hold(str(rule.__doc__), rule(PACKAGE))


def test_the_table_has_few_floors() -> None:
    assert len({room.floor for room in ROOMS.values()}) <= MOST_FLOORS


def test_the_table_points_down_only() -> None:
    broken = [
        f"{name}, floor {room.floor} -> {other}, floor {ROOMS[other].floor}"
        for name, room in ROOMS.items()
        for other in room.may_import
        if other in ROOMS and ROOMS[other].floor >= room.floor
    ]
    hold("Arrows that do not point down", broken)


def test_every_room_is_there() -> None:
    hold("No such room", [room for room in ROOMS if not (PACKAGE / room / "__init__.py").is_file()])


# --- the picture and the page ---------------------------------------------------------------


def test_the_picture_is_of_this_package() -> None:
    assert architecture.PICTURE.read_text() == architecture.draw(), (
        "python docs/draw_architecture.py"
    )


def test_arrows_touch_only_the_rooms_they_join() -> None:
    """For every arrow that the table allows, drawn today or not."""
    spans = architecture.floors(PACKAGE)
    for room, (_, may_import) in ROOMS.items():
        for other in set(may_import) & ROOMS.keys():
            corners = architecture.route((room, other), spans)
            for (x0, y0), (x1, y1) in itertools.pairwise(corners):
                for name in ROOMS.keys() - {room, other}:
                    left, right = architecture.PLACES[name]
                    top, bottom = spans[ROOMS[name].floor]
                    beside = max(x0, x1) < left or min(x0, x1) > right
                    assert beside or max(y0, y1) < top or min(y0, y1) > bottom, (room, other, name)


def test_the_page_has_the_table() -> None:
    rows = architecture.rows_of_the_page()
    for name, (floor, may_import) in ROOMS.items():
        listed = ", ".join(other for other in may_import if other in ROOMS) or "nothing"
        assert (rows[name][0], rows[name][-1]) == (str(floor), listed), name


def test_the_page_names_what_is_there() -> None:
    words = re.findall(r"`([\w./-]+)`", PAGE.read_text())
    paths = [word for word in words if word.endswith("/") or Path(word).suffix in SUFFIXES]
    assert len(paths) > len(ROOMS)
    gone = [path for path in paths if not ((PACKAGE / path).exists() or (ROOT / path).exists())]
    hold("The page names what is not there", gone)


def test_the_page_names_functions_that_are_there() -> None:
    """A method stands in its class, any other name somewhere in the package or csrc/."""
    sources = [path.read_text() for path in architecture.files_of(PACKAGE).values()]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    classes = {node.name: node.body for node in nodes if isinstance(node, ast.ClassDef)}
    sources += [path.read_text() for path in (ROOT / "csrc").rglob("*.h")]
    words = set(re.findall(r"\w+", "\n".join(sources)))

    def there(name: str) -> bool:
        owner, _, member = name.rpartition(".")
        if owner in classes:
            return member in {getattr(statement, "name", "") for statement in classes[owner]}
        return set(name.split(".")) <= words

    names = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", PAGE.read_text())
    names = [name for name in names if Path(name).suffix not in SUFFIXES]
    assert "Trials.search" in names
    hold("The page names what is not there", [name for name in names if not there(name)])


# --- the rules themselves, on packages that break them --------------------------------------


def package(folder: Path, files: dict[str, str]) -> Path:
    """A package that keeps all rules, but for what these files hold under their docstrings."""
    root = folder / "fuse_ext"
    says = {f"{room}/__init__.py": '"""A room.\n\nIt says so.\n"""' for room in ROOMS}
    says["__init__.py"] = '"""A package.\n\nIt says so.\n"""'
    for name in says.keys() | files.keys():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        first = says.get(name, '"""A file."""')
        (root / name).write_text(f"{first}\n{files.get(name, '')}\n")
    return root


ALLOWED = {
    "__init__.py": "from fuse_ext import _C\nfrom fuse_ext.optim.adam import Adam",
    "checks.py": "import torch",
    "_version.py": "",
    "kernels/ops.py": "from fuse_ext import _C\nfrom fuse_ext.kernels.reference import adam",
    "kernels/reference/adam.py": "",
    "vector/flat.py": "from fuse_ext.checks import check\nfrom fuse_ext.kernels import ops",
    "optim/adam.py": "import fuse_ext.vector.flat as flat\nfrom fuse_ext import _version\n"
    "class Base(torch.optim.Optimizer, ABC):\n    pass\nclass Adam(Base):\n    pass",
    "tell/report.py": "x = 1\n" * (MOST_LINES - 2),
}


def test_a_package_may_keep_all_rules(tmp_path: Path) -> None:
    root = package(tmp_path, ALLOWED)
    for rule in RULES:
        hold(rule.__name__, rule(root))
    found = architecture.between_rooms(architecture.arrows(root))
    assert architecture.longest_chain(found) == ["optim", "vector", "kernels"]


WAYS = [
    "from fuse_ext.tell import report",
    "from fuse_ext.tell.report import Report",
    "import fuse_ext.tell.report as report",
    "from ..tell.report import Report",
    "import_module('fuse_ext.tell.report')",
    "if TYPE_CHECKING:\n    from fuse_ext.tell import report",
    "def f():\n    from fuse_ext.tell import report",
]


@pytest.mark.parametrize("way", WAYS)
def test_an_arrow_is_found_however_it_is_written(way: str, tmp_path: Path) -> None:
    root = package(tmp_path, {"objective/trials.py": way, "tell/report.py": ""})
    assert against_the_table(root) == ["objective/trials.py -> tell/report.py"]


WRONG = [
    ("vector/flat.py", "from fuse_ext import Adam", "__init__.py"),
    ("vector/flat.py", "import fuse_ext", "__init__.py"),
    ("search/noise.py", "from fuse_ext import _C", "_C"),
    ("vector/flat.py", "from fuse_ext.vector.gone import x", "fuse_ext.vector.gone"),
    ("objective/trials.py", "from fuse_ext.tell import tell", "tell/__init__.py"),
    ("checks.py", "from fuse_ext.vector import x", "vector/__init__.py"),
]


@pytest.mark.parametrize(("source", "text", "target"), WRONG)
def test_arrows_past_the_table_are_found(
    source: str, text: str, target: str, tmp_path: Path
) -> None:
    assert against_the_table(package(tmp_path, {source: text})) == [f"{source} -> {target}"]


RING = {
    "vector/a.py": "from fuse_ext.vector.b import B",
    "vector/b.py": "def f():\n    from fuse_ext.vector import c",
    "vector/c.py": "if TYPE_CHECKING:\n    import fuse_ext.vector.a",
}
ROOM_RING = {"vector/__init__.py": "from . import a", "vector/a.py": "from . import x"}
BASE = "from torch.optim import Optimizer\nclass Base(Optimizer):\n    pass"
DEEP = "from fuse_ext.optim import base\nclass A(base.Base):\n    pass\nclass B(A, ABC):\n    pass"
CHAIN = "optim.deep.B -> fuse_ext.optim.deep.A -> fuse_ext.optim.base.Base -> torch.optim.Optimizer"
SEVEN = ("optim", "phase", "tell", "objective", "curvature", "vector", "kernels")
TALL = {f"{a}/x.py": f"from fuse_ext.{b} import x" for a, b in itertools.pairwise(SEVEN)}
TALL["kernels/x.py"] = ""
# Rooms may be in a circle where no files are.
ROOMS_ALONE = {
    "vector/a.py": "from fuse_ext.kernels import a",
    "kernels/a.py": "",
    "kernels/b.py": "from fuse_ext.vector import b",
    "vector/b.py": "",
}
PLAIN_DEEP = "class A(dict, Protocol):\n    pass\nclass B(A):\n    pass\nclass C(B):\n    pass"
PLAIN_CHAIN = "fuse_ext.vector.a.C -> fuse_ext.vector.a.B -> fuse_ext.vector.a.A -> dict"
METHOD = "class A:\n    def f(self):\n        raise NotImplementedError('f')"


@pytest.mark.parametrize(
    ("rule", "files", "found"),
    [
        (circles, RING, "vector/a.py -> vector/b.py -> vector/c.py -> vector/a.py"),
        (circles, ROOM_RING, "vector/__init__.py -> vector/a.py -> vector/__init__.py"),
        (too_tall, TALL, " -> ".join(SEVEN)),
        (too_tall, ROOMS_ALONE, "kernels -> vector -> kernels"),
        (without_a_room, {"tools/a.py": ""}, "tools/a.py"),
        (without_a_room, {"helpers.py": ""}, "helpers.py"),
        (too_long, {"vector/a.py": "x = 1\n" * (MOST_LINES - 1)}, "vector/a.py: 401 lines"),
        (too_full, {f"vector/{name}.py": "" for name in "abcdefgh"}, "vector/: 9 files"),
        (
            silent,
            {"vector/a/__init__.py": ""},
            "vector/a/__init__.py: a docstring of 1 lines, not 3",
        ),
        (unfinished, {"vector/a.py": "raise NotImplementedError"}, "vector/a.py:2"),
        (unfinished, {"vector/a.py": METHOD}, "vector/a.py:4"),
        (too_deep, {"optim/base.py": BASE, "optim/deep.py": DEEP}, f"fuse_ext.{CHAIN}"),
        (too_deep, {"vector/a.py": PLAIN_DEEP}, PLAIN_CHAIN),
    ],
)
def test_a_rule_finds(
    rule: Callable[[Path], list[str]], files: dict[str, str], found: str, tmp_path: Path
) -> None:
    assert rule(package(tmp_path, files)) == [found]


def test_a_file_without_docstring_is_found(tmp_path: Path) -> None:
    root = package(tmp_path, {})
    (root / "vector" / "flat.py").write_text("x = 1\n")
    assert silent(root) == ["vector/flat.py: a docstring of 0 lines, not 1"]


def test_a_new_file_changes_the_picture(tmp_path: Path) -> None:
    one, other = (
        architecture.draw(package(tmp_path / name, {f"vector/{name}.py": ""})) for name in "ab"
    )
    assert "a.py" in one and one != other
