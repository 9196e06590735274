"""Reads calls of tools and reasoning out of what a model writes, in the form of its family."""
