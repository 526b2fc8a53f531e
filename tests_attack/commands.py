"""Every command that looks at a store, with arguments that the world of the campaign answers."""

from __future__ import annotations

from world import NAME

CONFIG = f"{NAME}.yaml"
COMMANDS: dict[str, tuple[str, ...]] = {
    "status": ("status", CONFIG, "--json"),
    "plan": ("plan", CONFIG),
    "trace": ("trace", "p1"),
    "sql": ("sql", "select condition, avg(reward) from scores group by all"),
    "gc": ("gc",),
    "doctor": ("doctor",),
    "report": ("report", CONFIG),
    "audit": ("audit", CONFIG),
    "play": ("pocket", "play", CONFIG),
    "schedule list": ("schedule", "list"),
    "schedule on": ("schedule", "on", CONFIG),
    "schedule off": ("schedule", "off", CONFIG),
    "import": ("import", "pool.json", "--experiment", CONFIG),
    "gc --yes": ("gc", "--yes"),
    "sync-mlflow": ("sync-mlflow",),
    "run": ("run", CONFIG),
}
"""Name -> what stands behind ``evolve``; those that change something come last."""
