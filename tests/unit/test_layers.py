"""The rooms of the house and the one way in which they use each other.

Rooms are listed from the ground up. A room uses rooms below it, and rooms of its own floor as long
as that goes round in no circle. A new file needs a place in these lists.

Python rooms are the modules and subpackages of `shmheap`; an arrow is an import, wherever in the
file it stands. C rooms are the files of `csrc` and of `csrc/py`; an arrow is the use of a
function that another file defines, or an include of another room's own header.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "shmheap"
FACE = "__init__"

PYTHON_FLOORS = (
    ("errors", "config", "stats", "rss"),
    ("_core",),
    ("limits",),
    ("arena", "block", "arrays", "sites"),
    ("values", "roots", "holders", "containers", "coordinator", "verify"),
    ("heap",),
    ("cache", "payload", "plugins", "plugins/numpy", "plugins/_numpy", "testing", "progress"),
    ("forking", "tally", "wires"),
    ("dispatch", "lifeline"),
    ("pool", "executor"),
    ("plugins/joblib",),
    (FACE,),
    ("cli", "__main__"),
)
ALONE = {"rss"}
"""The independent witness imports nothing that it may be called to judge."""

OUTSIDE = {
    "rich": {"cli", "progress"},
    "numpy": {"plugins/numpy"},
    "joblib": {"plugins/joblib"},
    "matplotlib": {"cli"},
}
"""Who may import these at its top; the others may inside a function, but for rich."""

C_FLOORS = (
    ("os",),
    ("lock",),
    ("pages",),
    ("span",),
    ("word",),
    ("drop",),
    ("block", "node", "slots"),
    ("record",),
    ("coll",),
    ("arena", "roots", "mark", "table", "list", "coord"),
    ("check", "holders", "sites"),
    ("shares",),
    ("inspect",),
    ("py/py",),  # a header
    ("py/coll",),  # a header
    ("py/state",),
    ("py/errors",),
    ("py/box",),
    ("py/memory", "py/fork", "py/numbers", "py/block", "py/functions"),
    ("py/value",),
    ("py/dict",),
    ("py/list",),
    ("py/heap",),
    ("py/steward", "py/observer"),
    ("py/module",),
    ("numpy/handler",),
)
C_HEADERS = {"layout.h", "shmheap.h", "core.h", "size_classes.h"}
"""Anybody's."""

OS_CALLS = {"mmap", "munmap", "mremap", "madvise", "fallocate", "posix_fallocate", "ftruncate"}
"""Memory is taken and given back through one door, os.c."""


@dataclass(frozen=True)
class Arrow:
    """Room `user` uses room `used`, in `where`."""

    user: str
    used: str
    where: str


def wrong_arrows(floors: Sequence[Sequence[str]], arrows: Sequence[Arrow]) -> list[str]:
    """What is wrong with these arrows, a line each."""
    floor = {room: i for i, rooms in enumerate(floors) for room in rooms}
    unknown = [a for a in arrows if not {a.user, a.used} <= floor.keys()]
    known = [a for a in arrows if a not in unknown]
    wrong = [f"{a.where}: {a.user} -> {a.used}: a room without a floor" for a in unknown]
    wrong += [
        f"{a.where}: {a.user} -> {a.used} runs up" for a in known if floor[a.used] > floor[a.user]
    ]
    return wrong + circles(a for a in known if floor[a.used] == floor[a.user])


