"""Teacher to student: alignment, the teacher's scores, losses, the trainer, the adapter.

Here: tensors and weights. Not here: where trajectories and items come from.
"""
