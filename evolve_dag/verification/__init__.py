"""What judges a final answer: exact text, a short answer, mathematics, a model.

Here: verdicts. "Could not be judged" is one, and never "wrong". Not here: averages.
"""
