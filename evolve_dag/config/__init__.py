"""Experiment files: their keys, how they are read, which ones a store knows, when they run.

Here: what a person writes down. Not here: anything that runs, opens a model or reads data.
"""
