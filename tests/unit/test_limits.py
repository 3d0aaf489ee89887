"""What a heap may take: a cgroup's files, read from folders that stand for the machine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from shmheap import Config
from shmheap.limits import NO_LIMIT, Cgroup, limit_and_look_bytes

MIB = 1 << 20
V1_NONE = 9223372036854771712

MOUNT_V2 = "30 23 0:26 {within} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
MOUNT_V1 = "35 31 0:32 {within} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
MOUNT_CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu"
MOUNT_ROOT = "23 1 254:0 / / rw,relatime - ext4 /dev/vda rw"


class Machine:
    """A root folder with what the kernel shows of cgroups."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)

    def process(self, cgroup: str, *mounts: str, within: str = "/") -> None:
        (self.root / "proc/self/cgroup").write_text(cgroup)
        lines = [mount.format(within=within) for mount in (MOUNT_ROOT, MOUNT_CPU, *mounts)]
        (self.root / "proc/self/mountinfo").write_text("\n".join(lines) + "\n")

    def v2(self, path: str, limit: str, usage: int = 0, cache: int = 0) -> None:
        stat = f"anon 4096\nfile 9999999999\ninactive_file {cache}\nactive_file 0\nshmem 77\n"
        files = {"memory.max": f"{limit}\n", "memory.current": f"{usage}\n", "memory.stat": stat}
        self._write("sys/fs/cgroup" + path, files)

    def v1(self, path: str, limit: int, usage: int = 0, cache: int = 0) -> None:
        stat = f"cache 1\ninactive_file 5\ntotal_inactive_file 0\ntotal_active_file {cache}\n"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        values = (f"{limit}\n", f"{usage}\n", stat)
        self._write("sys/fs/cgroup/memory" + path, dict(zip(names, values, strict=True)))

    def _write(self, folder: str, files: dict[str, str]) -> None:
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (self.root / folder / name).write_text(text)

    @property
    def left_mib(self) -> float | None:
        left = Cgroup(str(self.root)).left_bytes()
        return None if left is None else left / MIB


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_v2_what_is_used_is_not_left_and_the_file_cache_is(machine: Machine) -> None:
    machine.process("0::/app\n", MOUNT_V2)
    machine.v2("/app", str(512 * MIB), 200 * MIB, 50 * MIB)
    assert machine.left_mib == 512 - 150 - 16


def test_the_narrowest_of_all_above_counts(machine: Machine) -> None:
    machine.process("0::/kube/pod/app\n", MOUNT_V2)
    machine.v2("/kube/pod/app", "max", 10 * MIB)
    machine.v2("/kube/pod", str(256 * MIB), 100 * MIB)
    machine.v2("/kube", str(1024 * MIB), 900 * MIB)
    assert machine.left_mib == 1024 - 900 - 16
    machine.v2("/kube", "max")
    assert machine.left_mib == 256 - 100 - 16
    machine.v2("/kube/pod", "max")
    assert machine.left_mib is None


def test_v1_beside_a_v2_hierarchy_without_the_controller(machine: Machine) -> None:
    machine.process("4:memory:/app\n3:cpu,cpuacct:/x\n0::/\n", MOUNT_V1, MOUNT_V2)
    machine.v1("/app", 128 * MIB, 60 * MIB, 20 * MIB)
    machine.v1("", V1_NONE, 10**9)
    assert machine.left_mib == 128 - 40 - 16
    machine.v1("/app", V1_NONE)
    assert machine.left_mib is None


def test_a_container_sees_its_own_cgroup_as_the_top_of_the_mount(machine: Machine) -> None:
    machine.process("4:memory:/docker/c0ffee\n", MOUNT_V1, within="/docker/c0ffee")
    machine.v1("", 128 * MIB)
    assert machine.left_mib == 128 - 16
    machine.process("0::/\n", MOUNT_V2)
    machine.v2("", str(64 * MIB))
    assert machine.left_mib == 64 - 8, "of a small limit an eighth is kept back"


def test_a_process_outside_of_what_is_mounted_looks_at_the_mount(machine: Machine) -> None:
    machine.process("0::/../other\n", MOUNT_V2)
    machine.v2("", str(64 * MIB))
    machine.v2("/other", str(32 * MIB))
    assert machine.left_mib == 64 - 8


def test_more_used_than_allowed_leaves_nothing(machine: Machine) -> None:
    machine.process("0::/app\n", MOUNT_V2)
    machine.v2("/app", str(64 * MIB), 63 * MIB)
    assert machine.left_mib == 0


def test_a_limit_that_comes_later_is_seen(machine: Machine) -> None:
    machine.process("0::/app\n", MOUNT_V2)
    cgroup = Cgroup(str(machine.root))
    assert cgroup.left_bytes() is None
    machine.v2("/app", str(64 * MIB))
    assert cgroup.left_bytes() == 56 * MIB


@pytest.mark.parametrize("said", ["", "nonsense", "0::", "::::\n", "0::/app\n"])
def test_what_cannot_be_read_limits_nothing(machine: Machine, said: str) -> None:
    assert machine.left_mib is None
    machine.process(said, MOUNT_V2, "cut - off")
    assert machine.left_mib is None


@pytest.mark.parametrize(
    ("held", "left", "memory_limit", "limit", "look"),
    [
        (10, None, None, NO_LIMIT, NO_LIMIT),
        (10, None, 100, 100, 100),
        (10, 64, None, 74, 14),
        (10, 64, 100, 74, 14),
        (10, 640, 100, 100, 50),
        (10, 0, 100, 10, 10),
        (200, 0, 100, 100, 200),
    ],
)
def test_the_narrower_of_what_was_said_and_what_is_left(
    held: int, left: int | None, memory_limit: int | None, limit: int, look: int
) -> None:
    found = limit_and_look_bytes(held, left, Config(memory_limit=memory_limit))
    assert found == (limit, look)
