"""Every way to start a process, in every situation: the cells of docs/reference/start-methods.md.

tools/startmethods.py runs the same cells on other versions of Python.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import start_cells
from processes import PATIENCE_S
from start_cells import METHODS, RAW_FORKS, SITUATIONS, expected

from shmheap import Block, Heap, HeapError

PAGE = Path(__file__).resolve().parents[2] / "docs/reference/start-methods.md"


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("method", [*METHODS, *RAW_FORKS])
def test_cell(method: str, situation: str, heap_name: str) -> None:
    if method == "fork syscall":
        try:
            start_cells.fork_number()
        except start_cells.RefusedError:
            pytest.skip("this machine has no fork system call")
    done = subprocess.run(
        [sys.executable, "-P", start_cells.__file__, method, situation, heap_name],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert f"{said['outcome']} {said['why']}".strip() == expected(method, situation), done.stderr


def use_exported(connection: Connection, block: Block) -> None:
    for use in (lambda: memoryview(block), lambda: bytes(block), lambda: block[0]):
        try:
            use()
            connection.send("was let in")
        except HeapError as error:
            connection.send(str(error))


def test_an_exported_block_let_a_raw_forks_child_make_new_views(heap: Heap) -> None:
    if not start_cells.UNSEEN["fork syscall"]:
        pytest.skip("this fork is seen")
    block = heap.put(b"abc")
    with memoryview(block), start_cells.child("fork syscall", use_exported, block) as other:
        said = [other.receive() for _ in range(3)]
    assert all(text.startswith("this process was forked without") for text in said), said


def test_the_page_has_a_table_with_these_cells() -> None:
    rows = re.findall(r"^\| (?:`?)([\w ()]+?)(?:`?) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    cells = {row[0]: row[1].split(" | ") for row in rows}
    assert cells["method"] == list(SITUATIONS)
    for method in (*METHODS, *RAW_FORKS):
        said = [cell.replace("`", "") for cell in cells[method]]
        assert said == [expected(method, situation) for situation in SITUATIONS]
