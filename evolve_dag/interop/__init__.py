"""The files of others: pools and rollouts that other projects wrote, as ours.

Here: foreign formats. Not here: our own, which the store has.
"""
