"""The forward pass in torch's own operators."""
