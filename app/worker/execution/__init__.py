"""Execution: computes the logits of a batch of tokens."""
