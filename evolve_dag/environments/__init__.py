"""Worlds: what answers a tool call. Search over pages of one's own; pocket/ and web/ have rooms.

Here: tools, and what keeps them in bounds. Not here: tasks, verdicts, the loop that calls.
"""
