"""Which file of an artifact holds what."""

from __future__ import annotations

MANIFEST = "manifest.json"
"""What decided the artifact, and the facts of its files; written last."""
CALLS = "calls.parquet"
"""Calls to models other than the policy, of any step."""

TRAJECTORIES = "trajectories.parquet"
STEPS = "steps.parquet"
"""Steps of those trajectories."""
TASKS = "tasks.jsonl"
"""Tasks of rollouts that were imported."""

ITEMS = "items.parquet"
EDITS = "edits.parquet"
POOL = "pool.json"
"""The pool as it is read again; :data:`ITEMS` has the same items for SQL."""

CONTEXTS = "contexts.parquet"
"""What the teacher had in context at each step that is learned from."""
CURVE = "curve.parquet"
"""Losses of an adapter, a row per optimizer step."""
SCORES = "scores.parquet"
SUMMARY = "summary.json"
"""Metrics by condition."""
DECISION = "decision.json"
"""What the gate decided, why, and the policy that follows."""
POLICY = "policy.json"
"""What a policy is made of."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
"""As peft names them."""
