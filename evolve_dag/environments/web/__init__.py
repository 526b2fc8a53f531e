"""The live web and the sandbox: search, pages, files, python; addresses that are refused, processes that are confined.

Here: everything that touches the outside. Not here: models, but for the one that sums a page up.
"""
