"""Who may import whom: assets -> edges -> core -> records; heavy libraries only where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "evolve_dag"
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "vllm",
    "mlflow",
    "dagster",
    "polars",
    "duckdb",
    "plotly",
    "safetensors",
    "tokenizers",
    "openai",
    "httpx",
    "trafilatura",
    "markitdown",
    "math_verify",
    "matplotlib",
}
LAYERS = {
    "errors": 0, "jsonlines": 0, "records": 0, "config": 1, "memory": 1, "mirror": 1, "prompts": 1, "scheduling": 1,
    "secrecy": 1, "store": 1, "frames": 2, "agent": 3, "distillation": 3, "environments": 3, "evaluation": 3,
    "experience": 3, "inference": 3, "ledger": 3, "verification": 3, "benchmarks": 4, "query": 5, "steps": 5, "trace": 5,
    "audit": 6, "config_reference": 6, "garbage": 6, "importing": 6, "planning": 6, "registry": 6, "reporting": 6,
    "tracking": 7, "assets": 8, "definitions": 8, "doctor": 8, "cli": 9, "__main__": 10,
}  # fmt: skip
"""Part -> layer; a part imports its own layer or lower ones. What only types need (TYPE_CHECKING) does not count."""


def modules() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "assets").rglob("*.py")])


def part(path: Path) -> str:
    if path.parent == ROOT / "assets":
        return "assets"
    first = path.relative_to(PACKAGE).parts[0]
    if path == PACKAGE / "tracking" / "ledger.py":  # what costs something is written down where it is asked
        return "ledger"
    return first.removesuffix(".py")


def imports(tree: ast.AST, *, nested: bool) -> list[str]:
    """Modules imported at run time; ``nested`` adds those inside functions."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not nested:
                continue
            if isinstance(child, ast.Import):
                found.extend(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
                found.append(child.module)
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    here = part(path)
    if here == "__init__":
        return
    for name in imports(ast.parse(path.read_text()), nested=True):
        if name.startswith("evolve_dag.") and path.parent.name != "pocket":
            other = "ledger" if name == "evolve_dag.inference.ledger" else name.split(".")[1]
            assert LAYERS[other] <= LAYERS[here], f"{here} must not import {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_dagster_lives_in_the_assets_alone(path: Path) -> None:
    if part(path) in ("assets", "definitions", "cli"):
        return
    assert not [n for n in imports(ast.parse(path.read_text()), nested=True) if n.split(".")[0] == "dagster"]


def test_command_line_starts_without_heavy_libraries() -> None:
    code = "import sys, evolve_dag, evolve_dag.cli, evolve_dag.config.schema, evolve_dag.records, evolve_dag.store.artifacts; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not HEAVY & {name.split(".")[0] for name in loaded}


def test_every_package_is_listed_for_installation() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(("evolve_dag", *p.parent.relative_to(PACKAGE).parts)) for p in PACKAGE.rglob("__init__.py")}
    assert listed == found | {"evolve_dag.assets"}
