"""Who may import whom: the layers and the absence of circles are import-linter's (pyproject); here is what it cannot say."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

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
GROUND_FLOOR = 12
"""Most loose modules; what is more wants a room."""
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def imported(path: Path) -> set[str]:
    """Top names of all modules that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True, check=False)


def as_installed(folder: Path) -> Path:
    """The code as an installation lays it: the top-level folder assets/ is the package ``evolve_dag.assets``."""
    only_code = shutil.ignore_patterns("__pycache__", "model", "prompts")
    shutil.copytree(PACKAGE, folder / "evolve_dag", ignore=only_code)
    shutil.copytree(ROOT / "assets", folder / "evolve_dag/assets", ignore=only_code)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_every_package_has_a_layer_and_no_file_stands_in_a_circle(tmp_path: Path) -> None:
    found = lint(as_installed(tmp_path))
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 kept, 0 broken" in found.stdout


def test_an_arrow_upwards_and_a_circle_are_seen(tmp_path: Path) -> None:
    code = as_installed(tmp_path) / "evolve_dag"
    (code / "records.py").write_text("from evolve_dag.assets import partitions\n")
    (code / "evaluation/intervals.py").write_text("def f():\n    from evolve_dag.evaluation import gate\n")
    found = lint(tmp_path)
    assert found.returncode == 1
    assert "0 kept, 2 broken" in found.stdout


def test_dagster_lives_in_the_assets_alone() -> None:
    others = [p for p in PACKAGE.rglob("*.py") if p.name not in ("definitions.py", "cli.py") or p.parent != PACKAGE]
    assert [p for p in others if "dagster" in imported(p)] == []


def test_command_line_starts_without_heavy_libraries() -> None:
    started = ", ".join(f"evolve_dag.{name}" for name in ("cli", "config.loading", "records", "store.mirror"))
    code = f"import sys, {started}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not HEAVY & {name.split(".")[0] for name in loaded}


def test_few_modules_stand_on_the_ground_floor() -> None:
    assert len([p for p in PACKAGE.glob("*.py") if p.name != "__init__.py"]) <= GROUND_FLOOR


def test_every_folder_says_what_lives_there() -> None:
    rooms = [*PACKAGE.rglob("__init__.py"), ROOT / "assets/__init__.py"]
    assert [str(room.relative_to(ROOT)) for room in rooms if not ast.get_docstring(ast.parse(room.read_text()))] == []


def test_every_package_is_listed_for_installation() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(("evolve_dag", *p.parent.relative_to(PACKAGE).parts)) for p in PACKAGE.rglob("__init__.py")}
    assert listed == found | {"evolve_dag.assets"}
