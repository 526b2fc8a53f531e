"""Studies: arms by seeds by iterations in one file (start at definition.py), what became of them, and one report.

Here: what a study asks for, in which order it is worked off, and its statistics. Not here: running it (assets/studies.py).
"""
