"""The host's memory against made control groups, as containers, pods and services have them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from evolve_dag import doctor
from evolve_dag.inference import host_memory as host
from evolve_dag.inference import transformers as backend
from evolve_dag.inference.kv import bytes_per_token

MACHINE = SimpleNamespace(total=24_000, available=17_000)
SECOND = "0::/pods/mine\n"
FIRST = "12:cpu,cpuacct:/elsewhere\n4:memory:/docker/ab\n0::/\n"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in place of /sys/fs/cgroup; ``membership`` beside it says where this process is."""
    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(host, "CGROUPS", root)
    monkeypatch.setattr(host, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr("psutil.virtual_memory", lambda: MACHINE)
    return root


def put(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (None, {}, (24_000, 17_000)),
        (SECOND, {}, (24_000, 17_000)),
        ("nonsense\n\n", {"memory.max": "2000\n"}, (2000, 2000)),
        ("0::/\n", {"memory.max": "2000\n"}, (2000, 2000)),  # a container that sees its own group as the root
        (SECOND, {"memory.max": "2000\n"}, (2000, 2000)),  # and is told the host's path all the same
        ("0::/../other\n", {"memory.max": "2000\n", "../other/memory.max": "5\n"}, (2000, 2000)),
        (SECOND, {"memory.max": "max\n", "pods/mine/memory.max": "3000\n"}, (3000, 3000)),
        (SECOND, {"pods/memory.max": "2500\n", "pods/mine/memory.max": "3000\n"}, (2500, 2500)),
        (SECOND, {"pods/mine/memory.max": "max\n"}, (24_000, 17_000)),
        (SECOND, {"pods/mine/memory.max": "90000\n"}, (24_000, 17_000)),
        (SECOND, {"pods/mine/memory.max": "20000\n", "pods/mine/memory.current": "1000\n"}, (20_000, 17_000)),
        (
            SECOND,
            {
                "pods/mine/memory.max": "3000\n",
                "pods/mine/memory.current": "2000\n",
                "pods/mine/memory.stat": "anon 1100\ninactive_file 900\n",
            },
            (3000, 1900),
        ),
        (SECOND, {"pods/mine/memory.max": "3000\n", "pods/mine/memory.current": "3500\n"}, (3000, 0)),
        (FIRST, {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, (24_000, 17_000)),
        (FIRST, {"memory/memory.limit_in_bytes": "2000\n"}, (2000, 2000)),
        (
            FIRST,
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/docker/ab/memory.limit_in_bytes": "3000\n",
                "memory/docker/ab/memory.usage_in_bytes": "1200\n",
                "memory/docker/ab/memory.stat": "cache 300\ntotal_inactive_file 200\n",
            },
            (3000, 2000),
        ),
    ],
)
def test_the_least_limit_counts(membership: str | None, files: dict[str, str], expected: tuple[int, int], groups: Path) -> None:
    if membership is not None:
        (groups.parent / "membership").write_text(membership)
    put(groups, files)
    assert host.host_memory() == expected


def test_what_cannot_be_read_is_no_limit(groups: Path) -> None:
    (groups / "memory.max").mkdir()
    (groups.parent / "membership").write_bytes(b"\xff\n")
    assert host.host_memory() == (24_000, 17_000)


def test_who_plans_with_memory_asks_here(groups: Path) -> None:
    put(groups, {"memory.max": "20000\n", "memory.current": "12000\n"})
    assert doctor._device_bytes("cpu") == 20_000
    config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    assert backend._cache_budget(config, torch.float32, torch.device("cpu"), None) == 2_000 // bytes_per_token(
        config, torch.float32
    )
