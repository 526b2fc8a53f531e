"""Experience: the pool and its edits, features of a state, injection into a context; extraction and selection have rooms.

Here: what an item is and does. Not here: rollouts, and the files of others (interop).
"""
