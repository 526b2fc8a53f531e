"""What leads to what: plans before a run, traces after it, audits of what weights hold, and what nothing needs any more.

Here: questions about the chain of artifacts. Not here: the chain itself (steps), the walk over digests (store).
"""
