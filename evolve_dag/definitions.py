"""What Dagster loads: ``dagster dev -w workspace.yaml`` finds :data:`defs` here."""

from evolve_dag.assets.location import build

defs = build()
