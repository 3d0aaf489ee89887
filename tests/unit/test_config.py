from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from shmheap.config import Config, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("7B", 7),
        ("1KiB", 1024),
        ("256MiB", 256 << 20),
        (" 4 GiB ", 4 << 30),
        ("1TiB", 1 << 40),
        ("1kB", 1000),
        ("3 MB", 3_000_000),
        ("2GB", 2 * 10**9),
        ("1TB", 10**12),
        ("1.5GiB", 3 << 29),
        ("0.1kB", 100),
    ],
)
def test_sizes(text: int | str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1 mib", "1KB", "1e6", "1..5MiB", "1MiB2", "\u0661MiB", "1,5MiB", -1]
)
def test_bad_sizes(text: int | str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("size", [1.5, True, None, b"1MiB"])
def test_sizes_of_another_type(size: Any) -> None:
    with pytest.raises(TypeError, match="a size is an int of bytes or a str"):
        parse_size(size)


def test_defaults_are_those_of_2012() -> None:
    config = Config()
    assert config.forced_gc_s == 120  # S6
    assert config.scavenge_after_s == 300  # S7
    assert config.gc_percent == 100
    assert config.memory_limit_bytes is None


@pytest.mark.parametrize(
    ("forced_gc_s", "scavenge_after_s", "tick_s"), [(120, 300, 60), (600, 300, 150), (1, 0.5, 0.25)]
)
def test_the_tick_is_half_the_shorter_limit(  # S8
    forced_gc_s: float, scavenge_after_s: float, tick_s: float
) -> None:
    config = Config(forced_gc_s=forced_gc_s, scavenge_after_s=scavenge_after_s)
    assert config.tick_s == tick_s


def test_the_tick_cannot_be_configured() -> None:
    assert "tick_s" not in {field.name for field in dataclasses.fields(Config)}
    with pytest.raises(TypeError, match="tick_s"):
        Config(tick_s=1.0)  # type: ignore[call-arg]


def test_json_and_back() -> None:
    config = Config(
        forced_gc_s=1,
        scavenge_after_s=2.5,
        gc_percent=-1,
        memory_limit="1GiB",
        lease_grace_s=0,
        lease_max_s=60,
        keep=True,
        directory="/dev/shm/there",
        trace=True,
        log="/dev/null",
        python="python3",
    )
    assert Config.from_json(config.to_json()) == config
    assert Config.from_json(config.to_json().encode()) == config


def test_one_limit_said_in_two_ways_is_one_config() -> None:
    assert Config(memory_limit="1MiB") == Config(memory_limit=1 << 20)
    assert Config(memory_limit="1MiB").memory_limit_bytes == 1 << 20
    assert Config(forced_gc_s=1) == Config(forced_gc_s=1.0)


@pytest.mark.parametrize("text", ["[]", "nonsense", '{"colour": 1}'])
def test_json_of_something_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"object|Expecting|colour"):
        Config.from_json(text)


def test_json_is_checked_like_arguments() -> None:
    with pytest.raises(ValueError, match="forced_gc_s"):
        Config.from_json(json.dumps({"forced_gc_s": -1}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forced_gc_s", 0),
        ("forced_gc_s", math.inf),
        ("scavenge_after_s", math.nan),
        ("scavenge_after_s", 0.09),
        ("lease_grace_s", -0.1),
        ("lease_max_s", 0),
        ("lease_max_s", math.inf),
        ("memory_limit", 0),
        ("memory_limit", "much"),
        ("directory", ""),
        ("log", "a\0b"),
    ],
)
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name if name != "memory_limit" else "memory_limit|size"):
        Config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forced_gc_s", "120"),
        ("forced_gc_s", True),
        ("gc_percent", 100.0),
        ("gc_percent", True),
        ("keep", 1),
        ("trace", "yes"),
        ("memory_limit", 1.5),
        ("directory", b"/dev/shm"),
        ("python", 3),
    ],
)
def test_values_of_another_type(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name if name != "memory_limit" else "size"):
        Config(**{name: value})


def test_paths_hold_in_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(directory="here", log="log.txt", python="python3")
    assert config.directory == str(tmp_path / "here")
    assert config.log == str(tmp_path / "log.txt")
    assert config.python == "python3"  # found on PATH


def test_it_is_frozen_and_takes_keywords_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().keep = True  # type: ignore[misc]
    with pytest.raises(TypeError):
        Config(1.0)  # type: ignore[misc]
