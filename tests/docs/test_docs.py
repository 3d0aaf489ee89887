"""The documents say what the code has, and what they show works.

Every ```python block of README, tutorial and how-to pages runs as a script of its own. Heap names
in them are replaced by names of this test, and the script must end with status 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import shmheap

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
EXAMPLES = [ROOT / "README.md", DOCS / "tutorial.md", *sorted((DOCS / "howto").glob("*.md"))]
EXAMPLES += [DOCS / "explanation" / "memory.md"]
REFERENCE = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
SOURCES = [
    path
    for folder in ("shmheap", "tests", "tools")
    for suffix in ("py", "pyi", "c", "h")
    for path in sorted((ROOT / folder).rglob(f"*.{suffix}"))
]

INVARIANTS = [f"I-{n}" for n in range(1, 11)]
PATIENCE_S = 120.0
"""Bounds how long a broken example hangs, and decides no test's outcome."""


class Example(NamedTuple):
    """A block of code of a page."""

    page: Path
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def examples(page: Path) -> Iterator[Example]:
    text = page.read_text()
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Example(page, text.count("\n", 0, found.start()) + 1, found[1])


EVERY_EXAMPLE = [example for page in EXAMPLES for example in examples(page)]


def with_own_heaps(code: str, new_name: Callable[[], str]) -> str:
    """The code with each heap name replaced by a new one, the same for the same."""
    names: dict[str, str] = {}

    def own(found: re.Match[str]) -> str:
        return f'{found[1]}("{names.setdefault(found[2], new_name())}"'

    return re.sub(r'\b((?:shmheap|Heap)\.(?:open|create|attach))\("([^"]+)"', own, code)


@pytest.mark.parametrize("example", EVERY_EXAMPLE, ids=str)
def test_examples_run(example: Example, tmp_path: Path, new_heap_name: Callable[[], str]) -> None:
    script = tmp_path / "example.py"
    script.write_text(with_own_heaps(example.code, new_heap_name))
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_there_are_examples() -> None:
    pages = {example.page for example in EVERY_EXAMPLE}
    assert pages == set(EXAMPLES)


def test_every_example_has_names_of_its_own() -> None:
    for example in EVERY_EXAMPLE:
        replaced = with_own_heaps(example.code, lambda: "own")
        literal = re.findall(r'(?:open|create|attach)\("([^"]+)"', replaced)
        assert set(literal) <= {"own"}, str(example)


@pytest.mark.parametrize("name", shmheap.__all__)
def test_public_names_are_in_the_reference(name: str) -> None:
    assert re.search(rf"`(?:class |shmheap\.)?{name}\b", REFERENCE), name


@pytest.mark.parametrize("cls", [shmheap.Heap, shmheap.Block, shmheap.Lease, shmheap.HeapFull])
def test_public_members_are_in_the_reference(cls: type) -> None:
    members = {name for name in dir(cls) if not name.startswith("_")}
    members -= set(dir(BaseException))
    missing = {name for name in members if not re.search(rf"`(?:\w+\.)?{name}\b", REFERENCE)}
    assert not missing


@pytest.mark.parametrize("cls", [shmheap.Pool, shmheap.ProcessPoolExecutor])
def test_parameters_and_members_of_pools_are_in_the_reference(cls: type) -> None:
    """Those that the standard library's have not."""
    section = (DOCS / "reference/api.md").read_text().partition("\n## Pools")[2]
    [theirs] = cls.__bases__
    own = {name for name in vars(cls) if not name.startswith("_")} - set(dir(theirs))
    own |= inspect.signature(cls).parameters.keys()
    assert {name for name in own if not re.search(rf"\b{name}\b", section)} == set()


CALLS = [shmheap.open, shmheap.unlink]
CALLS += [
    getattr(cls, name)
    for cls in (shmheap.Heap, shmheap.Block, shmheap.Lease)
    for name in dir(cls)
    if not name.startswith("_") and callable(getattr(cls, name))
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__qualname__)
def test_docstrings_say_how_to_call_and_what_it_costs(call: Callable[..., object]) -> None:
    said = inspect.getdoc(call) or ""
    assert "Cost: " in said
    parameters = inspect.signature(call).parameters.keys() - {"self"}
    assert {name for name in parameters if f"{name}: " not in said} == set()


@pytest.mark.parametrize(
    "cls",
    [
        shmheap.Config,
        shmheap.HeapStats,
        shmheap.GCReport,
        shmheap.Holder,
        shmheap.ScavengeReport,
        shmheap.PoolStats,
        shmheap.Traffic,
    ],
)
def test_fields_are_in_the_reference(cls: type) -> None:
    missing = {f.name for f in dataclasses.fields(cls) if f"`{f.name}`" not in REFERENCE}
    assert not missing


def test_config_defaults_are_those_of_the_reference() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", (DOCS / "reference/config.md").read_text(), re.M)
    documented = {name: value for name, value in rows if name != "SHMHEAP_TRACE"}
    assert documented == {
        field.name: repr(field.default) for field in dataclasses.fields(shmheap.Config)
    }


