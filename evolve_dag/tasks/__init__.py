"""Tasks: suites and formats of files, splits, and the world and verifier that belong to them.

Here: what is asked. Not here: timings, which are in the top-level folder benchmarks/.
"""