def circles(arrows: Iterator[Arrow]) -> list[str]:
    """A line for the first circle that the arrows make, if they make one."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for arrow in arrows:
        sorter.add(arrow.user, arrow.used)
    try:
        sorter.prepare()
    except CycleError as error:
        return [f"a circle: {' -> '.join(reversed(error.args[1]))}"]
    return []


# Python


@dataclass(frozen=True)
class Import:
    """One imported name: `module` as an absolute dotted path that ends with the name."""

    path: Path
    module: str
    line: int
    nested: bool
    """Inside a function: it runs when the function does."""


def python_files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py")) + sorted(package.rglob("*.pyi"))


def room_of(package: Path, path: Path) -> str:
    return room_named(path.relative_to(package).with_suffix("").parts)


def room_named(names: Sequence[str]) -> str:
    """The room of a module: a file or a folder. Each plugin is one of its own."""
    is_plugin = names[0] == "plugins" and len(names) > 1 and names[1] != FACE
    return "/".join(names[:2]) if is_plugin else names[0]


def imports(package: Path, path: Path) -> Iterator[Import]:
    """Every import of a file."""
    tree = ast.parse(path.read_text())
    nested = {
        node
        for later in ast.walk(tree)
        if isinstance(later, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(later)
        for node in ast.walk(later)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = base_of(package, path, node)
            modules = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            yield Import(path, module, node.lineno, node in nested)


def is_for_types(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:`, whose body never runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def base_of(package: Path, path: Path, node: ast.ImportFrom) -> str:
    """The absolute module that `from base import ...` names."""
    if not node.level:
        return node.module or ""
    folder = path.parents[node.level - 1].relative_to(package.parent)
    return ".".join([*folder.parts, *([node.module] if node.module else [])])


def python_arrows(package: Path) -> list[Arrow]:
    """Every import of one room by another."""
    files = python_files(package)
    rooms = {room for floor in PYTHON_FLOORS for room in floor}
    rooms |= {room_of(package, path) for path in files}
    arrows = []
    for path in files:
        user = room_of(package, path)
        for found in imports(package, path):
            top, *rest = found.module.split(".")
            if top != PACKAGE:
                continue
            used = room_named(rest) if rest and (rest[0] in rooms or len(rest) > 1) else FACE
            if used != user:
                arrows.append(Arrow(user, used, f"{path.relative_to(package)}:{found.line}"))
    return arrows


def outside_imports(package: Path) -> list[str]:
    """Imports of heavy packages in rooms that everybody must pass through."""
    wrong = []
    for path in python_files(package):
        room = room_of(package, path)
        for found in imports(package, path):
            top = found.module.split(".")[0]
            late = found.nested and top != "rich"
            if top in OUTSIDE and room not in OUTSIDE[top] and not late:
                wrong.append(f"{path.relative_to(package)}:{found.line}: {room} imports {top}")
    return wrong


def python_violations(package: Path) -> list[str]:
    """What breaks the order of the Python rooms."""
    arrows = python_arrows(package)
    wrong = wrong_arrows(PYTHON_FLOORS, arrows)
    wrong += [f"{a.where}: {a.user} imports of {PACKAGE}" for a in arrows if a.user in ALONE]
    return wrong + outside_imports(package)


# C


COMMENT = r"/\*.*?\*/|//[^\n]*"
LITERAL = r""""(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""
NOT_CODE = re.compile(f"{COMMENT}|{LITERAL}", re.DOTALL)
DIRECTIVE = re.compile(r"^[ \t]*#(?:\\\n|[^\n])*", re.MULTILINE)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
WORD = re.compile(r"[A-Za-z_]\w*")
ATTRIBUTE = re.compile(r"__attribute__\s*\(\(.*?\)\)", re.DOTALL)


def code_of(text: str) -> str:
    """C without comments, literals and directives."""
    return DIRECTIVE.sub(" ", NOT_CODE.sub(" ", text))


def outline(code: str) -> list[str]:
    """What stands at file level, a string for each declaration, definitions ending with a brace."""
    parts, start, depth = [], 0, 0
    for i, char in enumerate(code):
        if char == "{":
            if depth == 0:
                parts.append(code[start : i + 1].strip())
            depth += 1
        elif char == "}":
            depth -= 1
            start = i + 1
        elif char == ";" and depth == 0:
            parts.append(code[start : i + 1].strip())
            start = i + 1
    return parts


def functions_of(code: str) -> set[str]:
    """Names of the functions that a file defines for others."""
    names = set()
    for part in outline(code):
        head = ATTRIBUTE.sub(" ", part)
        named = re.search(r"(\w+)\s*\(", head)
        if head.endswith("{") and named and "=" not in head and not re.match(r"static\b", head):
            names.add(named[1])
    return names


