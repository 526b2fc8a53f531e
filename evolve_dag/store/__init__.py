"""Artifacts on disk: content-addressed, whole or not there; with the journals, locks and tables in them, and their second home.

Here: what a folder, a file and a digest are. Not here: what a digest is made of (steps), which experiment wants it (lineage).
"""
