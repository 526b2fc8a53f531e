"""Language models: the backends behind one protocol, models by role, chat formats, and the ledger of what calls cost.

Here: how a model is asked. Not here: what it is asked for.
"""
