"""Loading: from the files of a model to a model in memory."""
