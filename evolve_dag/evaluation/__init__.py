"""Numbers over trajectories and scores: metrics, intervals, the gate.

Here: pure functions of records. Not here: files, models, figures.
"""