def c_arrows(csrc: Path) -> list[Arrow]:
    """Every use of one C file's functions or header by another."""
    codes = {c_room_of(csrc, path): code_of(path.read_text()) for path in sorted(csrc.rglob("*.c"))}
    home = {name: room for room, code in codes.items() for name in functions_of(code)}
    arrows = []
    for user, code in codes.items():
        used = {(home[word], word) for word in WORD.findall(code) if word in home}
        arrows += [Arrow(user, room, f"{user}.c: {word}") for room, word in sorted(used)]
        arrows += include_arrows(csrc, csrc / f"{user}.c")
    return [arrow for arrow in arrows if arrow.user != arrow.used]


def include_arrows(csrc: Path, path: Path) -> list[Arrow]:
    """Includes of headers that are a room's own."""
    user = c_room_of(csrc, path)
    return [
        Arrow(user, c_room_of(csrc, (path.parent / name).resolve()), f'{user}.c: "{name}"')
        for quote, name in INCLUDE.findall(path.read_text())
        if quote == '"' and Path(name).name not in C_HEADERS
    ]


def c_room_of(csrc: Path, path: Path) -> str:
    """The name of a C file's room: its path in csrc, without the suffix."""
    return path.relative_to(csrc).with_suffix("").as_posix()


def c_violations(csrc: Path) -> list[str]:
    """What breaks the order of the C rooms."""
    wrong = wrong_arrows(C_FLOORS, c_arrows(csrc))
    for path in [*sorted(csrc.rglob("*.c")), *sorted(csrc.rglob("*.h"))]:
        text = path.read_text()
        name = path.relative_to(csrc).as_posix()
        headers = {name for _, name in INCLUDE.findall(text)}
        if "Python.h" in headers and not name.startswith(("py/", "numpy/")):
            wrong.append(f"{name}: only py/ and plugins know Python")
        called = set(re.findall(r"\b(\w+)\s*\(", code_of(text))) & OS_CALLS
        if called and name != "os.c":
            wrong.append(f"{name}: {', '.join(sorted(called))}: only os.c may")
    return wrong


# The house as it stands


def test_python_rooms_use_only_what_is_below_them() -> None:
    assert python_violations(ROOT / PACKAGE) == []


def test_c_rooms_use_only_what_is_below_them() -> None:
    assert c_violations(ROOT / PACKAGE / "csrc") == []


def test_the_arrows_that_the_design_draws_are_seen() -> None:
    c = {(a.user, a.used) for a in c_arrows(ROOT / PACKAGE / "csrc")}
    assert {("py/steward", "py/heap"), ("py/heap", "py/box"), ("py/heap", "block")} <= c
    assert {("block", "span"), ("span", "pages"), ("pages", "lock")} <= c
    python = {(a.user, a.used) for a in python_arrows(ROOT / PACKAGE)}
    assert {("heap", "_core"), ("heap", "config"), ("coordinator", "_core")} <= python


# Houses that fall down


def build(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


GOOD_PYTHON = {
    "__init__.py": "from shmheap.heap import Heap\n",
    "errors.py": "",
    "_core.pyi": "from shmheap.errors import HeapError\n",
    "heap.py": "import shmheap.coordinator.loop\nfrom .coordinator import loop\n",
    "rss.py": "import psutil\n",
    "coordinator/__init__.py": "",
    "coordinator/loop.py": "from .. import _core, errors\nfrom .pacing import due\n",
    "coordinator/pacing.py": "def due(): import numpy\n",
    "cli/__init__.py": "import rich.table\nfrom shmheap import Heap\n",
}


def test_a_good_python_house_stands(tmp_path: Path) -> None:
    package = build(tmp_path / PACKAGE, GOOD_PYTHON)
    assert python_violations(package) == []
    assert {(a.user, a.used) for a in python_arrows(package)} == {
        ("__init__", "heap"),
        ("_core", "errors"),
        ("heap", "coordinator"),
        ("coordinator", "_core"),
        ("coordinator", "errors"),
        ("cli", "__init__"),
    }


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("errors.py", "from shmheap.heap import Heap", "errors.py:1: errors -> heap runs up"),
        ("errors.py", "from shmheap import heap", "errors -> heap runs up"),
        ("errors.py", "import shmheap.heap as h", "errors -> heap runs up"),
        ("errors.py", "def f():\n    from .heap import Heap", "errors.py:2: errors -> heap"),
        ("heap.py", "from shmheap import Heap", "heap -> __init__ runs up"),
        ("heap.py", "import shmheap", "heap -> __init__ runs up"),
        ("coordinator/loop.py", "from ..heap import Heap", "coordinator -> heap runs up"),
        ("coordinator/loop.py", "from .. import cli", "coordinator -> cli runs up"),
        ("_core.pyi", "from shmheap.heap import Heap", "_core -> heap runs up"),
        ("rss.py", "from shmheap import errors", "rss imports of shmheap"),
        ("shed.py", "from shmheap import errors", "a room without a floor"),
        ("coordinator/loop.py", "import rich", "coordinator imports rich"),
        ("coordinator/loop.py", "def f():\n    from rich import table", "coordinator imports rich"),
        ("heap.py", "import numpy as np", "heap imports numpy"),
    ],
)
def test_a_bad_python_arrow_is_caught(tmp_path: Path, name: str, text: str, says: str) -> None:
    package = build(tmp_path / PACKAGE, GOOD_PYTHON | {name: text})
    assert any(says in line for line in python_violations(package))


