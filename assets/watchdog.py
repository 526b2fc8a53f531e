"""Ends process groups when the process that started them is gone, however it went. Standard library only: it starts at once.

Run as a script by :mod:`evolve_dag.assets.ui`, with a pipe as its standard input: ``+<group> <signal>`` a line when one is
started, ``-<group>`` when it has ended. The end of the pipe is the end of the parent; then what is left is ended here.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

PATIENCE_SECONDS = 8.0
"""How long a group may take to end by itself once it was asked to."""


def alive(group: int) -> bool:
    """Whether a process group has a member that still runs; its own ended children must have been waited for."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS, of a group that has only zombies
        return False
    return not _only_zombies(group)


def _only_zombies(group: int) -> bool:
    """In a container without an init, ended orphans stay as zombies for ever. Where there is no /proc: False."""
    found = False
    try:
        names = [name for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208 - the standard library's cheapest
    except OSError:
        return False
    for name in names:
        with suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
                state, _, its_group = file.read().rpartition(")")[2].split()[:3]
            if int(its_group) == group:
                if state not in "ZX":
                    return False
                found = True
    return found


def end_groups(groups: dict[int, int], patience: float = PATIENCE_SECONDS) -> None:
    """End process groups: the leader is asked by its own signal, what is left after ``patience`` seconds is killed.

    Args:
        groups: group -> the signal that asks its leader to end; the id of a group is that of its leader.
        patience: seconds, for all groups together.
    """
    for group, first in groups.items():
        with suppress(OSError):
            os.kill(group, first)
    until = time.monotonic() + patience
    left = set(groups)
    while left and time.monotonic() < until:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = {group for group in left if alive(group)}
        time.sleep(0.1)
    for group in left:
        with suppress(OSError):
            os.killpg(group, signal.SIGKILL)


def main() -> None:
    """Wait for the end of the parent, then end what it left."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    groups: dict[int, int] = {}
    for line in sys.stdin:
        group, _, first = line[1:].strip().partition(" ")
        if line.startswith("+"):
            groups[int(group)] = int(first)
        else:
            groups.pop(int(group), None)
    end_groups(groups)


if __name__ == "__main__":
    main()