def commands() -> dict[str, argparse.ArgumentParser]:
    from shmheap.cli import _parser

    for action in _parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("the command line has no commands")


@pytest.mark.parametrize("command", [*commands()])
def test_commands_and_their_options_are_in_the_reference(command: str) -> None:
    text = (DOCS / "reference/cli.md").read_text()
    heading = re.search(rf"^### `shmheap {command}\b.*$", text, re.MULTILINE)
    assert heading, command
    options = {
        option
        for action in commands()[command]._actions
        for option in action.option_strings
        if option.startswith("--")
    } - {"--help", "--json", "--directory"}
    assert options == set(re.findall(r"--[a-z]+", heading[0]))


def test_invariants_are_numbered() -> None:
    headings = re.findall(r"^## (I-\d+) ", (DOCS / "invariants.md").read_text(), re.MULTILINE)
    assert headings == INVARIANTS


def test_rules_are_numbered() -> None:
    text = (DOCS / "invariants.md").read_text()
    rules = text.partition("## The protocol")[2].partition("## States")[0]
    assert re.findall(r"^(\d+)\. ", rules, re.MULTILINE) == [str(n) for n in range(1, 17)]


def test_invariants_that_code_cites_exist() -> None:
    cited = {
        str(path.relative_to(ROOT)): set(re.findall(r"\bI-\d+\b", path.read_text()))
        for path in SOURCES
    }
    assert any(cited.values())
    assert {path: unknown for path in cited if (unknown := cited[path] - set(INVARIANTS))} == {}


def test_functions_that_the_documents_name_exist() -> None:
    c = "\n".join(path.read_text() for path in (ROOT / "shmheap/csrc").glob("*.[ch]"))
    named = {
        name
        for page in DOCS.rglob("*.md")
        for name in re.findall(r"\bsh_[a-z_]+\b", page.read_text())
    }
    assert named <= set(re.findall(r"\bsh_[a-z_]+\b", c))


def test_functions_are_in_the_files_that_the_documents_name() -> None:
    """`file.c: function`, and all those in `file.c` (`function`, `function`)."""
    said = []
    for page in PAGES:
        text = page.read_text()
        said += re.findall(r"`([\w/]+\.(?:py|[ch])): (?:struct )?(?:\w+\.)?(\w+)`", text)
        for file, names in re.findall(r"`([\w/]+\.[ch])` \(([^()]*)\)", text):
            said += [(file, name) for name in re.findall(r"`(\w+)`", names)]
    assert len(said) > 50
    assert [(file, name) for file, name in said if not is_in(file, name)] == []


def is_in(file: str, name: str) -> bool:
    """Whether a source file of that name, or of that end of a path, has the word."""
    found = (path for path in SOURCES if f"/{path}".endswith(f"/{file}"))
    return any(re.search(rf"\b{name}\b", path.read_text()) for path in found)


def test_files_that_the_invariants_name_exist() -> None:
    text = (DOCS / "invariants.md").read_text()
    named = re.findall(r"`((?:tests|shmheap)/[\w/.]+)`", text)
    named += [f"shmheap/csrc/{name}" for name in re.findall(r"`(\w+\.[ch])\b", text)]
    named += [f"shmheap/{name}" for name in re.findall(r"`((?:coordinator/)?\w+\.py)\b", text)]
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_tests_that_the_documents_name_exist() -> None:
    tests = [path for path in SOURCES if path.is_relative_to(ROOT / "tests")]
    there = {name for path in tests for name in re.findall(r"\bdef (test_\w+)", path.read_text())}
    there |= {path.stem for path in tests}
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) > 20
    assert named - there == set()


def anchor_of(heading: str) -> str:
    """What a heading's link is called, by GitHub's rule."""
    plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return plain.replace(" ", "-")


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http://", "https://", "mailto:")):
                yield page, target


@pytest.mark.parametrize(
    ("page", "target"), [*links()], ids=lambda value: getattr(value, "name", value)
)
def test_relative_links_resolve(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    found = page if not name else (page.parent / name).resolve()
    assert found.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
        assert anchor in map(anchor_of, headings)


@pytest.mark.parametrize(
    "command", ["pip install . && shmheap demo", "pip install '.[test]' && pytest -n auto"]
)
def test_the_set_up_commands_stand_alone_on_a_line(command: str) -> None:
    assert command in (ROOT / "README.md").read_text().splitlines()


def test_the_first_example_has_eight_lines() -> None:
    code = next(examples(ROOT / "README.md")).code
    assert sum(bool(line.strip()) for line in code.splitlines()) == 8


def test_the_figures_of_pools_are_those_of_the_benchmark() -> None:
    measured = (DOCS / "reference/bench.md").read_text().partition("ms, an array there and one")[2]
    ours = re.search(r"^\| shmheap, heap arrays \|.* ([\d.,]+) \|$", measured, re.MULTILINE)
    theirs = re.search(r"^\| Pool \|.* ([\d.,]+) \|$", measured, re.MULTILINE)
    assert ours
    assert theirs
    said = " ".join((ROOT / "README.md").read_text().split())
    assert f"take {ours[1]} ms, with `multiprocessing.Pool` {theirs[1]} ms" in said