def test_a_circle_on_one_floor_is_caught(tmp_path: Path) -> None:
    package = build(
        tmp_path / PACKAGE,
        {"config.py": "from .stats import a", "stats.py": "def f(): from .config import b"},
    )
    [line] = python_violations(package)
    assert line in {"a circle: config -> stats -> config", "a circle: stats -> config -> stats"}


GOOD_C = {
    "shmheap.h": "int sh_span(int);\nstatic inline int sh_two(void)\n{\n    return 2;\n}\n",
    "os.c": '#include <sys/mman.h>\n#include "layout.h"\n'
    "int sh_os(void)\n{\n    return madvise(0, 0, 0);\n}\n",
    "pages.c": "struct page {\n    int x;\n};\nstatic const int table[] = {1, 2};\n"
    "static int sh_span_like(void)\n{\n    return sh_os(); /* never sh_module() */\n}\n"
    "int *\nsh_pages(int (*f)(void))\n{\n    return 0;\n}\n",
    "span.c": '#include "pages.h"\nint sh_span(int n)\n{\n    return n ? *sh_pages(0) : 0;\n}\n',
    "pages.h": "int *sh_pages(int (*f)(void));\n",
    "py/py.h": '#include <Python.h>\n#include "../core.h"\n',
    "py/module.c": '#include "py.h"\n#include "../core.h"\n'
    "int sh_module(void)\n{\n    return sh_span(1);\n}\n",
}


def test_a_good_c_house_stands(tmp_path: Path) -> None:
    csrc = build(tmp_path, GOOD_C)
    assert c_violations(csrc) == []
    assert {(a.user, a.used) for a in c_arrows(csrc)} == {
        ("pages", "os"),
        ("span", "pages"),
        ("py/module", "span"),
        ("py/module", "py/py"),
    }


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("pages.c", "int f(void)\n{\n    return sh_span(1);\n}", "pages.c: sh_span: pages -> span"),
        ("pages.c", "int (*f)(int) = sh_span;", "pages -> span runs up"),
        ("os.c", '#include "pages.h"\n', 'os.c: "pages.h": os -> pages runs up'),
        ("span.c", "#include <Python.h>\n", "span.c: only py/ and plugins know"),
        ("shmheap.h", "#  include <Python.h>\n", "shmheap.h: only py/ and plugins know"),
        ("span.c", '#include "py/py.h"\n', "span -> py/py runs up"),
        ("py/py.h", "void *x = mmap(0, 0);", "py/py.h: mmap: only os.c"),
        ("span.c", "int f(void)\n{\n    return madvise(0, 0, 0);\n}", "span.c: madvise: only os.c"),
        ("shed.c", "int f(void)\n{\n    return sh_span(1);\n}", "a room without a floor"),
    ],
)
def test_a_bad_c_arrow_is_caught(tmp_path: Path, name: str, text: str, says: str) -> None:
    csrc = build(tmp_path, GOOD_C | {name: text})
    assert any(says in line for line in c_violations(csrc))
