"""Decoding over tensors that stay where they are, so that a GPU can replay a whole pass as one graph."""
