"""The child process that holds a model.  Only `messages` may be imported by the API process: the rest needs torch."""
