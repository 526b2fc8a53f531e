"""Which items fit a state (METHOD: step_wise, R(h_{t-1}, E)): one selector a file, and the choice between them.

None chooses anything for a step at which only an answer is possible ('last step: answer now'): advice to search would end
the episode without one.

Here: what a step is shown. Not here: where in the context it stands (injection).
"""
