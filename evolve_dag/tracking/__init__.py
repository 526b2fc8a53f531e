"""MLflow, which is told what the store holds.

Here: reading the store and sending. Not here: anything that a step waits for.
"""
