"""Sampling parameters applied to logits: penalties, temperature, top-k, top-p, min-p, log-probabilities."""
