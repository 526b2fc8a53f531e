"""Environments of the library ``verifiers`` (0.4, its v1 tasksets): the library plays, and asks our policy for every turn."""
