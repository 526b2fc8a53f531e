"""The pocket world: generated pages and questions, the small language, and the policy that ships with the package.

Here: the world and how its policy was pretrained. Not here: anything that another world needs.
"""
