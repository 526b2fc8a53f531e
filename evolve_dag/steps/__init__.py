"""The seven steps of an iteration as functions over the store, and the digest chain that links them (start at base.py).

Here: the order of work. Not here: Dagster (assets), tables and pages (reporting).
"""
