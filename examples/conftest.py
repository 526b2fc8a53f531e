"""The examples can be imported as if they were installed, so that `make test` runs their tests."""

import sys
from pathlib import Path

sys.path[:0] = [str(project.parent) for project in sorted(Path(__file__).parent.glob("*/pyproject.toml"))]
