"""Trajectories to pool edits: by contrast mining, by cases, or by the chain of prompts (``llm*``).

Here: how lessons are found. Not here: how they are chosen for a step (selection), how a pool changes (pool).
"""
