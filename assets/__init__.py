"""The Dagster side: thin assets, partitions, resources, checks and automation. Dagster lives here and in ``definitions.py``."""
