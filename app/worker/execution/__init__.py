"""From a batch of tokens to logits."""
