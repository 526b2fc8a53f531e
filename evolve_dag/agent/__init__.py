"""One episode: the loop of thought, call and observation; actions as text; many episodes at once.

Here: what is the same for every world and model. Not here: any world, any backend, any selector; they come by protocol.
"""
