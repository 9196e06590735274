"""Texts to vectors: an encoder's forward pass, or a causal model's, and what is made of its hidden states."""
