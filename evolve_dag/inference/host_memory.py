"""The host's memory, as far as this process may have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def host_memory() -> tuple[int, int]:
    """Bytes that there are, and those of them that are free or that the system would make room with.

    Where a container, a pod or a service may have less than the machine has, it is that; else the kernel ends the process when
    it takes more.
    """
    machine = psutil.virtual_memory()
    there, free = machine.total, machine.available
    for group, limit_name, used_name, files_key in _groups():
        limit = _number(group / limit_name)
        if limit is None:
            continue
        # Files that the system keeps in memory for speed are counted as used, and make room.
        used = (_number(group / used_name) or 0) - _statistic(group / "memory.stat", files_key)
        there, free = min(there, limit), min(free, max(0, limit - max(0, used)))
    return there, free


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """The control groups that this process is in, inner ones first: folder, its files of limit and use, its count of files."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    paths = {kinds: path for _, kinds, path in (line.split(":", 2) for line in lines if line.count(":") >= 2)}
    second = (paths.get("", "/"), CGROUPS, ("memory.max", "memory.current", "inactive_file"))
    own = next((path for kinds, path in paths.items() if "memory" in kinds.split(",")), "/")
    first = (own, CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    for path, root, names in (second, first):
        # A container may see its own group as the root, and still be told the host's path, which is not there then.
        parts = [part for part in path.split("/") if part]
        parts = [] if ".." in parts else parts
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth]), *names


def _number(path: Path) -> int | None:
    """What a file of one number says; None where it is not there, cannot be read, or says ``max``."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
        return next((int(line[1]) for line in lines if line[:1] == [name]), 0)
    except (OSError, ValueError, IndexError):
        return 0
